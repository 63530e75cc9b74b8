"""Say what a recipe would take on some machines, and which placement to use.

python launch/plan.py RECIPE [hardware.gpu=A100-80G hardware.gpus=8] [a.b=value ...] [--json]

--format text, markdown, csv or latex: how the table is printed.
"""

from mhr_scale.verbs.launching import later, main_of_words

if __name__ == "__main__":
    main_of_words(later("plan:plan"), has_tables=True)
