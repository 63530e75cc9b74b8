"""Adapt to many few-shot tasks at once: one adapter per task, seed and variant.

python launch/adapt.py RECIPE [a.b=value ...] [--print]            one process
deepspeed --num_gpus N launch/adapt.py RECIPE [a.b=value ...]      N processes

--format text, markdown, csv or latex: how tables are printed.
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import AdaptConfig

if __name__ == "__main__":
    main(AdaptConfig, later("adapt:adapt"), about=__doc__, has_tables=True)
