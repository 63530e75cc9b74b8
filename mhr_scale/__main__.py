"""`python -m mhr_scale VERB ...`, as the script `mhr_scale` of an installation."""

from mhr_scale.verbs.command import command

if __name__ == "__main__":
    command()
