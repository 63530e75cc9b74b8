"""Reading adapters without their backbone: published checkpoints, and what all readers share.

Shape letters: T tasks, Q splits, S skills, I and O features of one split, R rank.

The method's reference implementation stores per adapted linear `<linear>.lora_a` (Q, S, I, R) and
`<linear>.lora_b` (Q, S, R, O), a plain LoRA without Q and S, (IA)3 as `<linear>.multi_lora_b` (O),
and routing as `<linear>.selector.module_logits` (T, Q * S) under the first of the linears that
share a table, or under each of them (docs/method.md 1 to 5). Alpha is in no tensor.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhr_scale.adapters import artefact
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.sites import Site, recognise_sites
from mhr_scale.errors import AdapterError, ConfigError, LayoutError, first_line
from mhr_scale.families.table import family_of_linears, find_prefix

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SIDES = {"lora_a": "A", "lora_b": "B", "multi_lora_b": "l", "selector.module_logits": "logits"}
#: Dimensions of A (Q, S, I, R), B (Q, S, R, O) and l (Q, S, O) that hold the features of a split.
FEATURES = {"A": ("in", 2), "B": ("out", 3), "l": ("out", 2)}
#: From coarse to fine, so that equal tables stored once per linear are recognised as shared.
GRANULARITIES = ("model", "stack", "block", "sublayer", "linear")
#: Settings of a published run that change what its tensors compute.
UNSUPPORTED = (
    "module_logits_l2_norm",
    "module_logits_straight_through",
    "poly_average_correction",
    "poly_use_shared_skill",
)

NAME = re.compile(r"(?P<linear>.+?)\.(?P<side>lora_a|lora_b|multi_lora_b|selector\.module_logits)")


def read_published(
    path: Path | str,
    *,
    task_names: Sequence[str] | None = None,
    alpha: float | None = None,
    width: int | None = None,
) -> Adapter:
    """Read a checkpoint of the reference implementation: safetensors, or torch's own, tensors only.

    Layout, splits, skills, rank and granularity come from names and shapes; `alpha` from the
    checkpoint's hyper-parameters, else 1 as in the published runs. Several skills without routing
    tables are an inventory under uniform routing. (IA)3 alone needs `width`, the backbone's
    width. Raises `AdapterError` if tensors are missing, unknown, mis-shaped or not finite.
    """
    file = Path(path)
    stored, settings = _read_checkpoint(file)
    tensors, tables = _by_linear(stored, file)
    n_splits, n_skills, rank = _common_shape(tensors)
    widths = widths_of(tensors, n_splits=n_splits, width=width, place=str(file))
    layout, sites = find_layout(widths, place=str(file))
    fields: dict[str, Any] = {
        "kind": "ia3" if any(name.endswith(".l") for name in tensors) else "lora",
        "layout": layout,
        "rank": rank,
        "alpha": float(settings.get("lora_alpha", 1.0) if alpha is None else alpha),
        "n_splits": n_splits,
        "n_skills": n_skills,
    }
    n_tasks = None
    if n_skills > 1 and _is_average(tables, n_splits, n_skills):
        fields["policy"] = "uniform"
    elif n_skills > 1:
        fields["granularity"], routing = _share(tables, sites, place=str(file))
        fields["policy"] = "noisy" if settings.get("module_logits_relaxed_bernoulli") else "learned"
        for name, table_TX in routing.items():
            fits = table_TX.ndim == 2 and table_TX.shape[1] == n_splits * n_skills
            tensors[f"{name}.routing_logits"] = (
                table_TX.unflatten(1, (n_splits, n_skills)) if fits else table_TX
            )
        rows = Counter(table.shape[0] if table.ndim else 0 for table in tables.values())
        n_tasks = rows.most_common(1)[0][0]
    names = name_tasks(task_names, n_tasks, place=str(file))
    return fill(fields, sites, tensors, task_names=names, place=str(file))


# --- what all readers share


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises `AdapterError` if it is missing or broken."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file}: not a safetensors file ({first_line(error)}); copy it again"
        ) from error


def widths_of(
    tensors: Mapping[str, Tensor], *, n_splits: int, place: str, width: int | None = None
) -> dict[str, tuple[int, int]]:
    """Full (in, out) widths of each linear: the most common ones of the linears of its kind.

    (IA)3 vectors tell the output width alone: a linear then reads `width` features, or the output
    of the linear that the family's `inputs` name for it.
    """
    votes: dict[tuple[str, str], Counter[int]] = {}
    linears: dict[str, str] = {}
    for name, tensor in tensors.items():
        linear, _, side = name.rpartition(".")
        if side not in FEATURES:
            continue
        linears[linear] = kind = linear.rpartition(".")[2]
        way, dim = FEATURES[side]
        if tensor.ndim == (3 if side == "l" else 4):
            votes.setdefault((kind, way), Counter())[tensor.shape[dim] * n_splits] += 1
    common = {key: counter.most_common(1)[0][0] for key, counter in votes.items()}
    if any(name.endswith(".l") for name in tensors):
        inputs = family_of_linears(linears).inputs
        width = next((common[r, "out"] for r in inputs if (r, "out") in common), width)
        if width is None:
            raise AdapterError(
                f"{place}: (IA)3 vectors do not tell the width of the backbone; pass width"
            )
        reads = {reader: common.get((writer, "out"), width) for reader, writer in inputs.items()}
        common |= {(kind, "in"): reads.get(kind, width) for kind in linears.values()}
    return {
        linear: (common.get((kind, "in"), n_splits), common.get((kind, "out"), n_splits))
        for linear, kind in linears.items()
    }


def find_layout(
    widths: Mapping[str, tuple[int, int]], *, place: str
) -> tuple[str, tuple[Site, ...]]:
    """Layout and sites of linears; `AdapterError` names those that fit no layout."""
    try:
        return recognise_sites(widths)
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


# --- the reference's format


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and hyper-parameters of a checkpoint file."""
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError) as error:
        raise AdapterError(
            f"{file}: cannot be read as tensors alone ({first_line(error)}); store its state_dict "
            "as safetensors"
        ) from error
    settings = {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        settings = dict(content.get("hyper_parameters") or {})
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise AdapterError(f"{file}: holds no state_dict (names and tensors)")
    unsupported = [name for name in UNSUPPORTED if settings.get(name)]
    unsupported += ["router_selector: private"] * (settings.get("router_selector") == "private")
    if unsupported:
        listed = ", ".join(unsupported)
        raise AdapterError(f"{file}: its hyper-parameters say {listed}: not supported")
    return content, settings


def _by_linear(
    stored: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inventory tensors under our names, and routing tables by linear."""
    places = {name: _split_name(name) for name in stored}
    unknown = [name for name, place in places.items() if place is None]
    if unknown:
        raise AdapterError(
            f"{file}: {len(unknown)} of {len(stored)} tensors are not named "
            f"<linear>.{{{', '.join(SIDES)}}}, such as {', '.join(sorted(unknown)[:3])}; keep the "
            "adapter's own tensors only"
        )
    prefixes = sorted({place[0] for place in places.values() if place})
    if len(prefixes) != 1:
        raise AdapterError(
            f"{file}: tensors under {len(prefixes)} prefixes {prefixes[:5]}, not one"
        )
    tensors, tables = {}, {}
    for name, place in places.items():
        assert place is not None
        tensor, (_, linear, side) = stored[name], place
        if side == "logits":
            tables[linear] = tensor
        else:
            is_single = tensor.ndim == (1 if side == "l" else 2)
            tensors[f"{linear}.{side}"] = tensor[None, None] if is_single else tensor
    return tensors, tables


def _split_name(name: str) -> tuple[str, str, str] | None:
    """Prefix, linear and side of a tensor's name; None if it is not named like one."""
    match, begin = NAME.fullmatch(name), find_prefix(name)
    if match is None or begin is None:
        return None
    return name[:begin], match["linear"][begin:], SIDES[match["side"]]


def _common_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Splits, skills and rank that most tensors have."""
    shapes = Counter(
        (*tensor.shape[:2], tensor.shape[3] if tensor.ndim == 4 else 1)
        for name, tensor in tensors.items()
        if (name.endswith(".A") and tensor.ndim == 4) or (name.endswith(".l") and tensor.ndim == 3)
    )
    n_splits, n_skills, rank = shapes.most_common(1)[0][0] if shapes else (1, 1, 1)
    return n_splits, n_skills, rank


def _is_average(tables: Mapping[str, Tensor], n_splits: int, n_skills: int) -> bool:
    """Whether routing is uniform: no table, or the reference's constant ones (Q, S) of 1 / S."""
    return all(
        table.shape == (n_splits, n_skills) and bool((table == 1.0 / n_skills).all())
        for table in tables.values()
    )


def _share(
    tables: Mapping[str, Tensor], sites: tuple[Site, ...], *, place: str
) -> tuple[str, dict[str, Tensor]]:
    """The granularity at which every group has one table, and the tables by group."""
    known = {site.name for site in sites}
    unknown = {linear: table for linear, table in tables.items() if linear not in known}
    for granularity in GRANULARITIES:
        groups: dict[str, list[Tensor]] = {}
        for site in sites:
            group = groups.setdefault(site.routing_group(granularity, 1), [])
            if site.name in tables:
                group.append(tables[site.name])
        if all(
            group and all(torch.equal(group[0], t) for t in group[1:]) for group in groups.values()
        ):
            return granularity, {name: group[0] for name, group in groups.items()} | unknown
    without = [site.name for site in sites if site.name not in tables]
    raise AdapterError(
        f"{place}: {len(tables)} routing tables fit no granularity ({', '.join(GRANULARITIES)}); "
        f"linears without one: {', '.join(without[:5])}"
    )
