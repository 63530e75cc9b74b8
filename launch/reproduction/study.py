"""The whole study in one folder: the search for rates, all seeds, results and verdicts.

<folder>/  results.json   every number with its seed, the grid of rates and what was chosen
           claims.json    every claim with its comparison and verdict
           tables.md      both, as tables for readers
           study.json     size of the study, which later starts have to match
           toy/, superni/, records/, logs/   the units (see `units`)
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.run.files import read_json, write_json, write_text
from mhr_scale.run.run_folder import owned_folder
from mhr_scale.run.runlog import log, provenance
from reproduction import claims, rates, results, tables
from reproduction.pool import Clock, Pool
from reproduction.study_suites import SUITES, StudySuite, quick
from reproduction.study_tasks import Data, open_data
from reproduction.units_to_run import Rate, Rates, Unit, search_units, study_units


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says."""

    suites: tuple[str, ...]
    folder: Path
    recipes: Path
    shared: Path
    workers: int
    seeds: int
    is_quick: bool


class _Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` instead of exiting."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; --help shows what there is")


def parse(argv: Sequence[str], *, launch: Path) -> Options:
    """Read the command line; `launch` is the folder that holds `recipes/`.

    Raises `ConfigError` for arguments that it does not know.
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


@dataclass(frozen=True, slots=True)
class _Opened:
    """A suite with its tasks and its units."""

    suite: StudySuite
    data: Data
    search: list[Unit]
    expected: list[Unit]
    """The units of the study, to count them; their rates are chosen after the search."""


def reproduce(options: Options) -> Path:
    """Run what is not done yet and write the results; returns the folder.

    The same command continues the study. Raises `RunError` at the end if a unit failed.
    """
    with owned_folder(options.folder, way_out="use another --folder"):
        return run_study(options)


def run_study(options: Options) -> Path:
    """Run what is not done yet, in a folder that this process owns."""
    folder = options.folder
    opened = [_open(SUITES[name], options) for name in options.suites]
    _check_folder(options)
    units = [unit for entry in opened for unit in (*entry.search, *entry.expected)]
    clock = Clock(total=sum(unit.seconds for unit in units), workers=options.workers)
    log.info(
        "%d units (%s), about %.0f minutes on %d core(s) of their own%s",
        len(units),
        ", ".join(f"{e.suite.name}: {len(e.search)} + {len(e.expected)}" for e in opened),
        clock.total / options.workers / 60,
        options.workers,
        "; quick: the figures tell nothing" if options.is_quick else "",
    )
    pool = Pool(folder, options.recipes, options.workers, clock)
    written: dict[str, dict[str, Any]] = {}
    findings: list[claims.Finding] = []
    for entry in opened:
        written[entry.suite.name], judged = _run_suite(entry, pool)
        findings += judged
        _write(options, written, findings, pool)
    failed = pool.failed
    missing = len(units) - len(pool.fates)
    log.info("\n  tables   %s\n  numbers  %s", folder / "tables.md", folder / "results.json")
    if failed or missing:
        broken = [name for name in failed if pool.fates[name] == "failed"]
        raise RunError(
            f"{len(broken)} of {len(units)} units failed ({', '.join(broken[:3]) or 'none'}), "
            f"{len(failed) - len(broken) + missing} waited for them; their logs are in "
            f"{folder / 'logs'}, the same command tries them again"
        )
    return folder


def _open(suite: StudySuite, options: Options) -> _Opened:
    seeds = tuple(range(1, options.seeds + 1))
    suite = quick(suite) if options.is_quick else replace(suite, seeds=seeds)
    data = open_data(suite, root=options.folder, shared=options.shared)
    search = search_units(suite, data, options.folder)
    rates_for_counting = {method.name: _any_rates(suite) for method in suite.searched}
    expected = study_units(suite, data, options.folder, rates_for_counting)
    return _Opened(suite, data, search, expected)


def _any_rates(suite: StudySuite) -> Rates:
    rate = Rate(lr=suite.grid.adapt[0], routing_lr=suite.grid.routing[0])
    return Rates(
        pretrain=dict.fromkeys(suite.regimes, suite.grid.pretrain[0]),
        adapt={"full": rate, "routing": rate, "average": rate, "soup": rate},
    )


def _check_folder(options: Options) -> None:
    """Raise `RunError` if the folder holds a study of another size."""
    file = options.folder / "study.json"
    purpose = {"quick": options.is_quick, "seeds": options.seeds}
    if not file.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, purpose)
        return
    before = read_json(file, RunError, way_out="use another --folder")
    if before != purpose:
        raise RunError(f"{file}: the folder is for {before}, not {purpose}; use another --folder")


def _run_suite(opened: _Opened, pool: Pool) -> tuple[dict[str, Any], list[claims.Finding]]:
    """Search, choose, run, measure, judge."""
    suite = opened.suite
    log.info("%s: learning rates, on training tasks", suite.name)
    pool.run(opened.search)
    trials = rates.read_trials(suite, pool.root, pool.fates)
    chosen = rates.choose(suite, trials)
    log.info("%s: %d seeds", suite.name, len(suite.seeds))
    pool.run(study_units(suite, opened.data, pool.root, chosen))
    measured = results.measure(suite, pool.root, pool.fates)
    numbers = {
        "title": suite.title,
        "metric": suite.metric,
        "seeds": list(suite.seeds),
        "steps": list(suite.steps),
        "regimes": list(suite.regimes),
        "zero_shot": list(suite.zero_shot.values()),
        "methods": [
            {"name": method.name, "ways": list(method.ways), "note": method.note}
            for method in suite.methods
        ],
        "search_tasks": opened.data.searched,
        "rates": rates.to_json(trials, chosen),
        **measured.to_json(),
    }
    return numbers, claims.judge(suite, measured)


def _write(
    options: Options,
    written: dict[str, dict[str, Any]],
    findings: Sequence[claims.Finding],
    pool: Pool,
) -> None:
    """Write all three files from the results so far."""
    numbers = {
        "schema": 1,
        "quick": options.is_quick,
        "provenance": provenance(
            workers=options.workers, processor_seconds=round(pool.processor_seconds)
        ),
        "failed": pool.failed,
        "suites": written,
    }
    judged = {
        "schema": 1,
        "quick": options.is_quick,
        "rule": claims.RULE,
        "findings": claims.to_json(findings),
        "not_run": [asdict(entry) for entry in claims.NOT_RUN],
    }
    write_json(options.folder / "results.json", numbers)
    write_json(options.folder / "claims.json", judged)
    write_text(options.folder / "tables.md", tables.write(numbers, judged))
