"""Tasks from the user's own rows: JSON lines, or tables (CSV, TSV, Parquet) of the same fields.

Three layouts are accepted, also side by side in one folder; `<fold>` is `train`, `validation` (or
`dev`, another name for it) or `test`, and only `train` is required. The ending is `.jsonl`, `.csv`,
`.tsv` or `.parquet`:

    <folder>/<task>/<fold>.jsonl    a row without `task` belongs to the task the folder names
    <folder>/<fold>.jsonl           every row names its `task`
    <folder>/<fold>/<any>.jsonl     every row names its `task`

JSON lines are UTF-8, one object a line, blank lines and a byte order mark allowed. A file of these
endings in any other place (but for a table beside the tasks), or one without a usable row, is an
error; so is a fold in two formats. Other files are named in one warning, but for hidden ones,
READMEs and licences. Fold names cannot be task names.

Fields of a row: `input` and `target` (strings, required); `task`, `id`, `prompt` (strings),
`targets` (all accepted references; `target` comes first whether it is listed or not), `choices`
(strings, at least two different ones, the target among them), `label` (index of the target in
`choices`; derived where absent) and `meta` (an object, not read). `tasks.fields` gives the names of
fields in the files where they are others, such as FLAN's `inputs`, `targets` and `task_name`. In
CSV and TSV, cells of `targets`, `choices`, `label`, `meta` and `messages` hold JSON. An optional
field that is null, or an empty cell, counts as absent. Texts are kept as they are, white space
included; nothing is converted to a string. A row without an `id` gets `<file stem>:<line>`, or
`<path below the folder, no suffix>:<line>` where the folder does not name its task, so that ids are
unique in a task over all its folds. Rows of one `id` and several `prompt`s are one raw row under
several prompts: where few-shot examples are drawn or rows are set aside, they count once and stay
together.

Under `tasks.chat: true` a row may have `messages` in place of `input` and `target`: a list of turns
with a `role` (system, first or not at all; user; assistant; tool) and a `content`. Every turn of
the assistant becomes an example, conditioned on all turns before it (`messages`).

A task without a single validation row sets some of its training rows aside.
`<folder>/tasks.yaml` may give `cap`, `weight`, `metric` and `max_input_tokens` by task. The default
metric is accuracy where every row of a task has choices, rougeL elsewhere; the evaluate library's
are `evaluate:NAME_OR_FOLDER`, with `metric_options` (`loaded_metrics`).
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mhr_scale.errors import ConfigError, DataError, did_you_mean, first_line, some, suggest
from mhr_scale.recipe import strict_yaml
from mhr_scale.recipe.part import part
from mhr_scale.recipe.typed import build
from mhr_scale.tasks.jsonl_rows import (
    FIELDS,
    REQUIRED,
    STRUCTURED,
    find_problem,
    make_examples,
    rename,
    warn_unknown,
)
from mhr_scale.tasks.loaded_metrics import PREFIX, MetricOptions
from mhr_scale.tasks.metrics import METRICS
from mhr_scale.tasks.suite import Suite
from mhr_scale.tasks.tabular import ENDINGS, iter_file
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Place, Task, hold_out

log = logging.getLogger("mhr_scale")

FOLDS = {"train": "train", "validation": "validation", "dev": "validation", "test": "test"}
LAYOUTS = (
    "expected <task>/train.jsonl, or train.jsonl or train/*.jsonl with a 'task' field in every row "
    "(or .csv, .tsv, .parquet)"
)
#: Beginnings of the names of files that nobody expects to be read.
ABOUT = ("readme", "license", "licence")
OPTIONS = ("cap", "weight", "metric", "metric_options", "max_input_tokens")

Rows = dict[str, dict[str, list[Example]]]  # task -> fold -> examples


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldFile:
    """A file of rows of one fold; `task` is the one its rows belong to by default."""

    path: Path
    fold: str
    task: str | None


@part
class JsonlTasks(Suite):
    """Your own rows (JSONL, CSV, TSV, Parquet): a file per task and fold, or one for all tasks."""

    suite: Literal["jsonl"]
    """Chooses this part."""
    folder: str
    """Folder with the files, and optionally `tasks.yaml` (cap, weight, metric per task)."""
    fields: dict[str, str] = field(default_factory=dict)
    """What the files call a field, where it is another name: {input: inputs, target: targets, task:
    task_name} reads FLAN's rows."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty = all."""
    validation_examples: int = 100
    """Rows per task set aside where no `validation.jsonl` exists (at most a tenth of the task)."""
    seed: int = 42
    """Seed of that choice."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        for ours, theirs in self.fields.items():
            if ours not in FIELDS:
                known = f"{did_you_mean(ours, FIELDS)}; known: {', '.join(FIELDS)}"
                raise ConfigError(f"tasks.fields: a row has no field '{ours}'{known}")
            if list(self.fields.values()).count(theirs) > 1:
                raise ConfigError(f"tasks.fields: '{theirs}' stands for two fields; name one")

    lends_validation = True
    selects_on = "held_out"

    def read_tasks(self, intake: Intake) -> list[Task]:
        """Read every task below `folder`, sorted by name."""
        self.check_source()
        folder = Path(self.folder)
        files = _find_files(folder)
        options_file = folder / "tasks.yaml"
        options = _load_options(options_file)
        rows, left_out = _read_rows(files, config=self, intake=intake)
        intake.check()
        lost = {reject.task: None for reject in intake.rejects if reject.task != "?"}
        for name in lost.keys() - rows.keys():
            refused = intake.describe_refused(name)
            raise DataError(f"{folder}: no usable row of task {name!a}{refused}; mend its rows")
        known = sorted({*rows, *left_out})
        for place, names in ((options_file, options), ("tasks.tasks", self.tasks)):
            for name in sorted(set(names).difference(known)):
                raise DataError(f"{place}: no task '{name}' in {folder}{suggest(name, known)}")
        return [
            _make_task(name, folds, options=options.get(name, {}), config=self)
            for name, folds in sorted(rows.items())
        ]

    def more_test_rows(self) -> str:
        """Test rows are the user's to give."""
        return f"add its rows to a test.jsonl in {self.folder}"

    def more_train_rows(self) -> str:
        """Training rows are the user's to give."""
        return (
            "add rows to its train.jsonl (some of them may be set aside for validation, see "
            "tasks.validation_examples)"
        )


def _find_files(folder: Path) -> list[FoldFile]:
    """List the files of rows, training ones first, so that a duplicate is the held-out row."""
    files, unread = [], []
    for path in (path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth)):
        inner = path.relative_to(folder)
        if any(part.startswith(".") for part in inner.parts) or not path.is_file():
            continue
        file = _place(path, inner) if path.suffix.lower() in ENDINGS else None
        if file is not None:
            files.append(file)
        elif str(inner) != "tasks.yaml" and not path.name.lower().startswith(ABOUT):
            unread.append(str(inner))
    if not files:
        there = f" (there are: {some(sorted(unread))})" if unread else ""
        raise DataError(f"{folder}: no file of rows{there}; {LAYOUTS}")
    if unread:
        log.warning(
            "%s: %d file(s) not read: %s; move them away, or name them as the rows of a fold",
            folder,
            len(unread),
            some(sorted(unread)),
        )
    _check_formats(files)
    order = list(FOLDS.values())
    return sorted(files, key=lambda file: (order.index(file.fold), file.path))


def _place(path: Path, inner: Path) -> FoldFile | None:
    """Which fold, and whose, a file of rows is; None for a table beside the tasks."""
    if not str(inner).isprintable():
        raise DataError(f"{path}: a name that is not printable UTF-8; rename it")
    *above, _ = inner.parts
    if len(above) > 1:
        raise DataError(f"{path}: lies too deep; {LAYOUTS}")
    if above and above[0] in FOLDS:
        return FoldFile(path=path, fold=FOLDS[above[0]], task=None)
    if path.stem in FOLDS:
        return FoldFile(path=path, fold=FOLDS[path.stem], task=above[0] if above else None)
    if not above and path.suffix.lower() != ".jsonl":
        return None
    raise DataError(
        f"{path}: '{path.stem}' is not a fold{did_you_mean(path.stem, FOLDS)}; name the file "
        f"{', '.join(f'{fold}{path.suffix}' for fold in FOLDS)}, or move it away"
    )


def _check_formats(files: list[FoldFile]) -> None:
    """Raise `DataError` for the same rows in two formats."""
    stems: dict[Path, Path] = {}
    for file in files:
        first = stems.setdefault(file.path.with_suffix(""), file.path)
        if first != file.path:
            raise DataError(f"{file.path}: stands beside {first.name}; keep one of them")


def _read_rows(
    files: list[FoldFile], *, config: JsonlTasks, intake: Intake
) -> tuple[Rows, set[str]]:
    """The rows of the tasks asked for, and the names of the others."""
    rows: Rows = defaultdict(lambda: {fold: [] for fold in FOLDS.values()})
    places: dict[str, dict[str, Place]] = defaultdict(dict)
    left_out: set[str] = set()
    for file in files:
        taken, refused, n_left_out = intake.taken, len(intake.rejects), 0
        inner = file.path.relative_to(config.folder).with_suffix("").as_posix()
        warned: set[str] = set()
        lines = iter_file(
            file.path,
            task=file.task or "?",
            intake=intake,
            structured=[config.fields.get(name, name) for name in STRUCTURED],
            texts=[config.fields.get(name, name) for name in REQUIRED],
        )
        for line in (rename(line, config.fields) for line in lines):
            warn_unknown(line, warned)
            named = line.row.get("task")
            task = named if isinstance(named, str) else file.task or "?"
            if config.tasks and task not in ("?", *config.tasks):
                left_out.add(task)
                n_left_out += 1
                continue
            problem = find_problem(
                line.row,
                names=config.fields,
                fold=file.fold,
                has_task=file.task is not None,
                in_chat=config.chat,
                policy=config.intake,
            )
            examples = []
            if problem is None:
                prefix = file.path.stem if task == file.task else inner
                examples = make_examples(line, default_id=f"{prefix}:{line.place.line}")
            for example in examples:
                first = places[task].setdefault(example.id, line.place)
                if first is not line.place:
                    problem = f"duplicate id {example.id!a}, first at {first}"
            if problem is None:
                rows[task][file.fold] += examples
                intake.take()
            else:
                intake.refuse(place=line.place, task=task, reason=problem, text=line.text)
        if intake.taken == taken and not n_left_out:
            bad = intake.rejects[refused:]
            why = f" (line {bad[0].place.line}: {bad[0].reason})" if bad else ""
            raise DataError(f"{file.path}: no usable row{why}; mend the file or remove it")
    return dict(rows), left_out


def _make_task(
    name: str, folds: dict[str, list[Example]], *, options: dict[str, Any], config: JsonlTasks
) -> Task:
    train, validation = tuple(folds["train"]), tuple(folds["validation"])
    every = [*train, *validation, *folds["test"]]
    if not validation:
        train, validation = hold_out(
            train, most=config.validation_examples, seed=config.seed, name=name
        )
    metric = "accuracy" if all(example.choices for example in every) else "rougeL"
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=tuple(folds["test"]),
        **{"metric": metric, **options},
    )


def _load_options(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    tasks, places = strict_yaml.read_file(path, error=DataError)
    made = {}
    for name, options in tasks.items():
        where = f"{places[(name,)]}: {name}"
        if not isinstance(options, dict):
            raise DataError(f"{where}: expected a mapping of {', '.join(OPTIONS)}")
        made[name] = _checked_options(options, where=where)
    return made


def _checked_options(options: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in options.items():
        if key not in OPTIONS:
            known = f"{did_you_mean(str(key), OPTIONS)}; known: {', '.join(OPTIONS)}"
            raise DataError(f"{where}: unknown key '{key}'{known}")
        if key == "metric_options":
            made[key] = _checked_metric_options(value, options.get("metric"), where=where)
            continue
        if key == "metric":
            hint = did_you_mean(str(value), METRICS)
            wanted = f"a metric{hint}; known: {', '.join(METRICS)}, {PREFIX}NAME_OR_FOLDER"
            is_loaded = isinstance(value, str) and len(value) > len(PREFIX)
            is_valid = value in METRICS or (is_loaded and value.startswith(PREFIX))
        elif key == "weight":
            wanted = "a finite number above 0"
            is_valid = type(value) in (int, float) and 0 < value < math.inf
        else:
            wanted = "a whole number above 0"
            is_valid = type(value) is int and value > 0
        if not is_valid:
            raise DataError(f"{where}: {key}: {value!r} is not {wanted}")
        made[key] = value
    return made


def _checked_metric_options(options: Any, metric: Any, *, where: str) -> MetricOptions:
    if not str(metric).startswith(PREFIX):
        raise DataError(f"{where}: metric_options: only a metric '{PREFIX}NAME_OR_FOLDER' has some")
    try:
        return build(MetricOptions, options, name="metric_options")
    except TypeError as error:
        known = ", ".join(item.name for item in fields(MetricOptions))
        raise DataError(f"{where}: {first_line(error)}; known: {known}") from error
