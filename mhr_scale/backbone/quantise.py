"""Frozen linears in 8 or 4 bits by bitsandbytes: which they are, and where.

The linears in the blocks are quantised, except for those that transformers keeps in the backbone's
data type (T5's `wo`), as do embeddings, norms, position biases and the head: transformers opens a
converted folder, and a folder it has written is read. The 8-bit product keeps its input for the
backward pass, also under `recompute: non_reentrant`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.backbone.quantised_parts import BLOCK, QuantisedSource, make_linear, settings_of
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, EngineError
from mhr_scale.families.family import last_part
from mhr_scale.families.linear_modules import is_transposed


def kind_of(config: BackboneConfig, blueprint: Blueprint) -> str:
    """How the linears of this backbone are held: as they are stored, or as the recipe says."""
    return blueprint.quantise if blueprint.quantise != "none" else config.quantise


def check(config: BackboneConfig, blueprint: Blueprint, *, ds_config: str | None = None) -> None:
    """Raise `EngineError` or `BackboneError` if this backbone cannot be quantised.

    `ds_config` names the DeepSpeed file that shards the backbone, if one does.
    """
    kind, is_stored = kind_of(config, blueprint), blueprint.quantise != "none"
    if is_stored and config.quantise not in ("none", kind):
        raise BackboneError(
            f"backbone.quantise: {config.quantise}, and {blueprint.folder} holds {kind} weights; "
            "leave it out, or name a folder of whole weights"
        )
    if kind == "none":
        return
    if ds_config is not None:
        way_out = "name a folder of whole weights" if is_stored else "set quantise: none"
        raise EngineError(
            f"backbone.quantise: {kind} weights are whole on every rank, and {ds_config} shards "
            f"them; leave run.ds_config out, name a file of stage 0, or {way_out}"
        )
    if not is_stored:
        check_linears(kind, blueprint, "backbone.quantise")


def check_linears(kind: str, blueprint: Blueprint, place: str) -> None:
    """Raise `BackboneError` if there are linears that cannot be quantised to `kind`."""
    if kind == "none":
        return
    with torch.device("meta"):
        model = make_model(blueprint)
    for name, module in model.named_modules():
        is_odd = is_transposed(module) or (
            isinstance(module, nn.Linear) and type(module) is not nn.Linear
        )
        if is_odd and blueprint.family.is_in_block(name, blueprint.model_config):
            raise BackboneError(
                f"{place}: {name} is a {type(module).__name__}, and only plain linears are "
                "quantised; set it to none"
            )
    if kind != "nf4":
        return
    linears = list_linears(model, blueprint).items()
    uneven = {last_part(name): m.in_features for name, m in linears if m.in_features % BLOCK}
    if uneven:
        listed = ", ".join(f"{name} of {width}" for name, width in uneven.items())
        raise BackboneError(
            f"{place}: nf4 takes rows of weights in blocks of {BLOCK}, and those of {listed} do "
            "not divide into them; use int8"
        )


def list_linears(model: nn.Module, blueprint: Blueprint) -> dict[str, nn.Linear]:
    """The linears to quantise, by name: those that are stored so, or those in the blocks."""
    family, config, source = blueprint.family, blueprint.model_config, blueprint.source
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    linears = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(source, QuantisedSource):
        return {n: linear for n, linear in linears.items() if source.is_quantised(f"{n}.weight")}
    return {
        name: linear
        for name, linear in linears.items()
        if family.is_in_block(name, config) and last_part(name) not in kept
    }


def describe(blueprint: Blueprint, kind: str, dtype: str) -> dict[str, Any] | None:
    """What config.json says of quantised linears, as transformers writes and reads it."""
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        model = make_model(blueprint)
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = {last_part(name) for name in linears - list_linears(model, blueprint).keys()}
    settings = settings_of(kind, getattr(torch, dtype))
    found: dict[str, Any] = BitsAndBytesConfig(
        **settings, llm_int8_skip_modules=sorted(others)
    ).to_dict()
    return found


def allocate(model: nn.Module, blueprint: Blueprint, kind: str, device: torch.device) -> None:
    """Allocate memory for what of a model is on the meta device, except for linears to quantise."""
    quantised = {} if kind == "none" else list_linears(model, blueprint)

    def give_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    for name, module in model.named_modules():
        if name not in quantised:
            module._apply(give_memory, recurse=False)
        elif module.bias is not None:
            module.bias = nn.Parameter(give_memory(module.bias), requires_grad=False)


def put(model: nn.Module, name: str, parts: Mapping[str, Tensor], kind: str) -> None:
    """Replace the linear whose weight is called `name` by one of these parts, with its bias."""
    place = name.removesuffix(".weight")
    weight = model.get_parameter(name)
    linear = make_linear(parts, kind=kind, shape=tuple(weight.shape), dtype=weight.dtype)
    linear.register_parameter("bias", model.get_submodule(place)._parameters.get("bias"))
    model.set_submodule(place, linear)
