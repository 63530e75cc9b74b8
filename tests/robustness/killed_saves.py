"""A process that is killed amid a save, at every moment there is: what is left can be loaded.

The save runs in a fork that counts what it does to files and ends at the n-th doing, before it, or
amid it with half of the bytes written. `os._exit` leaves what SIGKILL would leave; a half-written
file before its flush is what a machine that loses power may leave.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig, artefact
from mhr_scale.adapters.sites import Site
from mhr_scale.errors import UserError
from mhr_scale.run import tensors as tensor_files
from mhr_scale.training import checkpoint, saved_steps

KILLED, DONE = 9, 0
#: What Python says before it does something to a file (PEP 578).
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")
CONFIG = AdapterConfig(layout="attention", rank=2, n_skills=3, n_splits=2)
SITES = tuple(
    Site(
        name=f"encoder.block.{block}.layer.0.SelfAttention.q",
        in_features=8,
        out_features=8,
        stack="encoder",
        block=block,
        sublayer=0,
    )
    for block in range(2)
)
OLD, NEW = 2, 4


@dataclass(frozen=True, slots=True)
class Scene:
    """What lies in the run folder when step `NEW` is saved, and how many steps are kept.

    `before` lists the steps that are saved; whatever is saved under `NEW` is of other values.
    """

    name: str
    before: tuple[int, ...]
    keep: int


SCENES = (
    Scene("the first save", (), keep=1),
    Scene("a save beside an older one", (OLD,), keep=3),
    Scene("a save that removes the older one", (OLD,), keep=1),
    Scene("a save over one of the same step", (NEW,), keep=1),
)


class Run:
    """An adapter and an optimizer's state whose numbers all tell which save they are of."""

    def __init__(self, value: float) -> None:
        self.adapter = Adapter(CONFIG, SITES, task_names=("a", "b"))
        self.moments: dict[str, Tensor] = {}
        for name, parameter in self.adapter.named_parameters():
            parameter.data.fill_(value)
            self.moments[f"{name}/exp_avg"] = torch.full_like(parameter.data, -value)

    def save(self, folder: Path, step: int, *, keep: int) -> None:
        """Save it as a run would."""
        checkpoint.save(
            folder,
            self.adapter,
            (self.moments, {}),
            step=step,
            progress={"plan": "a"},
            backbone={"name": None},
            origin={"run": folder.name},
            keep=keep,
        )

    def is_in(self, saved: checkpoint.Saved) -> bool:
        """Whether a saved step holds these very numbers."""
        tensors, _ = saved.optimizer
        return is_same(saved.adapter, self.adapter) and all(
            tensors[name].equal(moment) for name, moment in self.moments.items()
        )


def is_same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same numbers."""
    mine, theirs = artefact.named_tensors(one), artefact.named_tensors(other)
    return mine.keys() == theirs.keys() and all(mine[n].equal(theirs[n]) for n in mine)


def kill_everywhere(scene: Scene, folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Kill a save at every point in turn, in folders of their own; yields point and faults."""
    point = 0
    while True:
        point += 1
        was_killed, faults = kill_at(scene, folder / str(point), point)
        if not was_killed:
            return
        yield point, faults


def kill_at(scene: Scene, folder: Path, point: int) -> tuple[bool, list[str]]:
    """Kill a save at one point, and look at what is left.

    Returns whether it came so far as to be killed, and what is wrong.
    """
    before = {step: Run(float(step) if step != NEW else 0.5) for step in scene.before}
    for step, run in before.items():
        run.save(folder, step, keep=scene.keep)
    new = Run(float(NEW))
    code = in_fork(lambda: new.save(folder, NEW, keep=scene.keep), folder, point)
    if code not in (KILLED, DONE):
        return True, [f"the save ended with code {code}"]
    return code == KILLED, look_after(folder, before, new, is_saved=code == DONE)


def look_after(folder: Path, before: dict[int, Run], new: Run, *, is_saved: bool) -> list[str]:
    """What is wrong in a run folder after a kill; it is used as a run that goes on would."""
    faults = []
    try:
        step = saved_steps.find_whole(folder)
        candidates = [*before.values(), new]
        if step is None:
            faults += ["nothing is left"] if before or is_saved else []
        else:
            saved = checkpoint.read(folder, step)
            held = [run for run in candidates if run.is_in(saved)]
            faults += [] if held else [f"step {step} holds other numbers"]
            faults += [f"step {step} is an old one"] if is_saved and held != [new] else []
            checkpoint.publish(folder, step)
            if not is_same(artefact.load(folder), saved.adapter):
                faults.append("adapter/ is not that of the step to go on from")
        new.save(folder, NEW + 2, keep=1)
        if saved_steps.find_whole(folder) != NEW + 2:
            faults.append("the next save is not found")
    except (UserError, OSError) as error:
        faults.append(repr(error))
    faults += [f"{path.name} is left" for path in folder.rglob("*.tmp")]
    faults += [f"{path.name} is left" for path in folder.rglob("*.damaged")]
    return faults


# -- in the fork -----------------------------------------------------------------------------------


def in_fork(action: Any, folder: Path, point: int) -> int:
    """Run an action in a fork that ends at the n-th doing to files below a folder; its code."""
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            Clock(folder, point).install()
            action()
            code = DONE
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Clock:
    """Counts what this process does to files, and ends it at the n-th doing."""

    def __init__(self, folder: Path, point: int) -> None:
        self.folder, self.left = str(folder), point

    def install(self) -> None:
        """Count from now on; nothing takes it away again."""
        sys.addaudithook(self._hear)
        self._fsync, os.fsync = os.fsync, self._flush
        self._write_tensors, tensor_files.save_file = tensor_files.save_file, self._save_tensors

    def tick(self) -> None:
        """One thing more."""
        self.left -= 1
        if self.left == 0:
            os._exit(KILLED)

    def _hear(self, event: str, values: tuple[Any, ...]) -> None:
        if event in EVENTS and str(values[0]).startswith(self.folder):
            self.tick()

    def _flush(self, descriptor: int) -> None:
        self.left -= 1
        if self.left == 0:
            self._lose_half(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            os._exit(KILLED)
        self._fsync(descriptor)
        self.tick()

    def _lose_half(self, path: Path) -> None:
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)

    def _save_tensors(self, tensors: Any, path: Path, **options: Any) -> None:
        """The library writes where no Python sees it: count half a file and a whole one."""
        self.left -= 1
        self._write_tensors(tensors, path, **options)
        if self.left == 0:
            self._lose_half(path)
            os._exit(KILLED)
        self.tick()
