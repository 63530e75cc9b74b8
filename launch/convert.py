"""Convert a backbone's checkpoint into safetensors that every run opens fast and checked.

python launch/convert.py RECIPE [a.b=value ...] [--print]
"""

from mhr_scale.verbs.launching import imported, later, main

with imported():
    from mhr_scale.config import ConvertConfig

if __name__ == "__main__":
    main(ConvertConfig, later("convert:convert"), about=__doc__)
