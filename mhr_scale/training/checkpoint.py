"""Saved steps: sealed folders under `steps/`, with all that a run needs to resume from one.

    steps/000500/   adapter.safetensors  adapter.json  resume/  DONE

Optimizer state is stored unsharded, by parameter name, so a run resumes with any number of ranks.
A damaged save is detected by its hashes and set aside; the one before it is used instead.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.errors import RunError
from mhr_scale.run import failures
from mhr_scale.run.files import hash_file, write_json
from mhr_scale.run.folders import sealed, unseal
from mhr_scale.run.runlog import log
from mhr_scale.run.tensors import save_tensors
from mhr_scale.training.optim import OptimizerState, check_states
from mhr_scale.training.saved_steps import complete_steps, find_resume, step_folder

#: Errors of reading a saved step whose files are missing or damaged.
UNREADABLE = (
    OSError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Saved:
    """The contents of a saved step; `progress` includes the step."""

    adapter: Adapter
    optimizer: OptimizerState
    progress: dict[str, Any]


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
    spare: Collection[int] = (),
    keep_best: bool = False,
    publish: bool = True,
) -> Path:
    """Write a saved step and, with `publish`, make it the run's `adapter/`. One rank calls it.

    `progress` is the state of the run, as JSON values that `read` returns. The newest `keep` steps
    are kept, those in `spare` and, with `keep_best`, the one with the lowest `validation_loss` in
    its progress; others are removed. Raises `RunError` if it cannot be written; earlier saves are
    then intact.
    """
    folder = step_folder(run, step)
    try:
        with sealed(folder) as partial:
            artefact.save(adapter, partial, step=step, backbone=backbone, origin=origin)
            _save_resume(partial / "resume", optimizer, {"step": step, **progress})
        if publish:
            artefact.save(adapter, run / "adapter", step=step, backbone=backbone, origin=origin)
    except (OSError, SafetensorError) as error:
        raise not_saved(run, folder, error) from error
    best = {find_best(run)} if keep_best else set()
    remove_old(run, keep=keep, spare={*spare, *best})
    return folder


def _save_resume(folder: Path, optimizer: OptimizerState, progress: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors, numbers = optimizer
    file = folder / "optimizer.safetensors"
    save_tensors(tensors, file)
    facts = {"optimizer": numbers, "sha256": hash_file(file), **progress}
    write_json(folder / "progress.json", facts)


def not_saved(run: Path, folder: Path, error: Exception) -> RunError:
    """The error to raise if a step could not be written."""
    step = find_resume(run)
    saved = "nothing is saved yet" if step is None else f"step {step} is saved and whole"
    return RunError(
        f"{folder}: not saved: {failures.describe(error)}; {saved}; the same command goes on"
    )


def remove_old(run: Path, *, keep: int, spare: Collection[int | None] = ()) -> None:
    """Remove all saved steps except the newest `keep` and those in `spare`."""
    for step in complete_steps(run)[:-keep]:
        if step not in spare:
            unseal(step_folder(run, step))


def find_best(run: Path) -> int | None:
    """The saved step with the lowest validation loss, the first of equal ones; None without any."""
    losses = []
    for step in complete_steps(run):
        try:
            text = (step_folder(run, step) / "resume" / "progress.json").read_text("utf-8")
            loss = json.loads(text).get("validation_loss")
        except UNREADABLE:
            continue
        if isinstance(loss, int | float):
            losses.append((loss, step))
    return min(losses)[1] if losses else None


def publish(run: Path, step: int) -> None:
    """Make a saved step the run's `adapter/`, unless it already is. One process calls it.

    A run killed during its last save may have left the step before there, or half of this one.
    """
    source, target = step_folder(run, step), run / "adapter"
    try:
        artefact.copy(source, target)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {failures.describe(error)}") from error


def read(run: Path, step: int) -> Saved:
    """Read a saved step; raises `RunError` or `AdapterError` if anything is missing or damaged."""
    folder = step_folder(run, step)
    stored = artefact.load(folder)
    file = folder / "resume" / "optimizer.safetensors"
    try:
        progress: dict[str, Any] = json.loads((folder / "resume" / "progress.json").read_text())
        if hash_file(file) != progress["sha256"]:
            raise RunError(f"{file}: its hash is not the stored one; delete this step")
        if progress["step"] != step:
            raise RunError(f"{folder}: says that it is step {progress['step']!r}; delete this step")
        return Saved(stored, (load_file(file), dict(progress["optimizer"])), progress)
    except RunError:
        raise
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
    artefact.load_tensors(adapter, artefact.named_tensors(saved.adapter), place=str(folder))
    try:
        _unflatten(adapter, optimizer, *saved.optimizer)
    except (*UNREADABLE, ValueError) as error:
        raise _not_resumable(folder, error) from error
    check_states(optimizer, adapter, place=str(folder / "resume" / "optimizer.safetensors"))
    log.info("resumed from %s", folder)
    return saved.progress


def _not_resumable(folder: Path, error: BaseException) -> RunError:
    return RunError(f"{folder}: cannot resume from it ({error!r}); delete this step")


@torch.no_grad()
def copy_adapter(adapter: Adapter, into: Adapter | None) -> Adapter:
    """A copy on the host that the next step does not modify; `into` is an earlier copy to reuse."""
    if into is None:
        into = Adapter(adapter.config, adapter.sites, task_names=adapter.task_names)
    for target, parameter in zip(into.parameters(), adapter.parameters(), strict=True):
        target.copy_(parameter)
    return into


def optimizer_state(adapter: Adapter, optimizer: Optimizer) -> OptimizerState:
    """A copy of an optimizer's state on the host, as named tensors and named numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
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
        state: dict[str, Any] = dict(numbers.get(name, {}))
        for key, value in tensors.items():
            owner, _, part = key.rpartition("/")
            if owner == name:
                state[part] = value.to(parameter.device)
        optimizer.state[parameter] = state
