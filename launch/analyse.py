"""Look at what an adapter has learned: gradient alignment, routing, inventory.

python launch/analyse.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/analyse.py RECIPE [a.b=value ...]      N processes

--format text, markdown, csv or latex: how tables are printed.
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import AnalyseConfig

if __name__ == "__main__":
    main(AnalyseConfig, later("analyse:analyse"), about=__doc__, has_tables=True)
