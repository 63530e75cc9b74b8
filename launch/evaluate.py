"""Score a backbone, with or without an adapter, on tasks.

python launch/evaluate.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/evaluate.py RECIPE [a.b=value ...]      N processes

--format text, markdown, csv or latex: how tables are printed.
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import EvaluateConfig

if __name__ == "__main__":
    main(EvaluateConfig, later("evaluate:evaluate"), about=__doc__, has_tables=True)
