"""Saved steps: atomic folders under `steps/`, and what a run needs to go on from one.

    steps/000500/   adapter.safetensors  adapter.json  resume/  DONE

A folder is written under another name, flushed, moved into place, and gets DONE last; a folder
without DONE does not exist. Optimizer state is stored whole and by parameter name, so a run goes on
with any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter, state
from mhr_scale.errors import RunError
from mhr_scale.optim import OptimizerState
from mhr_scale.runlog import log, write_json

DONE = "DONE"
#: What reading the files of a saved step raises where they are missing or damaged.
UNREADABLE = (
    OSError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    KeyError,
    TypeError,
    SafetensorError,
)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a saved step holds; `progress` also has the step."""

    adapter: Adapter
    optimizer: OptimizerState
    progress: dict[str, Any]


def step_folder(run: Path, step: int) -> Path:
    """Folder of a saved step."""
    return run / "steps" / f"{step:06d}"


def complete_steps(run: Path) -> list[int]:
    """Numbers of the complete saved steps, ascending."""
    names = [done.parent.name for done in run.glob(f"steps/*/{DONE}")]
    return sorted(int(name) for name in names if name.isdecimal())


def save(
    run: Path,
    adapter: Adapter,
    optimizer: OptimizerState,
    *,
    step: int,
    progress: Mapping[str, Any],
    backbone: Mapping[str, Any],
    origin: Mapping[str, Any],
    keep: int,
    publish: bool = True,
) -> Path:
    """Write a saved step and, to `publish`, make it the run's `adapter/`. One rank calls it.

    `progress` is what `read` gives back: JSON values that say where the run stands. The newest
    `keep` steps stay, older ones go.
    """
    folder = step_folder(run, step)
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    state.save(adapter, partial, step=step, backbone=backbone, origin=origin)
    resume = partial / "resume"
    resume.mkdir()
    tensors, numbers = optimizer
    save_file(tensors, resume / "optimizer.safetensors")
    write_json(
        resume / "progress.json",
        {
            "step": step,
            "optimizer": numbers,
            "sha256": state.hash_file(resume / "optimizer.safetensors"),
            **progress,
        },
    )
    for path in (resume / "optimizer.safetensors", resume, partial):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    (folder / DONE).touch()
    _flush(folder)
    _flush(folder.parent)
    if publish:
        state.save(adapter, run / "adapter", step=step, backbone=backbone, origin=origin)
    for old in complete_steps(run)[:-keep]:
        (step_folder(run, old) / DONE).unlink()
        shutil.rmtree(step_folder(run, old))
    return folder


def find_resume(run: Path) -> int | None:
    """Newest complete step of a run folder, or None."""
    steps = complete_steps(run)
    return steps[-1] if steps else None


def read(run: Path, step: int) -> Saved:
    """Read a saved step; raises `RunError` or `AdapterError` if anything is missing or damaged."""
    folder = step_folder(run, step)
    stored = state.load(folder)
    file = folder / "resume" / "optimizer.safetensors"
    try:
        progress: dict[str, Any] = json.loads((folder / "resume" / "progress.json").read_text())
        if state.hash_file(file) != progress["sha256"]:
            raise RunError(f"{file}: its hash is not the stored one; delete this step and resume")
        return Saved(stored, (load_file(file), progress["optimizer"]), progress)
    except UNREADABLE as error:
        raise _not_resumable(folder, error) from error


def load(run: Path, step: int, adapter: Adapter, optimizer: Optimizer) -> dict[str, Any]:
    """Load a saved step into an adapter and its optimizer; returns its `progress`.

    Raises `RunError` or `AdapterError` if anything is missing, damaged or of another shape.
    """
    folder, saved = step_folder(run, step), read(run, step)
    if saved.adapter.config != adapter.config or saved.adapter.sites != adapter.sites:
        raise RunError(f"{folder}: another layout or method than the recipe's; use another folder")
    if saved.adapter.task_names != adapter.task_names:
        raise RunError(f"{folder}: other tasks than the recipe's; use another run.folder")
    state.load_tensors(adapter, state.named_tensors(saved.adapter), place=str(folder))
    try:
        _unflatten(adapter, optimizer, *saved.optimizer)
    except UNREADABLE as error:
        raise _not_resumable(folder, error) from error
    log.info("resumed from %s", folder)
    return saved.progress


def _not_resumable(folder: Path, error: BaseException) -> RunError:
    return RunError(f"{folder}: cannot resume from it ({error!r}); delete this step")


def optimizer_state(adapter: Adapter, optimizer: Optimizer) -> OptimizerState:
    """An optimizer's state as named tensors and named numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


@torch.no_grad()
def _unflatten(
    adapter: Adapter,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, float]],
) -> None:
    parameters = dict(adapter.named_parameters())
    for name in {key.rsplit("/", 1)[0] for key in tensors} | set(numbers):
        parameter = parameters[name]
        own: dict[str, Any] = dict(numbers.get(name, {}))
        for key, value in tensors.items():
            owner, _, part = key.rpartition("/")
            if owner == name:
                own[part] = value if value.dim() == 0 else value.to(parameter.device)
        optimizer.state[parameter] = own


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
