"""`mhr_scale harness`, from a checkout."""

from mhr_scale.verbs.command import run

if __name__ == "__main__":
    run("harness")
