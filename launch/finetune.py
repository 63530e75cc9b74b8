"""Fine-tune an exported LoRA on one task, over a backbone in 4, 8 or 16 bits.

python launch/finetune.py RECIPE [a.b=value ...] [--print]
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import FinetuneConfig

if __name__ == "__main__":
    main(FinetuneConfig, later("finetune:finetune"), about=__doc__)
