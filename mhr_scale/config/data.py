"""What is the data: a part per suite of tasks, and how tasks share the stream of samples."""

from dataclasses import field
from typing import Literal

from mhr_scale.config.part import part
from mhr_scale.errors import ConfigError

#: Examples of a toy task, which are made in memory.
MOST_TOY_EXAMPLES = 100_000


@part
class IntakeConfig:
    """What readers do with rows they cannot use."""

    on_bad: Literal["reject", "error", "skip"] = "reject"
    """reject: write down, stop above max(10, 0.1 %); error: stop at the first; skip: never stop."""
    empty_target: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty target is refused or trains the end-of-sequence token."""
    empty_input: Literal["reject", "keep"] = "reject"
    """Whether a row with an empty input is refused."""


@part
class ToyTasks:
    """The built-in compositional suite (list operation, symbol map, output format)."""

    suite: Literal["toy"]
    """Chooses this part."""
    fold: Literal["train", "held_out"] = "train"
    """The training tasks, or the 10 held-out compositions."""
    n_tasks: int = 60
    """Training tasks drawn from the 144 compositions, the 10 held-out ones excluded."""
    tasks: tuple[str, ...] = ()
    """Exactly these compositions, in this order, in place of those of `seed` and `n_tasks`."""
    train_examples: int = 200
    """Training examples per task."""
    validation_examples: int = 20
    """Held-out examples per training task."""
    instruction: Literal["none", "full", "code"] = "none"
    """none: the input does not tell the task; full: three instruction tokens describe it; code:
    three tokens tell it from all others and describe another one (a name without a meaning)."""
    seed: int = 0
    """Seed of the task split and of the examples."""

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples"):
            if not 0 <= getattr(self, name) <= MOST_TOY_EXAMPLES:
                raise ConfigError(
                    f"tasks.{name}: {getattr(self, name)} is not in 0..{MOST_TOY_EXAMPLES}"
                )


@part
class SuperNITasks:
    """Super-NaturalInstructions: a folder with `tasks/*.json` and `splits/<split>/`."""

    suite: Literal["superni"]
    """Chooses this part."""
    folder: str
    """Folder that holds `tasks/` and `splits/`."""
    split: str = "default"
    """Sub-folder of `splits/` whose `train_tasks.txt` or `test_tasks.txt` is read."""
    fold: Literal["train", "test"] = "train"
    """Which task list of the split."""
    tasks: tuple[str, ...] = ()
    """Only these tasks of the list; empty = all."""
    missing: Literal["error", "skip"] = "error"
    """What a listed task without a file does."""
    train_examples: int = 100
    """Training instances per task."""
    validation_examples: int = 100
    """Validation instances per task, disjoint from the training ones."""
    test_examples: int = 100
    """Test instances of a `test` task: its first ones, the same for every seed."""
    positive_examples: int = 0
    """Positive examples in the prompt (0-2)."""
    prompt: Literal["tk_instruct", "mhr", "mhr_name"] = "mhr"
    """Prompt wording: Tk-Instruct's, MHR's (R2), or MHR's earlier one with the task name (R1)."""
    references: Literal["random", "first", "all"] = "random"
    """Training target of a many-reference row: one drawn per access, the first, or a row each."""
    seed: int = 42
    """Seed of the split into training and validation instances."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.positive_examples <= 2:
            raise ConfigError(f"tasks.positive_examples: {self.positive_examples} is not in 0..2")


@part
class JsonlTasks:
    """The user's own rows: one JSONL file per task and fold, or per fold with a `task` field."""

    suite: Literal["jsonl"]
    """Chooses this part."""
    folder: str
    """Folder with the JSONL files, and optionally `tasks.yaml` (cap, weight, metric per task)."""
    validation_examples: int = 100
    """Rows per task set aside where no `validation.jsonl` exists (at most a tenth of the task)."""
    seed: int = 42
    """Seed of that choice."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""


@part
class T0Tasks:
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


@part
class HeldOutTasks:
    """The 11 tasks that T0 holds out: evaluation rows under their original-task prompts."""

    suite: Literal["t0_eval"]
    """Chooses this part."""
    templates: str
    """Folder of promptsource templates, `<data set>[/<subset>]/templates.yaml`."""
    source: Literal["local", "hub"] = "local"
    """Where raw rows come from: files below `folder`, or the Hugging Face hub."""
    folder: str | None = None
    """Raw rows under `source: local`: `<task>.<split>.jsonl`, `<task>/<split>.jsonl` or saved."""
    storycloze: str | None = None
    """Manual file of StoryCloze's test rows (CSV as handed out, or JSONL); null = do without."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty = all 11."""
    missing: Literal["error", "skip"] = "error"
    """What a task without rows does."""
    anli_split: Literal["test", "dev"] = "test"
    """Which rows score ANLI: test as T-Few and MHR do, dev as T0 does."""
    templates_mode: Literal["draw", "all"] = "draw"
    """draw: one template per row, by `seed`; all: every row under every template."""
    seed: int = 42
    """Seed of the templates drawn and of templates that choose their wording."""
    max_characters: int = 2048
    """Characters kept of every field that a template inserts."""
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    """Policy for unusable rows."""

    def __post_init__(self) -> None:
        if self.source == "local" and self.folder is None:
            raise ConfigError(
                "tasks.folder: not set; name the folder of raw rows or use source: hub"
            )


TasksConfig = ToyTasks | SuperNITasks | JsonlTasks | T0Tasks
EvalTasksConfig = ToyTasks | SuperNITasks | JsonlTasks | HeldOutTasks


@part
class MixtureConfig:
    """How tasks share the stream of samples."""

    cap: int | None = None
    """Rows of a task that count in one epoch; a task's own `cap` is stronger."""
    temperature: float = 1.0
    """Shares are (capped size) ** (1 / temperature)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Fixed relative weights by task name; a task without one keeps its share."""
    first_rows: bool = False
    """Repeat a capped task's first rows every epoch instead of walking on through the task."""
    group: int = 1
    """Consecutive samples of one task per draw (MHR mixes distinct tasks only: 4 means fewer)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise ConfigError(f"mixture.temperature: {self.temperature} is not above 0")
        if self.group < 1:
            raise ConfigError(f"mixture.group: {self.group} is not at least 1")
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"mixture.cap: {self.cap} is not at least 1")
