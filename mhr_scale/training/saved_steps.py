"""Which steps of a run are saved, and which of them are whole; known without torch."""

import os
from collections.abc import Mapping
from pathlib import Path

from mhr_scale.errors import RunError
from mhr_scale.run.failures import describe
from mhr_scale.run.files import names_in
from mhr_scale.run.folders import DONE, check, recover, unseal
from mhr_scale.run.runlog import log


def step_folder(run: Path, step: int) -> Path:
    """Folder of a saved step."""
    return run / "steps" / f"{step:06d}"


def complete_steps(run: Path) -> list[int]:
    """Numbers of the complete saved steps, ascending."""
    steps = run / "steps"
    try:
        names = [name for name in names_in(steps) if (steps / name / DONE).exists()]
    except OSError as error:
        raise RunError(f"saved steps cannot be listed: {describe(error)}") from error
    return sorted(int(name) for name in names if name.isdecimal())


def find_resume(run: Path) -> int | None:
    """Newest complete step of a run folder, or None."""
    steps = complete_steps(run)
    return steps[-1] if steps else None


def find_whole(run: Path, *, or_anew: bool = False) -> int | None:
    """Newest complete step whose files are undamaged; None if nothing is saved.

    Newer, damaged steps are logged and set aside as `steps/<step>.damaged`, after the leftovers of
    a killed save are cleaned up. One process calls it. Raises `RunError` if steps are saved but all
    are damaged, unless the run may then start from scratch (`or_anew`).
    """
    try:
        recover(run / "steps")
    except OSError as error:
        raise RunError(f"{run / 'steps'}: cannot be put right: {describe(error)}") from error
    faults: dict[int, str] = {}
    for step in reversed(complete_steps(run)):
        try:
            check(step_folder(run, step))
        except RunError as error:
            faults[step] = str(error)
            continue
        _set_aside(run, faults, f"going on from step {step}")
        return step
    if faults and not or_anew:
        raise RunError(
            f"{'; '.join(faults.values())}; no saved step is whole; put the files back, or delete "
            f"{run / 'steps'} to start anew"
        )
    _set_aside(run, faults, "starting anew")
    return None


def _set_aside(run: Path, faults: Mapping[int, str], consequence: str) -> None:
    for step, fault in faults.items():
        folder = step_folder(run, step)
        aside = folder.with_name(f"{folder.name}.damaged")
        log.warning("%s; %s; the damaged save is now %s", fault, consequence, aside)
        try:
            if aside.exists():
                unseal(aside)
            os.replace(folder, aside)
        except OSError as error:
            raise RunError(f"{fault}; it cannot be moved to {aside}: {describe(error)}") from error
