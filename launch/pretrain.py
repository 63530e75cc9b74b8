"""Multi-task pre-training.

python launch/pretrain.py RECIPE [a.b=value ...] [--print]           one process
deepspeed --num_gpus N launch/pretrain.py RECIPE [a.b=value ...]     N processes
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import PretrainConfig

if __name__ == "__main__":
    main(PretrainConfig, later("pretrain:pretrain"), about=__doc__)
