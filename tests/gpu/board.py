"""What the parts of `accept.py` write on: entries, each kept the moment it is there."""

import gc
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Values = Mapping[str, float | int | str | None]


@dataclass(frozen=True, slots=True)
class Scale:
    """Where the parts run: their full shapes on a GPU, or toy shapes on the CPU."""

    is_tiny: bool
    device: torch.device

    @classmethod
    def full(cls) -> "Scale":
        """The first GPU. Ends the program where there is none."""
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no GPU here; --tiny runs the same code on the CPU")
        return cls(is_tiny=False, device=torch.device("cuda", 0))

    @classmethod
    def tiny(cls) -> "Scale":
        """Toy shapes on the CPU."""
        return cls(is_tiny=True, device=torch.device("cpu"))

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run beside the host."""
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True)
class Found:
    """What one measurement gives: its values, and whether they hold what `goal` says.

    `holds` None: a figure without a goal. `goal` is said in words, with the numbers.
    """

    values: Values
    holds: bool | None = None
    goal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the table."""

    part: str
    name: str
    values: Values = field(default_factory=dict)
    holds: bool | None = None
    goal: str = ""
    seconds: float = 0.0
    peak_gib: float | None = None
    error: str = ""

    @property
    def result(self) -> str:
        """In a word."""
        if self.error:
            return "error"
        return {None: "", True: "holds", False: "FAILS"}[self.holds]


class Board:
    """Entries of all parts, a JSON line each in `entries.jsonl`; a later one replaces a former."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.part = ""
        self.until = float("inf")
        self.entries: dict[tuple[str, str], Entry] = {}
        self.left: list[tuple[str, str]] = []

    @classmethod
    def opened(cls, folder: Path, *, scale: Scale, is_fresh: bool = False) -> "Board":
        """The board of a folder: what is there goes on, unless it is of another commit or scale."""
        board = cls(folder, scale)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--folder {folder}: {error.strerror}") from None
        owner, now = folder / "of.json", {"commit": commit(), "tiny": scale.is_tiny}
        is_same = owner.is_file() and json.loads(owner.read_text(encoding="utf-8")) == now
        if is_fresh or not is_same:
            board.lines.unlink(missing_ok=True)
            owner.write_text(json.dumps(now), encoding="utf-8")
        board.read_again()
        return board

    @property
    def lines(self) -> Path:
        """The file of entries."""
        return self.folder / "entries.jsonl"

    @property
    def file(self) -> Path:
        """The file that comes out."""
        return self.folder / "accept.json"

    def read_again(self) -> None:
        """Read what processes of parts have written."""
        text = self.lines.read_text(encoding="utf-8") if self.lines.is_file() else ""
        for line in text.splitlines():
            entry = Entry(**json.loads(line))
            self.entries[entry.part, entry.name] = entry

    def keep(self, entry: Entry) -> None:
        """Add an entry, here and on disk."""
        self.entries[entry.part, entry.name] = entry
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")

    def keep_error(self, name: str) -> None:
        """Add the exception at hand."""
        self.keep(Entry(part=self.part, name=name, error=traceback.format_exc(limit=-12)))

    def values(self, part: str, name: str) -> Values:
        """Values of an entry, {} if it is not there (yet)."""
        entry = self.entries.get((part, name))
        return {} if entry is None else entry.values

    def run(self, name: str, measure: Callable[[], Found]) -> None:
        """Measure and keep, unless it is done or the part's time is over.

        An exception is an entry too, with its traceback; the part goes on.
        """
        self.run_together([name], lambda: {name: measure()})

    def run_together(
        self, names: Sequence[str], measure: Callable[[], Mapping[str, Found | str]]
    ) -> None:
        """Measure several entries at once, such as ways that take turns, unless all are done.

        `measure` gives a text in place of an entry that failed alone.
        """
        missing = [name for name in names if not self.is_done(name)]
        if not missing:
            return
        if time.time() > self.until:
            for name in missing:
                self.left.append((self.part, name))
                self.keep(
                    Entry(part=self.part, name=name, error="not run: the part's time was over")
                )
            return
        begun = time.time()
        on_gpu = self.scale.on_gpu
        if on_gpu:
            gc.collect()  # what a failed entry left in circles holds memory
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = measure()
        except Exception:
            for name in missing:
                self.keep_error(name)
            return
        seconds = (time.time() - begun) / len(names)
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        for name in names:
            one = found[name]
            if isinstance(one, str):
                self.keep(Entry(part=self.part, name=name, error=one, seconds=seconds))
                continue
            self.keep(
                Entry(
                    part=self.part,
                    name=name,
                    values=one.values,
                    holds=None if one.holds is None else bool(one.holds),
                    goal=one.goal,
                    seconds=seconds,
                    peak_gib=peak_gib,
                )
            )

    def is_done(self, name: str) -> bool:
        """Whether an entry of this part is there, and neither failed nor missed its goal."""
        done = self.entries.get((self.part, name))
        return done is not None and not done.error and done.holds is not False

    def write(self, parts: Sequence[str], machine: Mapping[str, Any], *, seconds: float) -> Any:
        """Write `accept.json` and return it."""
        entries = [entry for entry in self.entries.values() if entry.part in parts]
        left = [entry for entry in entries if entry.error.startswith("not run")]
        fails = [e for e in entries if (e.error and e not in left) or e.holds is False]
        found = {
            "machine": machine,
            "seconds": seconds,
            "holds": sum(entry.holds is True for entry in entries),
            "fails": len(fails),
            "left": len(left),
            "entries": [asdict(entry) | {"result": entry.result} for entry in entries],
        }
        self.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


def commit() -> str:
    """The commit of this checkout, marked if files differ from it; "" without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def facts_of_machine(scale: Scale) -> dict[str, Any]:
    """What the figures were measured on."""
    import deepspeed
    import peft
    import transformers

    facts: dict[str, Any] = {
        "device": "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if scale.on_gpu:
        card = torch.cuda.get_device_properties(scale.device)
        facts |= {"device": card.name, "gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    return facts


def to_markdown(found: Mapping[str, Any]) -> str:
    """The table."""
    lines = ["| part | what | result | figures | goal |", "| --- | --- | --- | --- | --- |"]
    for entry in found["entries"]:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in entry["values"].items())
        if entry["error"]:
            figures = entry["error"].strip().splitlines()[-1][:120]
        cells = (entry["part"], entry["name"], entry["result"], figures, entry["goal"])
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _short(value: float | int | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
