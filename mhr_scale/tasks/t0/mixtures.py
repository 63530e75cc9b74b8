"""The training mixtures of T0: which prompts of P3 they hold, and how many rows of each count.

T0 has 313 prompts of 38 data sets, T0+ adds the data sets of GPT-3's evaluation (392 prompts), T0++
those of SuperGLUE (464); `t0_mixture.json` lists them. A task is one prompt, as MHR trains, or one
data set with all its prompts. Two rules cap a prompt of a data set with n prompts:

    t_few    min(size, 500000 // n)                          MHR and T-Few; 10,606,443 rows of T0
    t_zero   500000 // n if size > 500000, else size         T0 itself; 17,277,798 rows of T0

`size` is the size of the data set's training split; P3 holds fewer rows of a prompt that was not
written for all of them. The cap is a share of an epoch, and all rows of a prompt are read, so that
later epochs walk on through a capped task. MHR and T-Few repeat a prompt's first rows, as many as
its cap, every epoch: `max_rows: cap` with `mixture.first_rows: true`. A number above the cap gives
the mixture so many rows to walk through at the same share; below the cap the share is smaller too.

Rows are P3's, or with `templates` rendered from the raw rows of the data sets.

Validation rows are set aside from the training rows that were read, at most a tenth of a task.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from mhr_scale.errors import ConfigError, DataError, some, suggest
from mhr_scale.recipe.part import part
from mhr_scale.run.runlog import log
from mhr_scale.tasks.suite import Suite
from mhr_scale.tasks.t0 import p3, prompted
from mhr_scale.tasks.t0.prompts import Prompter, config_name
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Task, TaskStream, hold_out

TABLE = Path(__file__).parent / "t0_mixture.json"
MIXTURES = ("T0", "T0+", "T0++")
MOST_ROWS = 500_000
SPLIT = "train"


@part
class T0Tasks(Suite):
    """The T0 training mixtures, from P3 or from raw data sets and their templates."""

    suite: Literal["t0"]
    """Chooses this part."""
    source: str = "bigscience/P3"
    """P3 (hub id, or a folder of parquet, saved or JSONL); with `templates`, `hub` or raw rows."""
    templates: str | None = None
    """Folder of promptsource templates that render the raw rows of `source`; null = P3."""
    empty_render: Literal["drop", "placeholder"] = "drop"
    """With `templates`: a row that renders empty is left out, or trained on as T-Few does."""
    max_characters: int | None = 2048
    """With `templates`: characters kept of every field that a template inserts; null = all."""
    mixture: Literal["T0", "T0+", "T0++"] = "T0"
    """Which training mixture (313, 392 or 464 prompts)."""
    unit: Literal["prompt", "dataset"] = "prompt"
    """Whether a task is one prompt (313 in T0) or one data set with all its prompts (38)."""
    tasks: tuple[str, ...] = ()
    """Only these prompts, by their P3 names, or all prompts of these data sets; empty = all."""
    missing: Literal["error", "skip"] = "error"
    """What a prompt (with `templates`: a data set) that the source lacks does."""
    cap_rule: Literal["t_few", "t_zero", "none"] = "t_few"
    """Rows of a prompt that count: T-Few's and MHR's rule, T0's own, or all."""
    max_rows: int | Literal["cap"] | None = None
    """Rows read of a prompt, its first ones; null = all, cap = as many as count in one epoch."""
    validation_examples: int = 100
    """Rows set aside per task for validation (at most a tenth of the task)."""
    seed: int = 42
    """Seed of that choice, and of templates that choose their wording."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        if isinstance(self.max_rows, int) and self.max_rows < 1:
            raise ConfigError(f"tasks.max_rows: {self.max_rows} is not at least 1")
        if self.max_characters is not None and self.max_characters < 1:
            raise ConfigError(f"tasks.max_characters: {self.max_characters} is not at least 1")
        if self.templates is not None and self.source == "bigscience/P3":
            raise ConfigError(
                f"tasks.source: {self.source} is rendered already; with tasks.templates give hub "
                "or a folder of raw rows"
            )
        if self.validation_examples < 0:
            raise ConfigError(f"tasks.validation_examples: {self.validation_examples} is below 0")

    evaluates = False

    def read_tasks(self, intake: Intake) -> TaskStream:
        """Check that the prompts of a mixture are there; then read task by task, by name."""
        wanted = _choose(self)
        source = _open_source(self, wanted)
        units: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in _present(wanted, source, self):
            units[prompt.name if self.unit == "prompt" else prompt.dataset].append(prompt)

        def read() -> Iterator[Task]:
            for name in sorted(units):
                yield _read_task(name, units[name], source=source, config=self, intake=intake)

        return TaskStream(len(units), read)

    def check_source(self) -> None:
        """Raise `DataError` for a source that is a path and not there."""
        if self.source.startswith((".", "/", "~")) and not Path(self.source).expanduser().is_dir():
            raise DataError(f"tasks.source: no folder '{self.source}' (looked in {Path.cwd()})")

    def folders(self) -> tuple[str, ...]:
        """The source, if it is one, and the templates."""
        return (self.source, *filter(None, (self.templates,)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt of a mixture: its config in P3, and what its cap follows from.

    `dataset` is the name of the task where a data set is one; `raw` names the same data set as
    promptsource does, `<dataset>[/<subset>]`.
    """

    name: str
    dataset: str
    raw: str
    train_size: int
    n_prompts: int

    def cap(self, rule: str) -> int | None:
        """Rows that count in one epoch under a rule; None = all of them."""
        share = MOST_ROWS // self.n_prompts
        if rule == "t_few":
            return min(self.train_size, share)
        if rule == "t_zero":
            return share if self.train_size > MOST_ROWS else self.train_size
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where rows come from. A prompt is there if what it `needs` is, be it a config or a data set.

    `read` gives the examples of a prompt, like `p3.read_examples`; `around` helps to find a mistake
    in the name of the source.
    """

    name: str
    what: str
    needs: Callable[[Prompt], str]
    there: Collection[str]
    around: str
    read: Callable[..., list[Example]]


def list_prompts(mixture: str) -> list[Prompt]:
    """All prompts of a mixture, sorted by name."""
    levels = MIXTURES[: MIXTURES.index(mixture) + 1]
    prompts = []
    for entry in json.loads(TABLE.read_text(encoding="utf-8"))["datasets"]:
        if entry["mixture"] not in levels:
            continue
        dataset, subset = entry["dataset"], entry["subset"]
        prompts += [
            Prompt(
                name=config_name(dataset, subset, template),
                dataset=dataset if subset is None else config_name(dataset, None, subset),
                raw=dataset if subset is None else f"{dataset}/{subset}",
                train_size=entry["train_size"],
                n_prompts=len(entry["templates"]),
            )
            for template in entry["templates"]
        ]
    return sorted(prompts, key=lambda prompt: prompt.name)


def _choose(config: T0Tasks) -> list[Prompt]:
    prompts = list_prompts(config.mixture)
    known = {name for prompt in prompts for name in (prompt.name, prompt.dataset)}
    unknown = sorted(set(config.tasks) - known)
    if unknown:
        raise DataError(
            f"tasks.tasks: no prompt or data set of mixture {config.mixture} is called "
            f"{', '.join(unknown)}{suggest(unknown[0], sorted(known))}"
        )
    if not config.tasks:
        return prompts
    return [p for p in prompts if p.name in config.tasks or p.dataset in config.tasks]


def _open_source(config: T0Tasks, prompts: Sequence[Prompt]) -> _Source:
    """Open P3 or, with templates, the raw rows that they render."""
    if config.templates is None:
        rendered = p3.open_source(config.source, setting="tasks.source")
        return _Source(
            name=rendered.name,
            what="prompts",
            needs=lambda prompt: prompt.name,
            there=[name for name, splits in rendered.splits.items() if SPLIT in splits],
            around=f"there are: {some(sorted(rendered.splits))}",
            read=partial(p3.read_examples, rendered, split=SPLIT),
        )
    raw = prompted.open_source(
        config.source,
        {prompt.name: prompt.raw for prompt in prompts},
        templates=Path(config.templates),
        prompter=Prompter(
            max_characters=config.max_characters,
            seed=config.seed,
            empty_render=config.empty_render,
        ),
    )
    is_hub = raw.name == prompted.HUB
    # A row's number alone would stand once per prompt in the task of a data set.
    read = partial(prompted.read_examples, raw, with_template=config.unit == "dataset")
    return _Source(
        name=raw.name,
        what="data sets",
        needs=lambda prompt: prompt.raw,
        there=raw.rows.keys(),
        around="the warnings say why" if is_hub else f"looked for {prompted.LOOKED_FOR}",
        read=read,
    )


def _present(prompts: Sequence[Prompt], source: _Source, config: T0Tasks) -> list[Prompt]:
    """Leave out the prompts that the source lacks, or raise `DataError` naming what it lacks."""
    needed = {source.needs(prompt) for prompt in prompts}
    missing = sorted(needed.difference(source.there))
    share = f"{len(missing)} of {len(needed)} {source.what} without a split '{SPLIT}'"
    if len(missing) == len(needed):
        raise DataError(
            f"{source.name}: {share}, such as {missing[0]}; {source.around}; set tasks.source"
        )
    if missing:
        log.warning("%s: %s: %s", source.name, share, ", ".join(missing))
    if missing and config.missing == "error":
        raise DataError(
            f"{source.name}: {share}: {some(missing)}; add them, name the others in "
            "tasks.tasks, or set tasks.missing: skip"
        )
    return [prompt for prompt in prompts if source.needs(prompt) not in missing]


def _read_task(
    name: str, prompts: Sequence[Prompt], *, source: _Source, config: T0Tasks, intake: Intake
) -> Task:
    rows: list[Example] = []
    caps: list[int] = []
    for prompt in prompts:
        cap = prompt.cap(config.cap_rule)
        caps += [] if cap is None else [cap]
        max_rows = cap if config.max_rows == "cap" else config.max_rows
        rows += source.read(prompt.name, max_rows=max_rows, policy=config.intake, intake=intake)
    train, validation = hold_out(rows, most=config.validation_examples, seed=config.seed, name=name)
    return Task(
        name=name,
        train=train,
        validation=validation,
        metric="accuracy" if all(row.choices for row in rows) else "rougeL",
        cap=sum(caps) if caps else None,
    )
