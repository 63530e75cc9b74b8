"""One damaged input: made from a seed, given to a reader, and what became of it."""

import io
import os
import random
import re
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from doors import KINDS, Kind
from mutators import mutate_file
from originals import Originals

from mhr_scale.errors import DivergenceError, ExitCode, UserError, one_line
from mhr_scale.recipe import strict_yaml
from mhr_scale.run import failures

SECONDS = 20
BYTES = 6 << 30
LONGEST_MESSAGE = 1000
#: A setting, by which errors of a recipe may name their place.
SETTING = re.compile(
    r"^(folder|steps|task|tasks|variants|backbone|format|dtype|max_shard_bytes)\b"
    r"|\b(backbone|adapter|tasks|shots|protocol|optim|selection|scoring|waves|run|batch|mixture|loss"
    r"|schedule|soup|fingerprint)\.[a-z_]+\b"
)
#: What a write leaves behind that did not come to its end.
HALF_WRITTEN = re.compile(r"^\..*\.(tmp|unfinished)$")
HARMLESS, REFUSED = "harmless", "refused"
#: What counts as a finding.
FINDINGS = ("traceback", "hang", "several lines", "no place", "long", "half-written")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case; `label` is harmless, refused, or one of `FINDINGS`."""

    kind: str
    seed: int
    number: int
    label: str
    damage: str
    message: str
    seconds: float

    @property
    def is_finding(self) -> bool:
        """Whether this must not happen."""
        return self.label in FINDINGS

    def __str__(self) -> str:
        case = f"--kind {self.kind!r} --seed {self.seed} --case {self.number}"
        return f"{self.label} ({case}; {self.damage}; {self.seconds:.1f} s): {self.message}"


class Hang(BaseException):
    """A case took longer than `SECONDS`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A damaged copy of a valid input; `place` is the folder that holds it."""

    place: Path
    damage: str
    files: list[Path]


def make_case(name: str, originals: Originals, work: Path, *, seed: int, number: int) -> Case:
    """Copy and damage the input of a case; a number below 0 damages nothing."""
    kind = KINDS[name]
    rng = random.Random(f"{seed}/{name}/{number}")
    place = work / f"case_{number}" / "a" / "b"  # `../..` stays inside the case
    for original in (kind.original, *kind.beside):
        shutil.copytree(originals.get(original), place / original)
    if number < 0:
        return Case(place=place, damage="none", files=[])
    damage, files = _damage(rng, kind, place / kind.original)
    return Case(place=place, damage=damage, files=files)


def run_case(
    name: str, originals: Originals, work: Path, *, seed: int, number: int, keep: bool = False
) -> Outcome:
    """Run one case in a folder of its own below `work`, which goes unless it is to `keep`."""
    kind = KINDS[name]
    case = make_case(name, originals, work, seed=seed, number=number)
    place, above = case.place, Path.cwd()
    before, begun = half_written(place), time.monotonic()
    os.chdir(place)
    try:
        label, message = _judge(kind, originals, case.files)
    finally:
        os.chdir(above)
    half = half_written(place) - before
    if label == REFUSED:
        half |= {place / result for result in kind.results if (place / result).exists()}
    if half and label in (HARMLESS, REFUSED):
        label, message = "half-written", f"{min(half).relative_to(place)} after: {message}"
    seconds = time.monotonic() - begun
    if not keep:
        shutil.rmtree(work / f"case_{number}", ignore_errors=True)
    return Outcome(
        kind=name,
        seed=seed,
        number=number,
        label=label,
        damage=case.damage,
        message=message.replace(str(place), "."),
        seconds=seconds,
    )


def half_written(folder: Path) -> set[Path]:
    """What writes that did not come to their end have left."""
    return {path for path in folder.rglob("*") if HALF_WRITTEN.match(path.name)}


def _damage(rng: random.Random, kind: Kind, folder: Path) -> tuple[str, list[Path]]:
    """Damage one file, sometimes two; what was done, and the files."""
    found = {path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()}
    files = sorted(found)
    chosen = rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2))))
    done = [
        f"{path.relative_to(folder)}: {mutate_file(rng, path, [f for f in files if f.is_file()])}"
        for path in chosen
    ]
    if kind.reseal is not None and rng.random() < 0.6:
        try:
            kind.reseal(folder)
            done.append("hashes made right")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, LookupError):
            done.append("hashes not made right")
    return ", ".join(done), chosen


def _judge(kind: Kind, originals: Originals, files: list[Path]) -> tuple[str, str]:
    """Open the door; a label and what was said."""
    try:
        with _limits(), _silence():
            kind.door(originals)
    except Hang as hang:
        return "hang", f"{hang}"
    except UserError as error:
        return _check_message(str(error), files, is_loss=isinstance(error, DivergenceError))
    except Exception as error:
        explained = failures.explain(error)
        if explained is not None and explained.code == ExitCode.MISTAKE:
            return _check_message(explained.text, files, is_loss=False)
        last = traceback.format_exc().splitlines()[-30:]
        return "traceback", "\n".join(last)
    return HARMLESS, ""


def _check_message(message: str, files: list[Path], *, is_loss: bool) -> tuple[str, str]:
    """Whether a message is one line that names the file, or a folder it lies in, or a setting."""
    if "\n" in message or "\r" in message:
        return "several lines", message
    if len(message) > LONGEST_MESSAGE:
        return "long", message
    here = Path.cwd()
    places = {file.name for file in files}
    for file in files:
        places |= {str(above.relative_to(here)) for above in file.parents if above != here
                   and above.is_relative_to(here)}  # fmt: skip
    is_recipe = any(file.name == "recipe.yaml" for file in files)
    if is_loss or any(place in message for place in places):
        return REFUSED, message
    if is_recipe and (SETTING.search(message) or _quotes(files[0], message)):
        return REFUSED, message
    return "no place", message


def _quotes(recipe: Path, message: str) -> bool:
    """Whether a message begins with a name that the recipe gives."""
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    leaves, values = [strict_yaml.read(text, source="", error=UserError)[0]], []
    while leaves:
        leaf = leaves.pop()
        inner = leaf.values() if isinstance(leaf, dict) else leaf if isinstance(leaf, list) else ()
        leaves += inner
        if isinstance(leaf, str):
            values += [one_line(str(path)) for path in (Path(leaf), Path(leaf).absolute())]
    return any(message.startswith(value[:100]) for value in values)


@contextmanager
def _limits() -> Iterator[None]:
    """Raise `Hang` after a while, and refuse memory without measure."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang("".join(traceback.format_stack(frame)[-12:]))

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _silence() -> Iterator[None]:
    """What verbs and libraries print while they read damaged files is not looked at."""
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
