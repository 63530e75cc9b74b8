"""Super-NaturalInstructions: `<folder>/tasks/*.json` and the task lists of `<folder>/splits/`.

Three prompt wordings, for a task's definition D and an instance's input X:

    tk_instruct   "Definition: D.\\n\\n" + examples + "Now complete the following example -\\n"
                  "Input: X.\\nOutput: "
    mhr_name      the task's name and ". ", then the same
    mhr           "Task definition: D.\\n" + examples + "Now complete the following example -\\n"
                  "Input: X.\\nOutput:"

D is the first definition of the list. D, X and the two texts of an example are stripped and get a
full stop unless they end in ASCII punctuation. A positive example is " Positive Example k -\\n"
"Input: x.\\n Output: y.\\n\\n" in all three wordings. All the positive examples asked for stay in
the prompt whatever its length: a prompt that is too long is cut in front of `Task.suffix`, which
takes the end of the instance's input first. References are stripped too.

Instances are split as MHR does. A test task: the first `test_examples` instances of the file are
its test set for every seed, one that is refused leaving a gap; the others are shuffled and give the
training instances, then the validation ones. A training task: its instances are shuffled and give
the training instances, then the validation ones; where the training ones leave at most 25, then 25
validation instances (or `validation_examples`, if that is less) come first and the training ones
get the rest. The shuffle is seeded by the seed and the task's name alone.

A row with an empty reference among others is refused like one whose only reference is empty.
"""

import json
import logging
import random
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from mhr_scale.errors import ConfigError, DataError, did_you_mean, some, suggest
from mhr_scale.recipe.part import part
from mhr_scale.tasks.json_lines import kind_of, no_twins
from mhr_scale.tasks.suite import FewShotTask, ShotsConfig, Suite
from mhr_scale.tasks.task import Example, Intake, IntakeConfig, Place, Task

log = logging.getLogger("mhr_scale")

LEAST_VALIDATION = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """What differs between prompts: the text around the definition, and the ending."""

    opening: str
    gap: str
    ending: str
    has_name: bool = False


WORDINGS = {
    "tk_instruct": Wording(opening="Definition: ", gap="\n\n", ending="\nOutput: "),
    "mhr_name": Wording(opening="Definition: ", gap="\n\n", ending="\nOutput: ", has_name=True),
    "mhr": Wording(opening="Task definition: ", gap="\n", ending="\nOutput:"),
}


@part
class SuperNITasks(Suite):
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

    generates = True

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        if not 0 <= self.positive_examples <= 2:
            raise ConfigError(f"tasks.positive_examples: {self.positive_examples} is not in 0..2")

    def read_tasks(self, intake: Intake) -> list[Task]:
        """Read the tasks of one list of a split, sorted by name."""
        self.check_source()
        folder = Path(self.folder)
        names = _list_tasks(folder, self)
        tasks = [_read_task(folder / "tasks" / f"{name}.json", self, intake) for name in names]
        intake.check()
        asked = self.train_examples
        short = [task.name for task in tasks if len({row.place for row in task.train}) < asked]
        if short:
            log.warning(
                "fewer than %d training rows in %d task(s): %s", asked, len(short), some(short)
            )
        return tasks

    def more_test_rows(self) -> str:
        """A test task has test rows, a training task held-out ones."""
        return f"raise tasks.{'test' if self.fold == 'test' else 'validation'}_examples"

    def target_choice(self) -> str:
        """As the recipe says."""
        return self.references

    def only(self, task: str) -> Self:
        """Read this task's file alone."""
        return replace(self, tasks=(task,))

    def at_seed(self, seed: int) -> Self:
        """The seed's shuffle gives training and validation rows."""
        return replace(self, seed=seed)

    def check_few_shot(self, shots: ShotsConfig) -> None:
        """Raise `ConfigError` unless the tasks are test tasks, with a row per instance."""
        Suite.check_few_shot(self, shots)
        if self.fold != "test":
            raise ConfigError(
                f"tasks.fold: {self.fold} tasks were trained on; the few-shot tasks of suite "
                "superni are fold: test"
            )
        if self.references == "all":
            raise ConfigError(
                "tasks.references: all makes several rows of one shot; leave it out, "
                "protocol.references says which reference a shot trains on"
            )

    def draw_shots(self, task: Task, shots: ShotsConfig, *, seed: int) -> FewShotTask:
        """The first training rows: the seed has shuffled them already."""
        return self.take_shots(task, task.train, shots, seed=seed)


def _list_tasks(folder: Path, config: SuperNITasks) -> list[str]:
    path = folder / "splits" / config.split / f"{config.fold}_tasks.txt"
    listed = _read_list(path, folder / "splits")
    names = sorted(set(config.tasks) or listed)
    unknown = [name for name in names if name not in listed]
    missing = [
        name
        for name in names
        if name in listed and not (folder / "tasks" / f"{name}.json").is_file()
    ]
    problems = []
    if unknown:
        hint = suggest(unknown[0], sorted(listed))
        problems.append(f"{path}: {len(unknown)} task(s) not listed: {some(unknown)}{hint}")
    if missing and config.missing == "error":
        problems.append(
            f"{folder / 'tasks'}: {len(missing)} listed task(s) without a file: {some(missing)}; "
            "add the files or set tasks.missing: skip"
        )
    if problems:
        raise DataError("; ".join(problems))
    if missing:
        log.warning("%d listed task(s) skipped, no file: %s", len(missing), some(missing))
    present = [name for name in names if name not in missing]
    if not present:
        raise DataError(f"{path}: none of the listed tasks has a file in {folder / 'tasks'}")
    return present


def _read_list(path: Path, splits: Path) -> set[str]:
    if not splits.is_dir():
        raise DataError(f"{splits}: no such folder; tasks.folder holds 'tasks' and 'splits'")
    if not path.is_file():
        known = sorted(entry.name for entry in splits.iterdir() if entry.is_dir())
        raise DataError(f"{path}: no such file; splits there: {', '.join(known) or 'none'}")
    lines = enumerate(_read_text(path).split("\n"), start=1)
    names = {line.strip(): number for number, line in lines if line.strip()}
    for name, number in names.items():
        if not name.isprintable() or "/" in name:
            raise DataError(f"{path}:{number}: {name!a} is no name of a task's file; mend the line")
    if not names:
        raise DataError(f"{path}: lists no task")
    return set(names)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: bad UTF-8 ({error.reason})") from error


def _read_task(path: Path, config: SuperNITasks, intake: Intake) -> Task:
    data = _load_task(path)
    head = _prompt_head(data, path=path, config=config)
    ending = WORDINGS[config.prompt].ending
    rows: dict[int, Example] = {}
    taken: set[str] = set()
    for index, instance in enumerate(data["Instances"]):
        place = Place(file=str(path), line=index + 1)
        problem = _problem(instance, taken, config.intake)
        if problem is None:
            taken.add(instance["id"])
            rows[index] = _make_example(instance, head=head, ending=ending, place=place)
            intake.take()
        else:
            text = json.dumps(instance, ensure_ascii=False)
            intake.refuse(place=place, task=path.stem, reason=problem, text=text)
    train, validation, test = _split(rows, name=path.stem, config=config)
    if not train:
        counts = f"{len(data['Instances'])} instances{intake.describe_refused(path.stem)}"
        way_out = f"cannot fill {_needs(config)}" if rows else "are of no use; mend the file"
        raise DataError(f"{path}: {counts} {way_out} or name the other tasks in tasks.tasks")
    if config.references == "all":
        train = [
            replace(row, id=f"{row.id}#{number}", targets=(target,))
            for row in train
            for number, target in enumerate(row.targets)
        ]
    return Task(
        name=path.stem,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        metric="rougeL",
        suffix=ending,
    )


def _load_task(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=no_twins)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{where}: malformed JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # also a key that appears twice
        raise DataError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected an object, found {kind_of(data)}")
    if not isinstance(_entry(data, "Instances", path), list):
        raise DataError(f"{path}: 'Instances' is {kind_of(data['Instances'])}, expected a list")
    return data


def _entry(data: dict[str, Any], key: str, path: Path) -> Any:  # Any: whatever the file holds
    if key not in data:
        raise DataError(f"{path}: missing key '{key}'{did_you_mean(key, data)}")
    return data[key]


def _prompt_head(data: dict[str, Any], *, path: Path, config: SuperNITasks) -> str:
    """Write what stands before the input in every prompt of a task."""
    wording = WORDINGS[config.prompt]
    definition = _entry(data, "Definition", path)
    if isinstance(definition, list) and definition:
        definition = definition[0]
    if not _is_text(definition) or not definition.strip():
        raise DataError(f"{path}: 'Definition' holds no text; expected a string or a list of them")
    name = f"{path.stem}. " if wording.has_name else ""
    head = name + _closed(wording.opening + definition.strip()) + wording.gap
    if config.positive_examples:
        examples = _entry(data, "Positive Examples", path)
        if not isinstance(examples, list):
            raise DataError(f"{path}: 'Positive Examples' is {kind_of(examples)}, expected a list")
        for number, example in enumerate(examples[: config.positive_examples], start=1):
            if not isinstance(example, dict) or not all(
                _is_text(example.get(key)) for key in ("input", "output")
            ):
                raise DataError(
                    f"{path}: 'Positive Examples', number {number}: expected an object with the "
                    "strings 'input' and 'output'"
                )
            given = _closed(f"Input: {example['input'].strip()}")
            answer = _closed(f" Output: {example['output'].strip()}")
            head += f" Positive Example {number} -\n{given}\n{answer}\n\n"
    return head + "Now complete the following example -\n"


def _closed(text: str) -> str:
    return text if text[-1] in string.punctuation else text + "."


def _is_text(value: object) -> bool:
    """Whether a value is a string that can be written as UTF-8 (no unpaired surrogate)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem(instance: object, taken: set[str], policy: IntakeConfig) -> str | None:
    """Say why an instance cannot be used, or nothing."""
    if not isinstance(instance, dict):
        return f"not an object but {kind_of(instance)}"
    for key in ("id", "input", "output"):
        if key not in instance:
            return f"missing field '{key}'"
    output = instance["output"]
    references = output if isinstance(output, list) else [output]
    texts = [("id", instance["id"]), ("input", instance["input"])]
    for key, value in [*texts, *(("output", reference) for reference in references)]:
        if not isinstance(value, str):
            return f"'{key}' is or holds {kind_of(value)}, expected a string"
        if not _is_text(value):
            return f"unpaired surrogate in '{key}'"
    if not references:
        return "no reference in 'output'"
    if instance["id"] in taken:
        return f"duplicate id {instance['id']!a}"
    return policy.find_empty(instance["input"], references)


def _make_example(instance: dict[str, Any], *, head: str, ending: str, place: Place) -> Example:
    output = instance["output"]
    references = output if isinstance(output, list) else [output]
    return Example(
        id=instance["id"],
        input=head + _closed(f"Input: {instance['input'].strip()}") + ending,
        targets=tuple(text.strip() for text in references),
        place=place,
    )


def _split(
    rows: dict[int, Example], *, name: str, config: SuperNITasks
) -> tuple[list[Example], list[Example], list[Example]]:
    """Divide the usable instances (by their index in the file) into train, validation and test."""
    first = config.test_examples if config.fold == "test" else 0
    test = [row for index, row in rows.items() if index < first]
    rest = [row for index, row in rows.items() if index >= first]
    random.Random(f"{config.seed}/{name}").shuffle(rest)
    n_train, n_validation = config.train_examples, config.validation_examples
    if config.fold == "train" and len(rest) - n_train <= LEAST_VALIDATION:
        count = min(LEAST_VALIDATION, n_validation)
        return rest[count : count + n_train], rest[:count], test
    return rest[:n_train], rest[n_train : n_train + n_validation], test


def _needs(config: SuperNITasks) -> str:
    if config.fold == "test":
        key, count = "test_examples", config.test_examples
    else:
        key, count = "validation_examples", min(LEAST_VALIDATION, config.validation_examples)
    return f"{count} {key.removesuffix('_examples')} rows and a training row; lower tasks.{key}"
