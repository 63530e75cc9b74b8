"""Look at what an adapter has learned: gradient alignment, routing, inventory.

python launch/analyse.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/analyse.py RECIPE [a.b=value ...]      N processes

--format text, markdown, csv or latex: how tables are printed.
"""

from mhr_scale.verbs.launching import imported, main

with imported():
    from mhr_scale.config import AnalyseConfig
    from mhr_scale.verbs.analyse import analyse

if __name__ == "__main__":
    main(AnalyseConfig, analyse, about=__doc__, has_tables=True)
