"""Average an inventory, with extra steps on its training mixture if asked for.

python launch/average.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/average.py RECIPE [a.b=value ...]      N processes
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import AverageConfig

if __name__ == "__main__":
    main(AverageConfig, later("average:average"), about=__doc__)
