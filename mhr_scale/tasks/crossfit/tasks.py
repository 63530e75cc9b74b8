"""CrossFit's files: `<folder>/<task>/<task>_<k>_<seed>_{train,dev,test}.tsv`.

One row a line, separated by tabs: the input, then one or more accepted outputs. White space at the
ends of a line goes, and lines without a character are skipped. `k` is 16 rows of every class in
classification and 32 rows elsewhere, and is read from the names of the files.

An input is " [<task>] " and the text, an output has a blank in front, as the reference writes them
(in a chat template no text begins with one).

A training task has the train rows of all seeds, and their dev rows for validation; a row may stand
in both, as there, since seeds are drawn from the same data. A few-shot task has those of one seed,
and its checkpoints are selected on its dev rows. Test rows are the same for every seed, those of
the first are read, and of them the first 10,000.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from mhr_scale.errors import ConfigError, DataError, some, suggest
from mhr_scale.recipe.part import part
from mhr_scale.run.runlog import log
from mhr_scale.tasks.crossfit.metrics import OURS, reference_problem
from mhr_scale.tasks.crossfit.partitions import FILE, metric_of, open_partition, partition_names
from mhr_scale.tasks.suite import FewShotTask, ShotsConfig, Suite
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Place, Task

#: The seeds that CrossFit draws every task with.
SEEDS = (13, 21, 42, 87, 100)


@part
class CrossFitTasks(Suite):
    """CrossFit: few-shot tasks of 16 or 32 rows under five seeds, parted into partitions."""

    suite: Literal["crossfit"]
    """Chooses this part."""
    folder: str
    """Folder that holds a folder of TSV files for every task."""
    partition: str = "random"
    """One of CrossFit's eight partitions, or a JSON file with lists train, dev and test."""
    fold: Literal["train", "dev", "test"] = "train"
    """Which tasks of the partition; four partitions have none to test, where those of dev serve."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the fold; empty = all."""
    missing: Literal["error", "skip"] = "error"
    """What a task without a folder does."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds whose rows a task has together; few-shot jobs have one each, of `shots.seeds`."""
    test_examples: int = 10_000
    """Test rows read of a task, its first ones."""
    intake: IntakeConfig = field(default_factory=lambda: IntakeConfig(on_bad="error"))
    """Policy for unusable rows; of so few rows each counts, so that the first bad one stops."""

    generates = True
    selects_on = "held_out"

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        names = partition_names()
        if self.partition not in names and not self.partition.endswith(FILE):
            raise ConfigError(
                f"tasks.partition: CrossFit has no partition '{self.partition}'"
                f"{suggest(self.partition, names)}; there are {', '.join(names)}; or give a "
                f"{FILE} file"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"tasks.seeds: {list(self.seeds)} are not different seeds")
        if self.test_examples < 1:
            raise ConfigError(f"tasks.test_examples: {self.test_examples} is not at least 1")

    def read_tasks(self, intake: Intake) -> list[Task]:
        """Read the tasks of a fold, sorted by name."""
        self.check_source()
        names = _list_tasks(self)
        tasks = [_read_task(name, self, intake) for name in names]
        intake.check()
        return tasks

    def folders(self) -> tuple[str, ...]:
        """The folder, and the file of a partition of one's own."""
        return (self.folder, *([self.partition] if self.partition.endswith(FILE) else []))

    def more_test_rows(self) -> str:
        """A task is tested on its test rows, a training task on its dev rows."""
        return f"fill its {'dev' if self.fold == 'train' else 'test'} file"

    def more_train_rows(self) -> str:
        """Shots are the rows of a seed's file."""
        return "fill its train file"

    def target_choice(self) -> str:
        """One of a row's outputs, drawn each time, as in the reference."""
        return "random"

    def only(self, task: str) -> Self:
        """Read this task's files alone."""
        return replace(self, tasks=(task,))

    def at_seed(self, seed: int) -> Self:
        """The files of this seed."""
        return replace(self, seeds=(seed,))

    def check_few_shot(self, shots: ShotsConfig) -> None:
        """Raise `ConfigError` for tasks that were trained on."""
        Suite.check_few_shot(self, shots)
        if self.fold == "train":
            raise ConfigError(
                "tasks.fold: train tasks were trained on; the few-shot tasks of suite crossfit "
                "are fold: test (or dev)"
            )

    def draw_shots(self, task: Task, shots: ShotsConfig, *, seed: int) -> FewShotTask:
        """The train rows of the seed's file, in its order."""
        return self.take_shots(task, task.train, shots, seed=seed)


def _list_tasks(config: CrossFitTasks) -> list[str]:
    """The names of the tasks to read; raises `DataError` for those that are not there."""
    partition, folder = open_partition(config.partition), Path(config.folder)
    listed = partition.tasks(config.fold)
    if not listed:
        raise DataError(f"{partition.source}: no task in {config.fold}; name another tasks.fold")
    names = sorted(set(config.tasks or listed))
    unknown = [name for name in names if name not in listed]
    if unknown:
        raise DataError(
            f"tasks.tasks: {len(unknown)} task(s) not in {config.fold} of {partition.source}: "
            f"{some(unknown)}{suggest(unknown[0], sorted(listed))}"
        )
    if config.fold != "train" and partition.in_both:
        log.warning(
            "%s trains on %d of the tasks that it tests: %s",
            partition.source,
            len(partition.in_both),
            some(partition.in_both),
        )
    missing = [name for name in names if not (folder / name).is_dir()]
    present = [name for name in names if name not in missing]
    if missing and (config.missing == "error" or not present):
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        way_out = " or set tasks.missing: skip" if present else ""
        raise DataError(
            f"{folder}: {len(missing)} task(s) without a folder: {some(missing)}"
            f"{suggest(missing[0], there)}; add them{way_out}"
        )
    if missing:
        log.warning("%d task(s) skipped, no folder: %s", len(missing), some(missing))
    return present


def _read_task(name: str, config: CrossFitTasks, intake: Intake) -> Task:
    """A task with the rows of all its seeds; raises `DataError` without a train or a dev row."""
    rows: dict[str, list[Example]] = {"train": [], "dev": [], "test": []}
    for seed in config.seeds:
        prefix = _find_prefix(Path(config.folder) / name, name, seed)
        for fold in ("train", "dev"):
            path = Path(f"{prefix}_{fold}.tsv")
            found = list(_read_rows(path, f"{seed}_{fold}", name, config, intake))
            if not found:
                raise DataError(
                    f"task {name}: no {fold} row under seed {seed}: {path} holds none"
                    f"{intake.describe_refused(name)}; give it some, or leave the task out"
                )
            rows[fold] += found
        if config.fold != "train" and not rows["test"]:
            path = Path(f"{prefix}_test.tsv")
            read = _read_rows(path, "test", name, config, intake)
            rows["test"] += islice(read, config.test_examples)
    return Task(
        name=name,
        train=tuple(rows["train"]),
        validation=tuple(rows["dev"]),
        test=tuple(rows["test"]),
        metric=OURS[metric_of(name)],
    )


def _find_prefix(folder: Path, name: str, seed: int) -> Path:
    """What the files of a task under a seed begin with: `<folder>/<task>_<k>_<seed>`."""
    pattern = re.compile(rf"({re.escape(name)}_\d+_(\d+))_train\.tsv")
    stems: dict[int, list[str]] = defaultdict(list)
    for match in filter(None, (pattern.fullmatch(path.name) for path in folder.iterdir())):
        stems[int(match[2])].append(match[1])
    if not stems[seed]:
        known = ", ".join(str(other) for other in sorted(stems) if stems[other]) or "none"
        raise DataError(
            f"{folder}: no file {name}_<k>_{seed}_train.tsv; seeds there: {known}; name them in "
            "tasks.seeds (few-shot: shots.seeds)"
        )
    if len(stems[seed]) > 1:
        listed = ", ".join(sorted(f"{stem}_train.tsv" for stem in stems[seed]))
        raise DataError(f"{folder}: two numbers of shots of one seed: {listed}; keep one of them")
    return folder / stems[seed][0]


def _read_rows(
    path: Path, prefix: str, name: str, config: CrossFitTasks, intake: Intake
) -> Iterator[Example]:
    """The usable rows of a file; `prefix` stands before a row's number in its id."""
    blank = "" if config.chat else " "
    try:
        with path.open("rb") as lines:
            for number_of_line, raw in enumerate(lines, start=1):
                place = Place(file=str(path), line=number_of_line)
                text = raw.decode("utf-8-sig", errors="replace").strip()
                if not text:
                    continue
                source, *outputs = (cell.strip() for cell in text.split("\t"))
                problem = _find_problem(raw, source, outputs, name, config.intake)
                if problem is not None:
                    intake.refuse(place=place, task=name, reason=problem, text=text)
                    continue
                intake.take()
                yield Example(
                    id=f"{prefix}:{number_of_line}",
                    input=f"{blank}[{name}] {source}",
                    targets=tuple(blank + output for output in outputs),
                    place=place,
                )
    except FileNotFoundError as error:
        fold = path.stem.rpartition("_")[2]
        raise DataError(
            f"task {name}: no {fold} rows: {path} is not there; add the file, or leave the task out"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _find_problem(
    raw: bytes, source: str, outputs: list[str], name: str, policy: IntakeConfig
) -> str | None:
    """Say why a row cannot be used, or nothing."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"bad UTF-8 at byte {error.start + 1}: {error.reason}"
    if not outputs:
        return "1 column, expected an input and one or more outputs, separated by tabs"
    return policy.find_empty(source, outputs) or reference_problem(OURS[metric_of(name)], outputs)
