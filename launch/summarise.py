"""Print the tables of evaluations again, and of several seeds their aggregates.

python launch/summarise.py RUN [RUN ...] [--format F]
"""

from mhr_scale.verbs.launching import later, main_of_words

if __name__ == "__main__":
    main_of_words(later("summarise:summarise_runs"), has_tables=True)
