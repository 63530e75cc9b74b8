"""Print the tables of evaluations again, and of several seeds their aggregates.

python launch/summarise.py RUN [RUN ...] [--format F]
"""

from mhr_scale.verbs.launching import imported, main_of_words

with imported():
    from mhr_scale.verbs.summarise import summarise_runs

if __name__ == "__main__":
    main_of_words(summarise_runs, has_tables=True)
