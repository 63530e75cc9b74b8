"""Multi-task pre-training.

python launch/pretrain.py RECIPE [a.b=value ...] [--print]           one process
deepspeed --num_gpus N launch/pretrain.py RECIPE [a.b=value ...]     N processes
"""

from mhr_scale.verbs.launching import imported, main

with imported():
    from mhr_scale.config import PretrainConfig
    from mhr_scale.verbs.pretrain import pretrain

if __name__ == "__main__":
    main(PretrainConfig, pretrain, about=__doc__)
