"""The verbs that are killed: short toy runs, how far they are, and what has to be equal in the end.

Everything is compared to the bit, but times. The toy settings are those under which one rank, two
replicated and two sharded ones are known to agree.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("seconds", "tokens_per_second")
#: What changes from machine to machine and from start to start.
PLACEMENTS = ("null", "ds_configs/cpu.json")
STEPS = 60
TASKS = "{suite: toy, instruction: none, n_tasks: 6, train_examples: 20, validation_examples: 60}"


@dataclass(frozen=True, slots=True)
class Verb:
    """A launch script with short settings, its lines as it goes, its outcome in the end."""

    name: str
    script: str
    settings: Callable[[Path], tuple[str, ...]]
    """From the folder of a pre-trained run."""
    lines: str
    """The files that grow by a line now and then."""
    outcome: Callable[[Path], dict[str, Any]]
    """What has to be equal, by name."""
    saves: bool = True

    def arguments(self, source: Path, folder: Path, placement: str = "null") -> tuple[str, ...]:
        """The command line of a start."""
        run = (f"run.folder={folder}", f"run.ds_config={placement}")
        return (*self.settings(source), *run)

    def count_lines(self, folder: Path) -> int:
        """Lines written so far."""
        return sum(_count(file) for file in folder.glob(self.lines))

    def differences(self, folder: Path, whole: Path) -> list[str]:
        """What is not as in the run that nobody has killed."""
        mine, theirs = self.outcome(folder), self.outcome(whole)
        assert theirs
        faults = [f"{name} is missing" for name in sorted(theirs.keys() - mine.keys())]
        faults += [f"{name} is too much" for name in sorted(mine.keys() - theirs.keys())]
        shared = sorted(mine.keys() & theirs.keys())
        return faults + [f"{name} differs" for name in shared if mine[name] != theirs[name]]


def _count(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _bytes(folder: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    for pattern in patterns:
        for file in folder.glob(pattern):
            yield str(file.relative_to(folder)), file.read_bytes()


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _timeless(file: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in _lines(file)]


def _leftovers(folder: Path) -> dict[str, bool]:
    """Names of what no finished run leaves."""
    left = [*folder.rglob("*.tmp"), *folder.rglob("*.damaged")]
    left += [*folder.glob("jobs/*/*/*/steps"), *folder.glob("jobs/*/*/*/best")]
    return {str(path.relative_to(folder)): True for path in left}


def _of_training(folder: Path) -> dict[str, Any]:
    last = f"steps/{STEPS:06d}/"
    files = _bytes(folder, "adapter/*", "averaged/*/*", f"{last}*.safetensors", f"{last}resume/*")
    metrics = {"metrics.jsonl": _timeless(folder / "metrics.jsonl")}
    return {**dict(files), **metrics, **_leftovers(folder)}


def _of_scores(folder: Path) -> dict[str, Any]:
    """The order of the lines depends on the number of ranks."""
    lines = _lines(folder / "scores.jsonl")
    scores = {f"the score of {line['id']}": line for line in lines}
    return {
        "the number of scores": len(lines),
        **scores,
        **dict(_bytes(folder, "summary.json")),
        **_leftovers(folder),
    }


def _of_jobs(folder: Path) -> dict[str, Any]:
    job = "jobs/*/*/*/"
    files = (f"{job}adapter/*", f"{job}result.json", f"{job}metrics.jsonl", "summary.json")
    scores = {str(f.relative_to(folder)): _lines(f) for f in folder.glob(f"{job}scores.jsonl")}
    return {**dict(_bytes(folder, *files)), **scores, **_leftovers(folder)}


def _pretrain(source: Path) -> tuple[str, ...]:
    return (
        "launch/recipes/toy.yaml",
        "adapter.policy=noisy",
        "optim={name: adafactor, lr: 1.0e-3}",
        f"schedule={{steps: {STEPS}, warmup_fraction: 0.2, decay: linear}}",
        "run.save_every=3",
        "run.log_every=1",
        "run.validate_every=20",
        "batch.batch_size=8",
        "batch.micro_batch_size=4",
        "tasks.n_tasks=6",
        "tasks.train_examples=20",
        "tasks.validation_examples=4",
    )


def _average(source: Path) -> tuple[str, ...]:
    return (
        "launch/recipes/toy_average.yaml",
        f"source={source}",
        f"steps=[0, 20, {STEPS}]",
        "trainable=inventory",
        "run.save_every=3",
        "run.log_every=1",
    )


def _evaluate(source: Path) -> tuple[str, ...]:
    return (
        "launch/recipes/toy_evaluate.yaml",
        f"adapter={source}",
        f"tasks={TASKS}",
        "scoring.max_tokens=100",
    )


def _adapt(source: Path) -> tuple[str, ...]:
    return (
        "launch/recipes/toy_adapt.yaml",
        f"variants={{MHR: {{adapter: {source}}}, MHR-z: {{adapter: {source}, kind: routing}}}}",
        "shots={seeds: [0], count: 12}",
        "protocol={steps: 24, batch_size: 4, loss: language_model, max_input_tokens: 32, "
        "max_target_tokens: 32}",
        "selection={on: test, every_epochs: 2}",
        "scoring={metric: exact_match, max_new_tokens: 4, examples: 3}",
        "waves={size: 4, save_every: 3}",
        "run.log_every=1",
    )


VERBS = {
    verb.name: verb
    for verb in (
        Verb("pretrain", "launch/pretrain.py", _pretrain, "metrics.jsonl", _of_training),
        Verb("average", "launch/average.py", _average, "metrics.jsonl", _of_training),
        Verb("evaluate", "launch/evaluate.py", _evaluate, "scores.jsonl", _of_scores, saves=False),
        Verb("adapt", "launch/adapt.py", _adapt, "jobs/*/*/*/metrics.jsonl", _of_jobs),
    )
}
