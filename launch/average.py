"""Average an inventory, with extra steps on its training mixture if asked for.

python launch/average.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/average.py RECIPE [a.b=value ...]      N processes
"""

from mhr_scale.verbs.launching import imported, main

with imported():
    from mhr_scale.config import AverageConfig
    from mhr_scale.verbs.average import average

if __name__ == "__main__":
    main(AverageConfig, average, about=__doc__)
