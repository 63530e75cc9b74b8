"""One HTML file about runs of any kind, with pictures and tables.

python launch/report.py FOLDER [FOLDER ...] [--file report.html] [--title TITLE]
"""

from mhr_scale.verbs.launching import later, main_of_words

if __name__ == "__main__":
    main_of_words(later("report:report"))
