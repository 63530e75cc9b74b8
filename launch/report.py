"""One HTML file about runs of any kind, with pictures and tables.

python launch/report.py FOLDER [FOLDER ...] [--file report.html] [--title TITLE]
"""

import sys

from mhr_scale.launching import guarded
from mhr_scale.verbs.report import report

if __name__ == "__main__":
    guarded(lambda: sys.stdout.write(report(sys.argv[1:])))
