"""PEFT's single adapters in our shapes: one rank and one scale, all linears of a layout.

Shape letters: I in features, O out features, R rank.

A LoRA of ours has a pair of one rank in every linear of a layout, and one scale. PEFT's may differ
from linear to linear, and have other linears in one block than in the next. What is missing of the
smallest layout with all of them is filled with zeros in A and in B: it adds nothing, and as neither
side has a gradient, no training changes that. What it costs is the memory and time of that layout;
in a tensor padded to a larger rank the zeros count in its RMS, which Adafactor reads. Another scale
than most linears have goes into B.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters import artefact
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.peft_files import (
    CONFIG,
    MERGE,
    base_of,
    blocks_of,
    check_number,
    find_tensors,
    is_target,
    refusal,
)
from mhr_scale.adapters.rebuilding import SET_BACKBONE, FindSizes, widths_of
from mhr_scale.adapters.sites import Site, recognise_sites, sites_in
from mhr_scale.errors import AdapterError, ConfigError, LayoutError, some
from mhr_scale.families.family import last_part
from mhr_scale.families.table import family_of_linears


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Tensors A (1, 1, I, R) and B (1, 1, R, O) of one rank and one scale, and what was changed."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    facts: dict[str, Any] = field(default_factory=dict)


# --- LoRA: ranks and scales


def to_pairs(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Pairs:
    """The pairs of a folder's tensors lora_A (R, I) and lora_B (O, R).

    Raises `AdapterError` if a pair has another rank than the configuration says.
    """
    found = {name: t.T[None, None] if t.ndim == 2 else t for name, t in tensors.items()}
    ranks, alphas = _patterns(config, folder)
    rank, alpha = config["r"], float(config["lora_alpha"])
    is_rs = bool(config.get("use_rslora"))
    if not ranks and not alphas:
        return Pairs(tensors=found, rank=rank, alpha=alpha * math.sqrt(rank) if is_rs else alpha)
    scales: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for linear in dict.fromkeys(_linear_of(name) for name in found if _is_side(name)):
        sizes[linear] = size = int(_match(ranks, linear, rank))
        _check_rank(found, linear, size, folder)
        scales[linear] = _match(alphas, linear, alpha) / (math.sqrt(size) if is_rs else size)
    largest = max(sizes.values())
    used = Counter(scale for scale in scales.values() if scale)
    scale = used.most_common(1)[0][0] if used else 1.0
    for name in [name for name in found if _is_side(name)]:
        linear, missing = _linear_of(name), largest - sizes[_linear_of(name)]
        if name.endswith(".A"):
            found[name] = F.pad(found[name], (0, missing))
        else:
            factor = scales[linear] / scale
            scaled = found[name] if factor == 1.0 else found[name].float() * factor
            found[name] = F.pad(scaled, (0, 0, 0, missing))
    facts: dict[str, Any] = {}
    if min(sizes.values()) < largest:
        facts["ranks"] = f"{min(sizes.values())} to {largest}, padded with zeros"
    if len(set(scales.values())) > 1:
        facts["scales"] = "differ between linears: those of few are inside B"
    return Pairs(tensors=found, rank=largest, alpha=scale * largest, facts=facts)


def _patterns(
    config: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The ranks and the alphas of linears, by patterns of their names."""
    found = []
    for name, is_integer in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{folder / CONFIG}: {name} is {patterns!r}, not numbers by name")
        for pattern, value in patterns.items():
            check_number(folder, f"{name}.{pattern}", value, is_integer=is_integer)
            if is_integer and value < 1:
                raise AdapterError(f"{folder / CONFIG}: {name}.{pattern} is {value}, below 1")
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(f"{folder / CONFIG}: {name}: '{pattern}': {error}") from error
        found.append(patterns)
    return found[0], found[1]


def _match(patterns: Mapping[str, Any], linear: str, default: float) -> float:
    """The number of the first pattern that the end of a linear's name has, as PEFT looks for it."""
    hits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", linear))
    return float(next(hits, default))


def check_targets(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Raise `AdapterError` for pairs that PEFT would leave out: of linears that are no targets."""
    linears = dict.fromkeys(_linear_of(name) for name in tensors if _is_side(name))
    targets = config.get("target_modules")
    try:
        others = [linear for linear in linears if targets and not is_target(linear, config)]
    except (re.error, TypeError) as error:
        raise refusal(folder, f"target_modules {targets} ({error})") from error
    if others:
        raise AdapterError(
            f"{find_tensors(folder)}: a pair of {others[0]}, which is no target by {CONFIG} "
            "(target_modules, layers_to_transform): PEFT would leave it out; correct one of them"
        )


def _check_rank(tensors: Mapping[str, Tensor], linear: str, rank: int, folder: Path) -> None:
    for side, dim in (("A", 3), ("B", 2)):
        tensor = tensors.get(f"{linear}.{side}")
        if tensor is not None and (tensor.ndim != 4 or tensor.shape[dim] != rank):
            shape = list(tensor.shape[2:]) if tensor.ndim == 4 else list(tensor.shape)
            raise AdapterError(
                f"{find_tensors(folder)}: {linear}.{side} is {shape}, of another rank than {rank}, "
                f"which {CONFIG} says"
            )


def _is_side(name: str) -> bool:
    return last_part(name) in ("A", "B")


def _linear_of(name: str) -> str:
    return name.rpartition(".")[0]


# --- LoRA: linears


def complete_pairs(
    pairs: Pairs, config: Mapping[str, Any], folder: Path, sizes: FindSizes
) -> tuple[Pairs, tuple[Layout, tuple[Site, ...]]]:
    """The pairs of every linear of a layout, zeros where there is none, and that layout.

    Raises `AdapterError` if no layout has all the linears, if one is missing that the configuration
    names, or if linears are left out of a backbone that is not found.
    """
    place, name = str(find_tensors(folder)), base_of(config, folder)
    widths = widths_of(pairs.tensors, n_splits=1, place=place)
    layout, fault = None, ""
    try:
        layout = recognise_sites(widths, blocks=blocks_of(folder, config))
    except LayoutError as error:
        fault = str(error)
    raw = sizes(name, is_needed=layout is None)
    whole = sites_in(raw, list(widths)) if raw else None
    if whole is not None and not _have(whole[1], widths):
        whole = None  # the backbone is another one, which the check of both together says
    if whole is None:
        if layout is None:
            raise AdapterError(f"{place}: {fault}; {_way_out(name, raw)}")
        return pairs, layout
    absent = [site for site in whole[1] if site.name not in widths]
    try:
        lost = [f"missing {site.name}" for site in absent if is_target(site.name, config)]
    except (re.error, TypeError, ValueError) as error:
        raise refusal(folder, f"target_modules {config.get('target_modules')} ({error})") from error
    if lost:
        raise AdapterError(f"{place}: linears that {CONFIG} names are not there: {some(lost)}")
    if not absent:
        return pairs, whole
    try:
        like = AdapterConfig(rank=pairs.rank, n_skills=1)
    except ConfigError as error:
        raise AdapterError(f"{place}: {error}") from error
    artefact.check_size(like, whole[1], 1, pairs.tensors, place=place)
    tensors = dict(pairs.tensors)
    for site in absent:
        tensors[f"{site.name}.A"] = torch.zeros(1, 1, site.in_features, pairs.rank)
        tensors[f"{site.name}.B"] = torch.zeros(1, 1, pairs.rank, site.out_features)
    text = f"{len(widths)} of the {len(whole[1])} of layout {whole[0].text}, zeros in the others"
    return replace(pairs, tensors=tensors, facts={**pairs.facts, "linears": text}), whole


def _have(sites: tuple[Site, ...], widths: Mapping[str, tuple[int, int]]) -> bool:
    """Whether linears have in a backbone the widths that they have in a file."""
    there = {site.name: (site.in_features, site.out_features) for site in sites}
    return all(there[name] == width for name, width in widths.items())


def _way_out(name: Any, raw: Mapping[str, Any] | None) -> str:
    if raw is not None:
        return f"the backbone has no layout with all of them; {MERGE}"
    backbone = f"the backbone {name} is not found" if name else f"{CONFIG} names no backbone"
    return f"which of them a LoRA may leave out, its backbone tells, and {backbone}; {SET_BACKBONE}"


# --- (IA)3


def to_outputs(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    raw: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """Vectors l (1, 1, O) that scale outputs, of ia3_l (O, 1) and, for inputs, (1, I).

    To scale what a linear reads is to scale what another one writes, where nothing lies between
    that the factors do not pass through. Raises `AdapterError` for other inputs.
    """
    linears = [name.removesuffix(".l") for name in tensors]
    family = family_of_linears(linears, raw)
    inputs: Any = config.get("feedforward_modules")
    inputs = family.peft_feed_forward if inputs is None else inputs
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear = name.removesuffix(".l")
        is_input = _is_input(linear, inputs, folder)
        if is_input:
            has_negative = bool((tensor < 0).any())
            writer = family.writer_of(linear, raw, has_negative=has_negative)
            if writer is None:
                what = f"feedforward_modules {inputs}, which scales the inputs of {linear}"
                if raw is None:
                    what += f" in a backbone that is not found ({SET_BACKBONE})"
                raise refusal(folder, what)
            name = f"{writer}.l"
        if tensor.ndim == 2 and tensor.shape[0 if is_input else 1] == 1:
            tensor = tensor.flatten()[None, None]
        if name in found:  # inputs and outputs of the same numbers
            if found[name].shape != tensor.shape:
                raise AdapterError(f"{find_tensors(folder)}: {linear}.l does not fit {name}")
            tensor = found[name].float() * tensor.float()
        found[name] = tensor
    return found


def _is_input(linear: str, inputs: Any, folder: Path) -> bool:
    """Whether PEFT scales what a linear reads."""
    try:
        if isinstance(inputs, str):
            return re.fullmatch(inputs, linear) is not None
        return linear.endswith(tuple(inputs))
    except (re.error, TypeError) as error:
        raise refusal(folder, f"feedforward_modules {inputs} ({error})") from error
