"""A job: its name and folder, its progress, and its result."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.typed import check_fields
from mhr_scale.run.files import read_object, write_json
from mhr_scale.training import saved_steps

RESULT = "result.json"
#: Longest folder name, in characters; file systems take 255 bytes, some with an affix of their own.
LONGEST = 200
#: Names of files that stand beside folders of tasks (`export`).
TAKEN = ("tasks.json", "export.yaml", "export.json", "README.md")
#: The fields of a result that tables and reports read.
RESULT_FIELDS = {
    "task": str,
    "seed": int,
    "variant": str,
    "kind": str,
    "adapter": str | None,
    "metric": str,
    "score": float,
    "source_numbers": int,
    "trained_numbers": int,
}


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Job:
    """One fine-tuning: a task, the seed of its shots and their order, and a variant."""

    task: str
    seed: int
    variant: str

    @property
    def name(self) -> str:
        """`<task>/<seed>/<variant>`, each part as a valid folder name."""
        return "/".join(as_folder(part) for part in (self.task, str(self.seed), self.variant))

    def folder(self, run: Path) -> Path:
        """Where the job writes."""
        return run / "jobs" / self.name


def as_folder(text: str) -> str:
    """A name as a single folder name that every file system takes.

    Characters that a file system may refuse are %-encoded, as are the dots of names that are taken;
    a name that comes out too long ends in a hash instead.
    """
    quoted = quote(text, safe=" ()[],+=@")
    if not quoted.strip(". ") or quoted in TAKEN:
        quoted = quoted.replace(".", "%2E").replace(" ", "%20")
    if len(quoted) > LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        quoted = f"{quoted[: LONGEST - 17]}-{digest}"
    return quoted


def check_folders(names: Iterable[str], *, what: str) -> None:
    """Raise `ConfigError` for names whose folders are one where upper and lower case are."""
    known: dict[str, str] = {}
    for name in names:
        first = known.setdefault(as_folder(name).lower(), name)
        if first != name:
            raise ConfigError(
                f"{what} {first!a} and {name!a} differ in case alone, and would share a folder on "
                "some file systems; rename one"
            )


@dataclass(slots=True)
class JobProgress:
    """The evaluations of a job so far, stored in its saved steps."""

    best_step: int = -1
    best_score: float | None = None
    worse: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def take(self, step: int, score: float) -> bool:
        """Record a score; returns whether it is the best so far (of equal ones, the first)."""
        self.evaluations.append((step, score))
        if self.best_score is None or score > self.best_score:
            self.best_step, self.best_score, self.worse = step, score, 0
            return True
        self.worse += 1
        return False

    @classmethod
    def read(cls, progress: Mapping[str, Any], *, place: Path) -> "JobProgress":
        """From the progress of a saved step; raises `RunError` naming `place` if malformed."""
        try:
            values = progress["standing"]
            evaluations = [(int(step), float(score)) for step, score in values["evaluations"]]
            best = values["best_score"]
            score = None if best is None else float(best)
            return cls(int(values["best_step"]), score, int(values["worse"]), evaluations)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"{place}: not the progress of a job ({error!r}); delete it") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """A job's state on disk: finished, or the saved step to resume from (0: none)."""

    is_finished: bool
    step: int


def find_state(job: Job, run: Path) -> JobState:
    """Look a job up in the run folder; a damaged save is set aside. One process calls it.

    Leftovers of a finished job that was killed during its clean-up are removed.
    """
    folder = job.folder(run)
    is_finished = (folder / RESULT).is_file()
    if is_finished:
        clean(job, run)
    step = None if is_finished else saved_steps.find_whole(folder, or_anew=True)
    return JobState(is_finished=is_finished, step=step or 0)


def write_result(job: Job, run: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a finished job, the last file it writes."""
    write_json(job.folder(run) / RESULT, {**asdict(job), **result})


def clean(job: Job, run: Path) -> None:
    """Remove the files that a job needs only until its result is written."""
    for name in ("best", "steps"):
        shutil.rmtree(job.folder(run) / name, ignore_errors=True)


def read_results(jobs: Iterable[Job], run: Path) -> list[dict[str, Any]]:
    """The results of the finished ones among some jobs; raises `RunError` for a damaged one."""
    files = [job.folder(run) / RESULT for job in jobs]
    return [_read_result(file) for file in files if file.is_file()]


def read_all_results(run: Path) -> list[dict[str, Any]]:
    """The results of all finished jobs of a run folder, sorted by folder name."""
    return [_read_result(file) for file in sorted(run.glob(f"jobs/*/*/*/{RESULT}"))]


def _read_result(file: Path) -> dict[str, Any]:
    way_out = "delete it and run again"
    result = read_object(file, RunError, way_out=way_out)
    try:
        check_fields(result, RESULT_FIELDS, name="result")
    except TypeError as error:
        raise RunError(f"{file}: not a result ({error}); {way_out}") from error
    return result
