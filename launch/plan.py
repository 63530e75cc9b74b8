"""Say what a recipe would take on some machines, and which placement to use.

python launch/plan.py RECIPE [hardware.gpu=A100-80G hardware.gpus=8] [a.b=value ...] [--json]
"""

import sys

from mhr_scale.launching import guarded
from mhr_scale.verbs.plan import plan

if __name__ == "__main__":
    guarded(lambda: sys.stdout.write(plan(sys.argv[1:])))
