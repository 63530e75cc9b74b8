"""Which tasks the units of a suite read: those of a seed, and those of the search for rates.

The search never sees a task that the study holds out. Toy: tasks that are held out under no seed of
the study. SuperNI: training tasks, listed in a folder that is written for the search.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mhr_scale.errors import DataError
from mhr_scale.run.files import write_text
from mhr_scale.seeds import seed_from
from mhr_scale.tasks import toy
from reproduction.study_suites import SEARCH_SEED, StudySuite

Overrides = dict[str, tuple[str, ...]]

N_TOY_FIT = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Overrides that name the tasks, by verb."""

    study: Callable[[int], Overrides]
    """Those of one seed of the study."""
    search: Overrides
    searched: list[str]
    """Names of the tasks that rates are chosen on."""


def open_data(suite: StudySuite, *, root: Path, shared: Path) -> Data:
    """The tasks of a suite; writes the lists of SuperNI's search below `root`.

    Raises `DataError` where `shared` lacks the real data.
    """
    return _toy(suite) if suite.name == "toy" else _superni(suite, root, shared)


def _toy(suite: StudySuite) -> Data:
    held_out = {name for seed in suite.seeds for name in toy.split(seed)[0]}
    names = [name for name in toy.PARTS if name not in held_out]
    random.Random(seed_from("search tasks", SEARCH_SEED)).shuffle(names)
    searched, fit = names[: suite.n_search], names[suite.n_search :][:N_TOY_FIT]
    seed = f"tasks.seed={SEARCH_SEED}"
    few = (seed, f"tasks.tasks={json.dumps(searched)}")
    return Data(
        study=lambda seed: dict.fromkeys(
            ("pretrain", "adapt", "evaluate"), (f"tasks.seed={seed}",)
        ),
        search={
            "pretrain": (seed, f"tasks.tasks={json.dumps(fit)}"),
            "adapt": few,
            "evaluate": few,
        },
        searched=searched,
    )


def _superni(suite: StudySuite, root: Path, shared: Path) -> Data:
    folder, backbone = shared / "data" / "superni_sample", shared / "backbones" / "t5_mini_text"
    lists = folder / "splits" / "default" / "train_tasks.txt"
    for path in (lists, lists.with_name("test_tasks.txt"), backbone / "config.json"):
        if not path.is_file():
            raise DataError(
                f"{path}: missing; the suite superni needs the sample and its backbone, name their "
                "folder with --shared or MHR_SHARED"
            )
    names = _read_list(lists)
    random.Random(seed_from("search tasks", SEARCH_SEED)).shuffle(names)
    searched, fit = sorted(names[: suite.n_search]), sorted(names[suite.n_search :])
    search_folder = root / suite.name / "search_tasks"
    _write_lists(search_folder, folder / "tasks", train=fit, test=searched)
    held_out = _read_list(lists.with_name("test_tasks.txt"))
    subset = (f"tasks.tasks={json.dumps(held_out[: suite.n_held_out])}",)
    chosen = subset if suite.n_held_out < len(held_out) else ()

    def overrides(place: Path, seed: int, *further: str) -> Overrides:
        tasks = (f"tasks.folder={place}", f"tasks.seed={seed}")
        few = (*tasks, *further)
        return {
            "pretrain": (f"backbone.name={backbone}", *tasks),
            "adapt": few,
            "evaluate": few,
        }

    return Data(
        study=lambda seed: overrides(folder, seed, *chosen),
        search=overrides(search_folder, SEARCH_SEED),
        searched=searched,
    )


def _read_list(file: Path) -> list[str]:
    return sorted(file.read_text(encoding="utf-8").split())


def _write_lists(folder: Path, tasks: Path, *, train: list[str], test: list[str]) -> None:
    """A SuperNI folder with other lists, linked to the same task files."""
    splits = folder / "splits" / "default"
    splits.mkdir(parents=True, exist_ok=True)
    write_text(splits / "train_tasks.txt", "\n".join(train) + "\n")
    write_text(splits / "test_tasks.txt", "\n".join(test) + "\n")
    link = folder / "tasks"
    if link.is_symlink() and Path(os.readlink(link)) != tasks.resolve():
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(tasks.resolve(), target_is_directory=True)
