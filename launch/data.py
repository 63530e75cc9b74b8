"""Check the tasks of a recipe, and fill its token cache.

python launch/data.py RECIPE [a.b=value ...] [--print]

--format text, markdown, csv or latex: how tables are printed.
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import PretrainConfig

if __name__ == "__main__":
    main(PretrainConfig, later("data:check_data"), about=__doc__, has_tables=True)
