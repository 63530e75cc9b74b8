"""Run folders of any kind, recognised by their files; unfinished runs are read as they are."""

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mhr_scale.adapters import CARD
from mhr_scale.analysis import ANALYSIS, SCHEMA
from mhr_scale.config import AdapterConfig, precision_of
from mhr_scale.errors import ConfigError, RunError, counted, shortened, some
from mhr_scale.jobs.job import RESULT, read_all_results
from mhr_scale.recipe import strict_yaml, typed
from mhr_scale.run.files import read_json, read_object
from mhr_scale.run.runlog import metric_lines
from mhr_scale.scores import summary
from mhr_scale.scores.comparison import as_one
from mhr_scale.tasks.crossfit.metrics import is_mean
from mhr_scale.training import saved_steps

Kind = Literal[
    "pre-training", "average", "evaluation", "few-shot", "fine-tuning", "analysis", "job"
]
#: Advice for a file that cannot be read.
MOVE = "move it away"
#: Names of folders that say nothing without the one above: those of an evaluation of averages.
OF_PARTS = re.compile(r"[0-9]{6,}|bare")
#: Files by which a run folder is recognised.
TRACES = (
    "config.yaml",
    "average.yaml",
    ANALYSIS,
    "metrics.jsonl",
    "scores.jsonl",
    "result.json",
)


@dataclass(kw_only=True, slots=True)
class Run:
    """The content of a run folder; fields of missing files are empty."""

    folder: Path
    kind: Kind
    label: str = ""
    is_finished: bool = False
    state: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)
    """The recipe of `average`; `config` is that of its extra steps."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    n_torn: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """Standard error of the mean over the examples of a task."""
    results: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    n_rejects: int | None = None

    @property
    def method(self) -> str:
        """The method of a training run, by its name in tables."""
        if self.kind == "average":
            return "average"
        return method_of(self.config)

    @property
    def precision(self) -> str:
        """Data type of the frozen backbone in the last start, quantised or not; empty: unknown.

        And that in which its adapter was stored, if it was not float32.
        """
        start = self.starts[-1] if self.starts else {}
        computed = precision_of(part(start, "backbone") or part(self.config, "backbone"))
        return as_one(computed, start.get("stored_precision"))


def open_runs(folders: Sequence[str]) -> list[Run]:
    """Read run folders; labels are the shortest that are unique.

    Raises `RunError` for a folder that is no run, or that holds unreadable files.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    runs = [open_run(path) for path in paths]
    for run, label in zip(runs, labels([run.folder for run in runs]), strict=True):
        run.label = label
    return runs


def labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them unique."""
    parts = [path.resolve().parts for path in paths]
    least = [2 if OF_PARTS.fullmatch(part[-1]) else 1 for part in parts]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-max(depth, n) :]) for part, n in zip(parts, least, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def open_run(folder: Path) -> Run:
    """Read one run folder; raises `RunError` if it is no run."""
    check_run(folder)
    config = read_tree(folder / "config.yaml")
    run = Run(folder=folder, kind=recognise(folder, config), config=config)
    run.average = read_tree(folder / "average.yaml")
    read_lines(run)
    run.starts = read_starts(folder / "provenance.json")
    run.n_rejects = count_lines(folder / "rejects.jsonl")
    scores = summary.read_scores(folder / summary.SCORES)
    run.summary = summary.summarise(scores) if scores else {}
    run.errors = standard_errors(scores)
    if run.kind == "few-shot":
        run.results = read_all_results(folder)
    if (folder / RESULT).is_file():
        run.result = read_object(folder / RESULT, RunError, way_out=MOVE)
    if run.kind == "analysis":
        run.analysis = read_analysis(folder / ANALYSIS)
    run.is_finished, run.state = STATES[run.kind](run)
    return run


def check_run(folder: Path) -> None:
    """Raise `RunError` for a folder that is no run; the message names runs below it."""
    if not folder.is_dir():
        raise RunError(f"'{folder}': no such folder; name the folder of a run")
    if is_run(folder):
        return
    below = sorted(str(path) for path in folder.iterdir() if path.is_dir() and is_run(path))
    hint = f"name runs below it: {some(below, shown=4)}" if below else "name the folder of a run"
    raise RunError(
        f"'{folder}': no run; none of {', '.join(TRACES)} or finished jobs/ lie there; {hint}"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder has files of a run."""
    return holds_jobs(folder) or any((folder / name).is_file() for name in TRACES)


def holds_jobs(folder: Path) -> bool:
    """Whether there is a finished few-shot job below the folder."""
    return any(folder.glob(f"jobs/*/*/*/{RESULT}"))


def recognise(folder: Path, config: Mapping[str, Any]) -> Kind:
    """The kind of a run, by its files and the parts of its recipe."""
    if (folder / ANALYSIS).is_file() or "alignment" in config:
        return "analysis"
    if (folder / "average.yaml").is_file():
        return "average"
    if "variants" in config or holds_jobs(folder):
        return "few-shot"
    if "task" in config:
        return "fine-tuning"
    if "schedule" in config:
        return "pre-training"
    if (folder / RESULT).is_file():
        return "job"
    if (folder / summary.SCORES).is_file() or "scoring" in config:
        return "evaluation"
    if (folder / "metrics.jsonl").is_file():
        return "pre-training"
    names = ", ".join(config) or "nothing"
    raise RunError(f"'{folder}': no run: its config.yaml sets {names}; name the folder of a run")


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a training recipe, by its name in tables."""
    try:
        settings = typed.build(AdapterConfig, config.get("adapter"), name="adapter")
    except (TypeError, ConfigError):
        return "adapter"
    return settings.method


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a recipe; empty if it is missing or not a mapping."""
    values = config.get(name)
    return values if isinstance(values, dict) else {}


def extra_steps(average: Mapping[str, Any]) -> list[int]:
    """The numbers of extra steps that a recipe of `average` asks for."""
    steps = average.get("steps")
    if isinstance(steps, list) and steps and all(isinstance(k, int) for k in steps):
        return steps
    return [0]


# -- files -----------------------------------------------------------------------------------------


def read_tree(file: Path) -> dict[str, Any]:
    """A recipe as plain values, whatever its version; empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: cannot be read ({error}); move it away") from error
    return strict_yaml.read(text, source=str(file), error=RunError)[0]


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The entries of a provenance file, one per start."""
    if not file.is_file():
        return []
    starts = read_json(file, RunError, way_out=MOVE)
    starts = [starts] if isinstance(starts, dict) else starts
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunError(f"{file}: not a list of starts; move it away")
    return starts


def read_lines(run: Run) -> None:
    """Read the lines of `metrics.jsonl`, and count incomplete ones."""
    path = run.folder / "metrics.jsonl"
    if path.is_file():
        for _, _, values in metric_lines(path):
            if values is None:
                run.n_torn += 1
            else:
                run.lines.append(values)


def count_lines(file: Path) -> int | None:
    """The number of lines of a file; None if there is no file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def read_analysis(file: Path) -> dict[str, Any]:
    """An analysis, or nothing; raises `RunError` for another schema and for malformed parts."""
    if not file.is_file():
        return {}
    analysis = read_object(file, RunError, way_out=MOVE)
    if analysis.get("schema") != SCHEMA:
        raise RunError(
            f"{file}: schema {analysis.get('schema')!r}, this version reads {SCHEMA}; analyse again"
        )
    for name in ("alignment", "routing", "inventory", "parameters"):
        values = analysis.get(name)
        if values is not None and not isinstance(values, dict):
            raise RunError(f"{file}: {name} is {shortened(str(values))}, no object; analyse again")
    ways = (analysis.get("parameters") or {}).get("variants")
    mean = (analysis.get("alignment") or {}).get("mean", 0.0)
    if not isinstance(ways, dict | None) or not isinstance(mean, int | float):
        raise RunError(
            f"{file}: parameters.variants or alignment.mean is not what it should be; analyse again"
        )
    return analysis


def standard_errors(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard error of each task's mean; an example under several prompts counts once.

    A score that is no mean over examples has none.
    """
    examples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in filter(lambda score: is_mean(score["metric"]), scores):
        examples[score["task"]][summary.raw_row(score)].append(score["points"])
    errors = {}
    for task, by_example in examples.items():
        means = [statistics.fmean(points) for points in by_example.values()]
        if len(means) > 1:
            errors[task] = statistics.stdev(means) / len(means) ** 0.5
    return errors


# -- the state of a run ----------------------------------------------------------------------------


def _of_training(run: Run) -> tuple[bool, str]:
    steps = part(run.config, "schedule").get("steps")
    logged = run.lines[-1]["step"] if run.lines else 0
    last = max(logged, saved_steps.find_resume(run.folder) or 0)
    if not isinstance(steps, int):
        return False, f"step {last:,} (no config.yaml says of how many)"
    if last >= steps and (run.folder / "adapter" / CARD).is_file():
        return True, f"finished, {counted(steps, 'step')}"
    return False, f"unfinished, step {last:,} of {steps:,}"


def _of_average(run: Run) -> tuple[bool, str]:
    steps = extra_steps(run.average)
    missing = [k for k in steps if not (run.folder / "averaged" / f"{k:06d}" / CARD).is_file()]
    listed = ", ".join(f"{k:,}" for k in steps)
    if not missing:
        return True, f"finished, averaged after {listed} extra step{'' if steps == [1] else 's'}"
    last = run.lines[-1]["step"] if run.lines else 0
    return False, f"unfinished, step {last:,} of {steps[-1]:,}"


def _of_evaluation(run: Run) -> tuple[bool, str]:
    is_finished = bool(run.summary) and (run.folder / "summary.json").is_file()
    begun = "finished" if is_finished else "unfinished"
    return is_finished, f"{begun}, {counted(run.summary.get('examples', 0), 'example')}"


def _of_few_shot(run: Run) -> tuple[bool, str]:
    """Expected is every task that has a folder, under every seed and variant of the recipe."""
    begun = {path.parts[-3] for path in run.folder.glob("jobs/*/*/*")}
    seeds = part(run.config, "shots").get("seeds")
    if not isinstance(seeds, list):
        seeds = sorted({result["seed"] for result in run.results})
    variants = part(run.config, "variants") or {result["variant"] for result in run.results}
    expected, done = len(begun) * len(seeds) * len(variants), len(run.results)
    if done >= expected and done and (run.folder / "summary.json").is_file():
        return True, f"finished, {counted(done, 'job')}"
    return False, f"unfinished, {done:,} of at least {counted(expected, 'job')}"


def _of_result(run: Run) -> tuple[bool, str]:
    if run.result:
        steps = run.result.get("steps")
        return True, f"finished, {counted(steps, 'step') if isinstance(steps, int) else '? steps'}"
    steps = part(run.config, "protocol").get("steps", "?")
    return False, f"unfinished, step {run.lines[-1]['step'] if run.lines else 0} of {steps}"


def _of_analysis(run: Run) -> tuple[bool, str]:
    return (True, "finished") if run.analysis else (False, "unfinished")


STATES = {
    "pre-training": _of_training,
    "average": _of_average,
    "evaluation": _of_evaluation,
    "few-shot": _of_few_shot,
    "fine-tuning": _of_result,
    "job": _of_result,
    "analysis": _of_analysis,
}
