"""Short runs of pre-training on the toy suite: devices, types, placements, resumed ones.

Each goes through `pretrain` as a launch does. AdamW moves a number whose gradient is rounding alone
as far as any other, so curves of losses are compared, and adapters only where bits are promised.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from board import Board, Found, Scale
from compared import EPS, furthest_of_numbers, held, on_cpu, share_of_equal, where, without_tf32
from processes import ROOT, read_metrics, succeed_together, timeless
from safetensors.torch import load_file

from mhr_scale.config import PretrainConfig, RunConfig
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.pretrain import pretrain

RECIPE = str(ROOT / "launch" / "recipes" / "toy.yaml")
SAME = 1e-4
HALF = 4 * EPS[torch.bfloat16]
#: Steps, and the sizes of what is trained on.
FULL = (30, {"tasks.n_tasks": 16, "batch.batch_size": 32, "batch.micro_batch_size": 16})
TINY = (6, {"tasks.n_tasks": 4, "batch.batch_size": 8, "batch.micro_batch_size": 4})
#: A launch that has not ended by then is killed, and its entry is an error.
LAUNCH_SECONDS = 120.0
#: A run that draws noise for its routing, so that seeds have to go on too.
NOISY = ("adapter.policy=noisy",)
DETERMINISTIC = "run.deterministic=true"


def measure(board: Board, scale: Scale) -> None:
    """The device against the CPU, bfloat16, resumed and deterministic runs, ZeRO-3."""
    without_tf32()
    with where(scale), tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), scale)
        board.run("run on the device", lambda: on_device(runs))
        board.run("run in bf16", lambda: in_half(runs))
        board.run("run resumed", lambda: resumed(runs))
        board.run("run, deterministic", lambda: deterministic(runs))
        board.run("run under ZeRO-3", lambda: sharded(runs))


@dataclass(frozen=True)
class Runs:
    """Finished runs below a folder, by name; each is made when it is asked for."""

    folder: Path
    scale: Scale

    @property
    def steps(self) -> int:
        """Optimizer steps of each."""
        return (TINY if self.scale.is_tiny else FULL)[0]

    def words(self, name: str, *overrides: str) -> list[str]:
        """The settings of a run."""
        sizes = (TINY if self.scale.is_tiny else FULL)[1]
        return [
            f"run.folder={self.folder / name}",
            f"schedule.steps={self.steps}",
            f"run.save_every={self.steps // 2}",
            "run.log_every=1",
            "tasks.train_examples=20",
            "tasks.validation_examples=2",
            *(f"{key}={value}" for key, value in sizes.items()),
            *overrides,
        ]

    def get(self, name: str, *overrides: str, is_on_cpu: bool = False) -> Path:
        """A run in this process."""
        folder = self.folder / name
        if not (folder / "adapter").exists():
            with ExitStack() as stack:
                stack.enter_context(redirect_stdout(sys.stderr))
                if is_on_cpu:
                    stack.enter_context(on_cpu())
                pretrain(load(PretrainConfig, RECIPE, self.words(name, *overrides)))
        return folder

    def make_apart(self, names: Sequence[str], *overrides: str) -> None:
        """Runs in a process of their own on a GPU: CUDA reads some settings only as it starts."""
        if self.scale.on_gpu:
            self.launch(*(self.words(name, *overrides) for name in names), ranks=0)
            return
        for name in names:
            self.get(name, *overrides)

    def stop_half_way(self, name: str, copy: str) -> None:
        """A copy of a run as it was after its first save."""
        shutil.copytree(self.folder / name, self.folder / copy)
        shutil.rmtree(self.folder / copy / "steps" / f"{self.steps:06d}")
        shutil.rmtree(self.folder / copy / "adapter")

    def launch(self, *commands: list[str], ranks: int) -> None:
        """Runs one after the other in another process, under the launcher for `ranks`."""
        accelerator = "cuda" if self.scale.on_gpu else "cpu"
        scripts = [("launch/pretrain.py", RECIPE, *words) for words in commands]
        options: dict[str, Any] = {"accelerator": accelerator, "timeout": LAUNCH_SECONDS}
        succeed_together(scripts, self.folder, ranks=ranks, **options)


def losses(run: Path) -> list[float]:
    """Of every step, then of the validations at the start and in the end."""
    lines = read_metrics(run)
    kinds = ("loss", "validation_loss")
    return [line[kind] for kind in kinds for line in lines if kind in line]


def adapter(run: Path) -> dict[str, Any]:
    """What was trained."""
    return load_file(run / "adapter" / "adapter.safetensors")


def on_device(runs: Runs) -> Found:
    """The curve in float32."""
    truth = losses(runs.get("cpu", is_on_cpu=True))
    found = losses(runs.get("float32"))
    values = {"losses": furthest_of_numbers(found, truth), "steps": runs.steps}
    return held(values, SAME, "every loss within 1e-4 of the CPU's")


def in_half(runs: Runs) -> Found:
    """The curve over a backbone in bfloat16."""
    whole = losses(runs.get("float32"))
    found = losses(runs.get("bfloat16", "backbone.dtype=bfloat16"))
    values = {"losses": furthest_of_numbers(found, whole)}
    return held(values, HALF, "every loss within 4 eps of bfloat16 (0.031) of float32's")


def resumed(runs: Runs) -> Found:
    """A run that stopped half way, against one that did not, in the default mode."""
    whole = runs.get("whole", *NOISY)
    runs.stop_half_way("whole", "resumed")
    return same(runs.get("resumed", *NOISY), whole, is_exact=not runs.scale.on_gpu)


def deterministic(runs: Runs) -> Found:
    """The same, and the run a second time, under `run.deterministic`."""
    if "deterministic" not in {field.name for field in fields(RunConfig)}:
        return Found({"skipped": "there is no run.deterministic"})
    settings = (*NOISY, DETERMINISTIC)
    runs.make_apart(["first", "second"], *settings)
    runs.stop_half_way("first", "again")
    runs.make_apart(["again"], *settings)
    first, second, again = (runs.folder / name for name in ("first", "second", "again"))
    parts = [same(second, first, is_exact=True), same(again, first, is_exact=True)]
    values = {
        f"{name}_{key}": value
        for name, part in zip(("second", "resumed"), parts, strict=True)
        for key, value in part.values.items()
    }
    return Found(values, holds=all(part.holds for part in parts), goal=parts[0].goal)


def same(found: Path, expected: Path, *, is_exact: bool) -> Found:
    """Losses and adapter of two runs that are one."""
    equal = share_of_equal(adapter(found), adapter(expected))
    far = furthest_of_numbers(losses(found), losses(expected))
    is_same = equal == 1.0 and timeless(found) == timeless(expected)
    goal = "bit for bit" if is_exact else "every loss within 1e-4; bits are a figure"
    return Found(
        {"losses": far, "equal_tensors": f"{equal:.0%}"},
        holds=is_same if is_exact else far <= SAME,
        goal=goal,
    )


def sharded(runs: Runs) -> Found:
    """One card under ZeRO-3, through the launcher, against the same card replicated."""
    runs.launch(runs.words("zero3", "run.ds_config=ds_configs/cpu.json"), ranks=1)
    return same(runs.folder / "zero3", runs.get("float32"), is_exact=not runs.scale.on_gpu)
