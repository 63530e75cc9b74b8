"""Reading checkpoints of the method's reference implementation, and of T-Few.

Shape letters: T tasks, Q splits, S skills, I and O features of one split, R rank.

The reference stores per adapted linear `<linear>.lora_a` (Q, S, I, R) and `<linear>.lora_b`
(Q, S, R, O), later releases (S, Q, I, R) and (S, R, Q, O); a plain LoRA without Q and S; (IA)3 as
`<linear>.multi_lora_b` (O); and routing as `<linear>.selector.module_logits` (T, Q * S) under the
first of the linears that share a table, or under each of them (docs/method.md 1 to 5). Alpha is in
no tensor. Linears are called as in the backbone, a T5 or a causal language model. Files of T-Few
have the same names, multi_lora_b (O, 1), and a LoRA as (R, I) and (O, R).
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.rebuilding import (
    FindSizes,
    check_tensors,
    fill,
    find_layout,
    local_sizes,
    name_tasks,
    precision_of,
    read_pickled,
    read_safetensors,
    widths_of,
)
from mhr_scale.adapters.sites import Site
from mhr_scale.errors import AdapterError
from mhr_scale.families.family import last_part
from mhr_scale.families.table import family_of_linears, find_prefix

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SIDES = {"lora_a": "A", "lora_b": "B", "multi_lora_b": "l", "selector.module_logits": "logits"}
#: From coarse to fine, so that equal tables stored once per linear are recognised as shared.
GRANULARITIES = ("model", "stack", "block", "sublayer", "linear")
#: Settings of a published run that change what its tensors compute.
UNSUPPORTED = (
    "module_logits_l2_norm",
    "module_logits_straight_through",
    "poly_average_correction",
    "poly_use_shared_skill",
)


def _expert_config(info: Any) -> Any:
    """The settings of an expert, as a later release's library describes it."""
    return info.get("expert_config") if isinstance(info, dict) else info


#: What a checkpoint holds its tensors under, and where their settings then stand: a file of
#: Lightning, one of Lightning under DeepSpeed, an expert of a later release's library.
HELD: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "state_dict": lambda content: content.get("hyper_parameters"),
    "module": lambda content: content.get("hyper_parameters"),
    "expert_weights": lambda content: _expert_config(content.get("expert_info")),
}
#: What comes first in the tensors of an inventory.
First: TypeAlias = Literal["splits", "skills"]

NAME = re.compile(
    r"(?P<linear>.+?)\.(?P<later>experts\.)?"
    r"(?P<side>lora_a|lora_b|multi_lora_b|selector\.module_logits)"
)


def read_published(
    path: Path | str,
    *,
    task_names: Sequence[str] | None = None,
    alpha: float | None = None,
    width: int | None = None,
    first: First | None = None,
) -> Adapter:
    """Read a published checkpoint: safetensors, or torch's own, tensors only.

    Layout, splits, skills, rank and granularity come from names and shapes; `alpha` from the
    checkpoint's hyper-parameters, else 1 as in the published runs. Several skills without routing
    tables are an inventory under uniform routing. (IA)3 alone needs `width`, the backbone's
    width. `first` says which dimension stands first where shapes and hyper-parameters leave it
    open. Raises `AdapterError` if tensors are missing, unknown, mis-shaped or not finite.
    """
    return _read(
        Path(path), task_names=task_names, alpha=alpha, width_of=lambda _: width, first=first
    )[0]


def open_published(
    path: Path | str, *, sizes: FindSizes = local_sizes
) -> tuple[Adapter, dict[str, Any]]:
    """A published checkpoint and what its card says of its origin; `sizes` finds the backbone."""

    def width_of(linears: Sequence[str]) -> int | None:
        raw = sizes(None, is_needed=True)
        return None if raw is None else family_of_linears(linears, raw).width_of(raw)

    return _read(Path(path), width_of=width_of)


def _read(
    file: Path,
    *,
    width_of: Callable[[Sequence[str]], int | None],
    task_names: Sequence[str] | None = None,
    alpha: float | None = None,
    first: First | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    stored, settings = _read_checkpoint(file)
    tensors, tables, is_later = _by_linear(stored, file)
    kind = "ia3" if any(name.endswith(".l") for name in tensors) else "lora"
    width = None
    if kind == "ia3":
        width = width_of([name.removesuffix(".l") for name in tensors])
    else:
        tensors = _turn_pairs(tensors)
        if first is None:
            first = "skills" if is_later else _find_first(tensors, settings, width_of, file)
        if first == "skills":
            tensors = {name: _splits_first(name, tensor) for name, tensor in tensors.items()}
    n_splits, n_skills, rank = _common_shape(tensors)
    widths = widths_of(tensors, n_splits=n_splits, width=width, place=str(file))
    layout, sites = find_layout(widths, place=str(file))
    fields: dict[str, Any] = {
        "kind": kind,
        **layout.settings,
        "rank": rank,
        "alpha": _alpha(settings, file) if alpha is None else alpha,
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
    adapter = fill(fields, sites, tensors, task_names=names, place=str(file))
    return adapter, {"dtype": precision_of(stored)}


# --- the reference's format


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and hyper-parameters of a checkpoint file."""
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    content = read_pickled(file)
    settings: Any = {}
    for name, find_settings in HELD.items():
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            settings = find_settings(content) or {}
            if not isinstance(settings, dict):
                kind = type(settings).__name__
                raise AdapterError(
                    f"{file}: its hyper_parameters are a {kind}, not settings by name"
                )
            content = content[name]
            break
    content = check_tensors(content, file)
    unsupported = [name for name in UNSUPPORTED if settings.get(name)]
    unsupported += ["router_selector: private"] * (settings.get("router_selector") == "private")
    if unsupported:
        listed = ", ".join(unsupported)
        raise AdapterError(f"{file}: its hyper-parameters say {listed}: not supported")
    return content, settings


def _alpha(settings: Mapping[str, Any], file: Path) -> float:
    alpha = settings.get("lora_alpha", 1.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterError(f"{file}: its hyper-parameter lora_alpha is {alpha!r}, not a number")
    return float(alpha)


def _by_linear(
    stored: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Inventory tensors under our names, routing tables by linear, and whether it is a later file.

    The names of some later releases say so.
    """
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
            if side == "l" and tensor.ndim == 2 and tensor.shape[1] == 1:
                tensor = tensor[:, 0]
            is_single = tensor.ndim == (1 if side == "l" else 2)
            tensors[f"{linear}.{side}"] = tensor[None, None] if is_single else tensor
    return tensors, tables, any(".experts." in name for name in stored)


def _split_name(name: str) -> tuple[str, str, str] | None:
    """Prefix, linear and side of a tensor's name; None if it is not named like one."""
    match, begin = NAME.fullmatch(name), find_prefix(name)
    if match is None or begin is None:
        return None
    return name[:begin], match["linear"][begin:], SIDES[match["side"]]


def _pairs(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B, both of four dimensions, of the linears that have them."""
    sides = ((t, tensors.get(f"{name[:-2]}.B")) for name, t in tensors.items() if name[-2:] == ".A")
    return [(a, b) for a, b in sides if b is not None and a.ndim == b.ndim == 4]


def _turn_pairs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """T-Few's single pairs A (R, I) and B (O, R), turned to (I, R) and (R, O).

    Of two readings that shapes allow, the smaller rank is meant.
    """
    pairs = _pairs(tensors)
    if not pairs or any(a.shape[:2] != (1, 1) for a, _ in pairs):
        return tensors
    ours = [a.shape[3] for a, b in pairs if a.shape[3] == b.shape[2]]
    turned = [a.shape[2] for a, b in pairs if a.shape[2] == b.shape[3]]
    if (-len(turned), sum(turned)) >= (-len(ours), sum(ours)):
        return tensors
    return {name: t.transpose(2, 3) if t.ndim == 4 else t for name, t in tensors.items()}


def _splits_first(name: str, tensor: Tensor) -> Tensor:
    """(S, Q, I, R) as (Q, S, I, R), and (S, R, Q, O) as (Q, S, R, O)."""
    if tensor.ndim != 4:
        return tensor
    return tensor.transpose(0, 1) if last_part(name) == "A" else tensor.permute(2, 0, 1, 3)


def _find_first(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    width_of: Callable[[Sequence[str]], int | None],
    file: Path,
) -> First:
    """Whether splits or skills stand first, by shapes, then by what else is known.

    Raises `AdapterError` if everything fits both.
    """
    pairs = _pairs(tensors)
    old = [a.shape[:2] == b.shape[:2] and a.shape[3] == b.shape[2] for a, b in pairs]
    new = [b.shape[:3] == (a.shape[0], a.shape[3], a.shape[1]) for a, b in pairs]
    if sum(new) != sum(old):
        return "skills" if sum(new) > sum(old) else "splits"
    if not any(old):
        return "splits"
    ahead, behind = next(a for (a, _), fits in zip(pairs, old, strict=True) if fits).shape[:2]
    if 1 in (ahead, behind):  # splits route between skills: of one there are none
        return "skills" if behind == 1 < ahead else "splits"
    named = settings.get("n_splits"), settings.get("n_skills")
    fits_settings = named == (ahead, behind), named == (behind, ahead)
    if fits_settings[0] != fits_settings[1]:
        return "splits" if fits_settings[0] else "skills"
    width = None if ahead == behind else width_of([name[:-2] for name in tensors])
    if width is not None:
        split = _width_of_a_split(tensors)
        if split * ahead == width:
            return "splits"
        if split * behind == width:
            return "skills"
    raise AdapterError(
        f"{file}: {ahead} and {behind} may be splits and skills, as earlier releases store them, "
        "or skills and splits, as later ones do; read it with read_published(file, first='splits') "
        "or first='skills' of mhr_scale.adapters.reference_checkpoints, and save it with "
        "mhr_scale.save_adapter"
    )


def _width_of_a_split(tensors: Mapping[str, Tensor]) -> int:
    """What most of the linears that read the residual stream have of it in a split; 0 if none."""
    linears = [name[:-2] for name in tensors if name[-2:] == ".A"]
    inputs = family_of_linears(linears).inputs
    widths = Counter(
        tensors[f"{linear}.A"].shape[2]
        for linear in linears
        if last_part(linear) not in inputs and tensors[f"{linear}.A"].ndim == 4
    )
    return widths.most_common(1)[0][0] if widths else 0


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
