"""Print the tables of evaluations again, and of several seeds their aggregates.

python launch/summarise.py RUN [RUN ...]
"""

import sys

from mhr_scale.launching import guarded
from mhr_scale.verbs.summarise import summarise_runs

if __name__ == "__main__":
    guarded(lambda: sys.stdout.write(summarise_runs(sys.argv[1:])))
