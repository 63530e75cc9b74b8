"""Raw rows of the 11 tasks that T0 holds out, in the schema of their data sets.

Rows come from the hub or from a local folder, where every one of these is a split of a task:

    <folder>/<task>.<split>.jsonl    also with words between, `<task>.<words>.<split>.jsonl`
    <folder>/<task>/<split>.jsonl    in both also `.csv`, `.tsv` and `.parquet`
    <folder>/<task>/<split>/         written by `save_to_disk` of a `Dataset` or a `DatasetDict`

A split is `train`, `validation` (or `dev`) or `test`, for ANLI also with its round (`test_r1`).
StoryCloze is handed out on request only: its test rows may also be named by `tasks.storycloze`.

Every row has a number: its field `idx`, or where there is none its line in the file from 0 (its
row, where it has no lines, and in StoryCloze's own file).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from mhr_scale.errors import ConfigError, DataError, did_you_mean, first_line
from mhr_scale.tasks.json_lines import JsonLine, kind_of
from mhr_scale.tasks.jsonl import FOLDS
from mhr_scale.tasks.tabular import ENDINGS, iter_csv, iter_file, number_rows
from mhr_scale.tasks.task import Intake, Place

Reader = Callable[[Intake], Iterator[JsonLine]]

KINDS: dict[str, type] = {"idx": int, "endings": list, "span2_index": int}
"""Types of the fields that are not text."""

STORY = tuple(f"input_sentence_{number}" for number in (1, 2, 3, 4))
STORY_COLUMNS = {
    **{f"InputSentence{number}": name for number, name in enumerate(STORY, start=1)},
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}
"""Columns of StoryCloze's CSV file, and the fields that templates know them by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """What is known about a held-out task before any row is read.

    `hub` is the data set's name on the hub, `dataset` its name in promptsource, `subset` goes with
    both; `alias` is T-Few's name of the task. Every row has the `fields` and the field of `label`,
    which comes with the number of the first choice; some have the `optional` ones. `first` keeps
    only so many templates (COPA's later ones render for one of its two kinds of question only).
    `shots` is T-Few's number of training rows, `mhr_shots` MHR's where it is another.
    """

    name: str
    hub: str | None
    dataset: str
    subset: str | None
    fields: tuple[str, ...]
    size: int
    optional: tuple[str, ...] = ()
    label: tuple[str, int] = ("label", 0)
    choices: int = 2
    train: str = "train"
    evaluation: str = "validation"
    first: int | None = None
    shots: int = 32
    mhr_shots: int | None = None
    alias: str = ""

    def evaluation_split(self, anli_split: str) -> str:
        """The split that scores the task, as on the hub; ANLI's is `test` or `dev`."""
        return self.evaluation.replace("test_", f"{anli_split}_")


def _super_glue(name: str, *fields: str, size: int, **facts: Any) -> HeldOut:
    names = {"hub": "aps/super_glue", "dataset": "super_glue", "subset": name, **facts}
    return HeldOut(name=name, fields=fields, size=size, **names)


def _anli(number: int, size: int) -> HeldOut:
    return HeldOut(
        name=f"anli-r{number}",
        hub="facebook/anli",
        dataset="anli",
        subset=None,
        fields=("premise", "hypothesis"),
        size=size,
        choices=3,
        train=f"train_r{number}",
        evaluation=f"test_r{number}",
        shots=50,
        mhr_shots=32,
    )


_ALL = (
    _super_glue("rte", "premise", "hypothesis", size=277),
    _super_glue("cb", "premise", "hypothesis", size=56, choices=3),
    _anli(1, 1000),
    _anli(2, 1000),
    _anli(3, 1200),
    _super_glue(
        "wsc", "text", "span1_text", "span2_text", "span2_index", size=104, subset="wsc.fixed"
    ),
    HeldOut(
        name="winogrande",
        hub="allenai/winogrande",
        dataset="winogrande",
        subset="winogrande_xl",
        fields=("sentence", "option1", "option2"),
        size=1267,
        label=("answer", 1),
        shots=50,
    ),
    _super_glue("copa", "premise", "choice1", "choice2", "question", size=100, first=8),
    HeldOut(
        name="hellaswag",
        hub="Rowan/hellaswag",
        dataset="hellaswag",
        subset=None,
        fields=("ctx", "endings"),
        optional=("ctx_a", "ctx_b", "activity_label"),
        size=10042,
        choices=4,
        shots=20,
        alias="h-swag",
    ),
    HeldOut(
        name="storycloze",
        hub=None,
        dataset="story_cloze",
        subset="2016",
        fields=(*STORY, "sentence_quiz1", "sentence_quiz2"),
        size=1871,
        label=("answer_right_ending", 1),
        train="validation",
        evaluation="test",
        shots=70,
    ),
    _super_glue("wic", "word", "sentence1", "sentence2", size=638),
)
TASKS = {task.name: task for task in _ALL}
"""The held-out tasks in the order of a suite. `size` counts the whole evaluation split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """A checked row before any template: its number, its label from 0, all its fields."""

    idx: int
    label: int
    fields: dict[str, Any]  # Any: whatever the data set holds beside the fields that are checked
    place: Place


def find_task(name: str) -> HeldOut:
    """Return the held-out task of a name."""
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ConfigError(f"no held-out task is called '{name}'{hint}; known: {', '.join(TASKS)}")
    return TASKS[name]


def read_rows(task: HeldOut, reader: Reader, intake: Intake) -> Iterator[RawRow]:
    """Yield the rows that can be used; the others are refused."""
    taken: set[int] = set()
    for line in reader(intake):
        try:
            row = check_row(task, line)
            if row.idx in taken:
                raise ValueError(f"duplicate idx {row.idx}")
        except ValueError as error:
            intake.refuse(place=line.place, task=task.name, reason=str(error), text=line.text)
        else:
            taken.add(row.idx)
            yield row


def check_row(task: HeldOut, line: JsonLine) -> RawRow:
    """Check a raw row, number it and read its label; a `ValueError` says what is wrong with it.

    `fields` of the result hold number and label as well, under `idx` and `label`. The field that
    the label was read from gets the type that templates expect.
    """
    fields = {name: value for name, value in line.row.items() if value is not None}
    key, lowest = task.label
    for name in (*task.fields, key):
        if name not in fields:
            raise ValueError(f"missing field '{name}'")
    for name in (*task.fields, *task.optional, "idx"):
        if name in fields:
            _check_type(name, fields[name])
    label = _read_number(key, fields[key]) - lowest
    if label < 0:
        raise ValueError("hidden label")
    choices = len(fields["endings"]) if "endings" in task.fields else task.choices
    if label >= choices:
        raise ValueError(f"'{key}' is {fields[key]!a}, out of range for {choices} choices")
    fields[key] = str(label + lowest) if key == "answer" else label + lowest
    idx = fields.setdefault("idx", line.place.line - 1)
    return RawRow(idx=idx, label=label, fields={**fields, "label": label}, place=line.place)


def _check_type(name: str, value: object) -> None:
    kind = KINDS.get(name, str)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "an integer" if kind is int else kind_of(kind())
        raise ValueError(f"'{name}' is {kind_of(value)}, expected {wanted}")
    if isinstance(value, list):
        for entry in value:
            if not isinstance(entry, str):
                raise ValueError(f"'{name}' holds {kind_of(entry)}, expected strings only")


def _read_number(name: str, value: object) -> int:
    """Read a label from an integer or from text, an empty text being a hidden label."""
    if value == "":
        return -1
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"'{name}' is {value!a}, expected a whole number")
    return value


def open_storycloze(path: Path) -> Reader:
    """Return what reads the file of StoryCloze's test rows that a recipe names."""
    if not path.is_file():
        raise DataError(f"tasks.storycloze: {path}: no such file")
    read = _read_story if path.suffix.lower() == ".csv" else _read_file
    return partial(read, path, TASKS["storycloze"])


def find_rows(task: HeldOut, split: str, *, folder: Path | None) -> Reader | None:
    """Return what reads the raw rows of a split, if they are there; no folder = the hub."""
    if folder is None:
        return partial(_read_hub, task, split) if task.hub else None
    wanted = _fold(task, split)
    paths = [path for path in _list_local(task, folder) if _fold(task, path.name) == wanted]
    if len(paths) > 1:
        names = " and ".join(str(path) for path in paths)
        raise DataError(f"{names} are the same split of {task.name}; keep one of them")
    if not paths:
        return None
    if paths[0].is_dir():
        return lambda _intake: read_saved(paths[0])
    return partial(_read_file, paths[0], task)


def what_is_there(task: HeldOut, split: str, *, folder: Path | None) -> str:
    """Say which split of a task is wanted and what there is instead."""
    names = ", ".join(path.name for path in _list_local(task, folder)) if folder else ""
    return f"{task.name} ({split} wanted, {names or 'nothing'} there)"


def _fold(task: HeldOut, name: str) -> str | None:
    """Return the fold that the last word of a file name tells, `dev_r1` being ANLI r1's dev."""
    stem = next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)
    word = stem.rpartition(".")[2]
    return FOLDS.get(word.removesuffix(f"_{task.name.rpartition('-')[2]}"))


def _list_local(task: HeldOut, folder: Path) -> list[Path]:
    """List the files and saved folders of a task, whatever their split."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set tasks.folder")
    paths: set[Path] = set()
    for name in filter(None, (task.name, task.alias)):
        for pattern, ending in product(("{}", "{}.*", "{}/*"), ENDINGS):
            paths.update(folder.glob(pattern.format(name) + ending))
        for pattern in ("{}/dataset_info.json", "{}/*/dataset_info.json"):
            paths.update(path.parent for path in folder.glob(pattern.format(name)))
    return sorted(paths)


def _read_file(path: Path, task: HeldOut, intake: Intake) -> Iterator[JsonLine]:
    return iter_file(path, task=task.name, intake=intake, structured=KINDS, texts=())


def _read_story(path: Path, task: HeldOut, intake: Intake) -> Iterator[JsonLine]:
    """StoryCloze's CSV file, by the fields that templates know."""
    lines = list(iter_csv(path, task=task.name, intake=intake))
    columns = lines[0].row.keys() if lines else set()
    if absent := sorted(STORY_COLUMNS.keys() - columns):
        raise DataError(f"{path}: not StoryCloze's file, no column {', '.join(absent)}")
    for number, line in enumerate(lines):
        row = {STORY_COLUMNS.get(key, key): cell for key, cell in line.row.items()}
        yield JsonLine(place=line.place, text=line.text, row={**row, "idx": number})


def read_saved(path: Path) -> Iterator[JsonLine]:
    """Yield the rows of what `save_to_disk` of a `Dataset` wrote."""
    from datasets import load_from_disk

    try:
        rows: Any = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from error
    return number_rows(rows, source=str(path))


def _read_hub(task: HeldOut, split: str, intake: Intake) -> Iterator[JsonLine]:
    from datasets import load_dataset

    name = "/".join(filter(None, (task.hub, task.subset)))
    try:
        rows = load_dataset(task.hub, task.subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: no split '{split}' from the hub ({first_line(error)}); mend the connection "
            "or set tasks.source: local"
        ) from error
    return number_rows(rows, source=f"{name}/{split}")
