"""The canonical example, the task that holds it, and the report of rows that were refused.

Every reader (toy, SuperNI, JSONL, P3) turns its own format into these values and nothing else, so
that mixtures, collators and evaluators never know where a row came from.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mhr_scale.errors import DataError
from mhr_scale.recipe.part import part
from mhr_scale.run.files import hash_parts, to_json_lines
from mhr_scale.tasks.loaded_metrics import MetricOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a row came from: a file and its line (JSONL) or its row (JSON arrays, tables)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side of a conversation says: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One text-to-text example.

    `targets` holds every accepted reference, the first one being the default training target.
    `choices` and `label` (an index into `choices`) are there where answers are ranked. `prompt`
    names the prompt of a raw row that has several; then the id is `<raw row>/<prompt>`.

    In a conversation `history` are the turns before the input, which is what `role` says, and the
    targets are what the assistant answers.
    """

    id: str
    input: str
    targets: tuple[str, ...]
    choices: tuple[str, ...] = ()
    label: int | None = None
    place: Place | None = None
    prompt: str = ""
    history: tuple[Turn, ...] = ()
    role: str = "user"

    @property
    def raw_id(self) -> str:
        """The id of the raw row, the same one under all its prompts."""
        return self.id.removesuffix(f"/{self.prompt}") if self.prompt else self.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Inputs stand in the tokenizer's chat template, behind this system text if there is one."""

    system: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named list of training examples, with held-out examples of the same task.

    `suffix` is an ending every input shares and that must survive a cut (SuperNI's `Output:`): an
    input that is too long loses tokens in front of it. `max_input_tokens` overrides the batch's.
    `metric` names what evaluation reports, with `metric_options` for one of the evaluate library;
    `cap` and `weight` steer the mixture. `chat` is the suite's to say.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    metric: str = "rougeL"
    metric_options: MetricOptions | None = None
    cap: int | None = None
    weight: float | None = None
    max_input_tokens: int | None = None
    suffix: str = ""
    chat: Chat | None = None


@part
class IntakeConfig:
    """What readers do with rows they cannot use."""

    on_bad: Literal["reject", "error", "skip"] = "reject"
    """reject: write down, stop above max(10, 0.1 %); error: stop at the first; skip: never stop."""
    empty_target: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty target is refused or trains the end-of-sequence token."""
    empty_input: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty input is refused."""

    def find_empty(self, text: str, targets: Iterable[str]) -> str | None:
        """Why a row of these texts is refused, if it is; white space alone is empty."""
        if self.empty_input == "reject" and not text.strip():
            return "empty input"
        if self.empty_target == "reject" and not all(target.strip() for target in targets):
            return "empty target"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A refused row: where it stood, why, and its first 200 characters."""

    place: Place
    task: str
    reason: str
    text: str


@dataclass(slots=True)
class Intake:
    """Counts what a reader took and refused, and decides when there is too much of the latter.

    The policy `on_bad`: `reject` refuses a row, writes it down and goes on, and stops once more
    than `max(10, 0.1 %)` of the rows are refused; `error` stops at the first one; `skip` never
    stops.
    """

    on_bad: str = "reject"
    taken: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def take(self) -> None:
        """Count one accepted row."""
        self.taken += 1

    def refuse(self, *, place: Place, task: str, reason: str, text: str) -> None:
        """Record one refused row; raises `DataError` at once under `on_bad: error`."""
        if self.on_bad == "error":
            raise DataError(f"{place}: {reason} (task {task}); mend the row or set on_bad: reject")
        self.rejects.append(Reject(place=place, task=task, reason=reason, text=text[:200]))

    @staticmethod
    def is_too_much(refused: int, total: int) -> bool:
        """Whether so many refused rows stop a reader that may refuse some."""
        return refused > max(10, total // 1000)

    def check(self) -> None:
        """Raise `DataError` if too many rows were refused; names the first of them."""
        total = self.taken + len(self.rejects)
        if self.on_bad == "skip" or not self.is_too_much(len(self.rejects), total):
            return
        first = self.rejects[0]
        raise DataError(
            f"{len(self.rejects)} of {total} rows refused, first {first.place}: {first.reason}; "
            "mend the data or set on_bad: skip"
        )

    def describe_refused(self, task: str) -> str:
        """How many rows of a task were refused and why the first was, in brackets; '' if none."""
        refused = [reject for reject in self.rejects if reject.task == task]
        if not refused:
            return ""
        return f" ({len(refused)} refused, first {refused[0].place}: {refused[0].reason})"

    def rows(self) -> list[dict[str, str]]:
        """The refused rows as plain values."""
        return [{**asdict(reject), "place": str(reject.place)} for reject in self.rejects]

    def write(self, path: Path) -> None:
        """Write the refused rows as JSON lines."""
        path.write_text(to_json_lines(self.rows(), ensure_ascii=False), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class TaskStream:
    """A known number of tasks, read one after the other: large suites never lie in memory whole."""

    n_tasks: int
    read: Callable[[], Iterator[Task]]

    def __len__(self) -> int:
        return self.n_tasks

    def __iter__(self) -> Iterator[Task]:
        return self.read()


def hold_out(
    rows: Sequence[Example], *, most: int, seed: int, name: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training rows, and those set aside for validation: `most`, and at most a tenth of all.

    Raw rows are counted, and a raw row is set aside with all its prompts.
    """
    groups = group_raw(rows)
    count = min(most, len(groups) // 10)
    chosen = set(random.Random(f"{seed}/{name}").sample(range(len(groups)), count))
    aside = {row.raw_id for number in chosen for row in groups[number]}
    train = tuple(row for row in rows if row.raw_id not in aside)
    return train, tuple(row for row in rows if row.raw_id in aside)


def group_raw(rows: Iterable[Example]) -> list[tuple[Example, ...]]:
    """The examples of each raw row, in the order of their first ones."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.raw_id, []).append(row)
    return [tuple(group) for group in groups.values()]


def digest(examples: Iterable[Example]) -> str:
    """What tells rows apart by content: a hash of all that a model or a metric sees of them."""
    rows = (
        [
            *(example.id, example.input, example.targets, example.choices, example.label),
            *([example.role, list(map(asdict, example.history))] if example.history else ()),
        ]
        for example in examples
    )
    return hash_parts(json.dumps(row) for row in rows)[:16]


def check_not_empty(task: Task, *, refused: str = "") -> None:
    """Raise `DataError` if a task has no training example; `refused` tells of refused rows."""
    if not task.train:
        raise DataError(
            f"no training example in task {task.name}{refused}; remove the task or give it rows"
        )
