"""The command line of the study."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import ConfigError
from mhr_scale.reproduction.study import Options
from mhr_scale.reproduction.suites import SUITES


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are errors like any other."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; --help shows what there is")


def parse(argv: Sequence[str], *, launch: Path) -> Options:
    """Read the command line; `launch` is the folder that holds `recipes/`.

    Raises `ConfigError` for what it does not know.
    """
    parser = _Parser(
        prog="python launch/reproduce.py",
        description="Compare the paper's claims at small scale; the same command goes on.",
    )
    parser.add_argument("suite", nargs="?", default="all", choices=[*SUITES, "all"])
    parser.add_argument("--workers", type=int, default=2, help="units at a time, one core each")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the study, from 1 on")
    parser.add_argument("--folder", type=Path, help="default runs/reproduce")
    parser.add_argument("--shared", type=Path, help="folder of real data; default MHR_SHARED")
    parser.add_argument("--quick", action="store_true", help="the way alone; figures tell nothing")
    options = parser.parse_args(argv)
    for name, least in (("workers", 1), ("seeds", 2)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}: {getattr(options, name)} is not at least {least}")
    default = Path("runs") / ("reproduce_quick" if options.quick else "reproduce")
    shared = options.shared or Path(os.environ.get("MHR_SHARED", launch.parent.parent / "shared"))
    return Options(
        suites=tuple(SUITES) if options.suite == "all" else (options.suite,),
        folder=options.folder or default,
        recipes=launch / "recipes" / "reproduce",
        shared=shared,
        workers=options.workers,
        seeds=options.seeds,
        is_quick=options.quick,
    )
