"""Export an adapter to PEFT or into the backbone's weights, or import one made elsewhere.

python launch/export.py RECIPE [a.b=value ...] [--print]
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import ExportConfig

if __name__ == "__main__":
    main(ExportConfig, later("export:export"), about=__doc__)
