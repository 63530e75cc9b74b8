"""Adapters rebuilt from tensors that come without their backbone: what all readers share.

Shape letters: Q splits, S skills, I and O features of one split, R rank.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhr_scale.adapters import artefact
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.sites import Site, recognise_sites
from mhr_scale.errors import AdapterError, ConfigError, LayoutError, first_line
from mhr_scale.families.family import last_part
from mhr_scale.families.table import family_of_linears, known_fields
from mhr_scale.run import repositories
from mhr_scale.run.files import read_object

#: Dimensions of A (Q, S, I, R), B (Q, S, R, O) and l (Q, S, O) that hold the features of a split.
FEATURES = {"A": ("in", 2), "B": ("out", 3), "l": ("out", 2)}
#: The number of a block, or of a sub-layer, in a name.
NUMBERS = re.compile(r"\.\d+\.")
#: The way out where an adapter's files do not lead to their backbone.
SET_BACKBONE = "set backbone_moved_to (finetune: backbone.name) to a folder or hub id"
#: Data types that adapters are stored in; all are held as float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FindSizes(Protocol):
    """Finds the config.json of the backbone that an adapter's files name, if they name one.

    Where it is not needed, nothing is fetched for it; None if it is not found.
    """

    def __call__(self, name: str | None, *, is_needed: bool) -> Mapping[str, Any] | None:
        """The contents of the config.json."""


def local_sizes(name: str | None, *, is_needed: bool = False) -> Mapping[str, Any] | None:
    """The config.json of a local folder, or the sizes of a backbone that are known."""
    if not name:
        return None
    file = Path(name) / "config.json"
    with suppress(OSError):  # a name that is no path
        if file.is_file():
            return read_object(file, AdapterError)
    return known_fields(repositories.name_of(name))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises `AdapterError` if it is missing or broken."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file}: not a safetensors file ({first_line(error)}); copy it again"
        ) from error
    return check_tensors(tensors, file)


def read_pickled(file: Path) -> Any:
    """What torch's own file holds, without running any code that it may hold."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError) as error:
        raise AdapterError(
            f"{file}: cannot be read as tensors alone ({first_line(error)}); store its state_dict "
            "as safetensors"
        ) from error


def check_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; raises `AdapterError` for what no adapter is made of."""
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise AdapterError(f"{file}: holds no state_dict (names and tensors)")
    for name, tensor in content.items():
        fault = None
        if not isinstance(name, str):
            fault = "its name is no text"
        elif tensor.layout != torch.strided:
            fault = f"is stored as {tensor.layout}, not dense"
        elif tensor.device.type != "cpu":
            fault = f"has no numbers (device {tensor.device})"
        elif tensor.dtype not in DTYPES:
            known = ", ".join(dtype_name(dtype) for dtype in DTYPES)
            fault = f"is {dtype_name(tensor.dtype)}; adapters are {known}"
        if fault:
            raise AdapterError(f"{file}: {name!r} {fault}; save the adapter's own tensors only")
    return content


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a data type as recipes spell it."""
    return str(dtype).removeprefix("torch.")


def precision_of(tensors: Mapping[str, Tensor]) -> str:
    """The data types that tensors are stored in."""
    return ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))


def widths_of(
    tensors: Mapping[str, Tensor],
    *,
    n_splits: int,
    place: str,
    width: int | None = None,
    reads: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Full (in, out) widths of each linear: the most common ones of the same linear of all blocks.

    (IA)3 vectors tell the output width alone: a linear then reads as much as `reads` says by name,
    else `width` features, or the output of the linear that the family's `inputs` name for it.
    """
    votes: dict[tuple[str, str], Counter[int]] = {}
    all_votes: dict[tuple[str, str], Counter[int]] = {}  # of linears of one name, for a tie
    linears: dict[str, str] = {}
    for name, tensor in tensors.items():
        linear, _, side = name.rpartition(".")
        if side not in FEATURES:
            continue
        linears[linear] = kind = NUMBERS.sub(".", linear)
        way, dim = FEATURES[side]
        if tensor.ndim == (3 if side == "l" else 4):
            found = tensor.shape[dim] * n_splits
            votes.setdefault((kind, way), Counter())[found] += 1
            all_votes.setdefault((last_part(kind), way), Counter())[found] += 1
    common = {
        (kind, way): max(n, key=lambda size: (n[size], all_votes[last_part(kind), way][size]))
        for (kind, way), n in votes.items()
    }
    if any(name.endswith(".l") for name in tensors):
        inputs = _inputs_of(linears, common, width, place=place, known=reads or {})
        common |= {(kind, "in"): inputs[linear] for linear, kind in linears.items()}
    return {
        linear: (common.get((kind, "in"), n_splits), common.get((kind, "out"), n_splits))
        for linear, kind in linears.items()
    }


def _inputs_of(
    linears: Mapping[str, str],
    common: Mapping[tuple[str, str], int],
    width: int | None,
    *,
    place: str,
    known: Mapping[str, int],
) -> dict[str, int]:
    """How many features each linear reads, by what others write; `linears` are kinds by name."""
    inputs = family_of_linears(linears).inputs
    writes = {last_part(kind): n for (kind, way), n in common.items() if way == "out"}
    width = next((writes[reader] for reader in inputs if reader in writes), width)
    if width is None and not known:
        raise AdapterError(
            f"{place}: (IA)3 vectors do not tell the width of the backbone, and the backbone is "
            f"not known; {SET_BACKBONE}, or pass width"
        )
    return {
        linear: known.get(linear, writes.get(inputs.get(last_part(linear), ""), width or 1))
        for linear in linears
    }


def find_layout(
    widths: Mapping[str, tuple[int, int]], *, place: str, blocks: str | None = None
) -> tuple[Layout, tuple[Site, ...]]:
    """Layout and sites of linears, in `blocks` if it says so.

    `AdapterError` names linears that fit no layout.
    """
    try:
        return recognise_sites(widths, blocks=blocks)
    except LayoutError as error:
        raise AdapterError(f"{place}: {error}") from error


def name_tasks(given: Sequence[str] | None, n_tasks: int | None, *, place: str) -> tuple[str, ...]:
    """The given task names, or numbered ones; `n_tasks` is None where no tensor counts tasks."""
    if given is None:
        return tuple(f"task_{number}" for number in range(1 if n_tasks is None else n_tasks))
    if n_tasks is not None and len(given) != n_tasks:
        raise AdapterError(f"{place}: {len(given)} task names for {n_tasks} routing rows")
    return tuple(given)


def fill(
    fields: Mapping[str, Any],
    sites: tuple[Site, ...],
    tensors: Mapping[str, Tensor],
    *,
    task_names: Sequence[str],
    place: str,
) -> Adapter:
    """An adapter of these settings with these tensors, strictly (`artefact.load_tensors`)."""
    try:
        config = AdapterConfig(**fields)
        artefact.check_size(config, sites, len(task_names), tensors, place=place)
        adapter = Adapter(config, sites, task_names=task_names)
    except (ConfigError, LayoutError, AdapterError) as error:
        raise AdapterError(f"{place}: {error}") from error
    artefact.load_tensors(adapter, tensors, place=place)
    return adapter
