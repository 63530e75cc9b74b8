"""Frozen linears in 8 or 4 bits by bitsandbytes.

Every linear in the blocks is quantised; embeddings, norms, position biases and the head keep the
backbone's data type. T5 casts the input of `wo` to the data type of `wo.weight` unless that is int8
(transformers does not quantise `wo` for that reason), so 4-bit weights are stored in tensors of the
backbone's data type (`quant_storage`), which makes the cast a no-op. The 8-bit product keeps its
input for the backward pass, also under `recompute: non_reentrant`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import Blueprint, make_model
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, EngineError
from mhr_scale.families.family import last_part

#: int8: columns of activations with a value this large stay unquantised (Dettmers et al. 2022).
OUTLIER = 6.0
#: nf4: weights that share a scale. The CPU kernel is wrong if a row ends within such a block.
BLOCK = 64


def check(config: BackboneConfig, blueprint: Blueprint, *, ds_config: str | None = None) -> None:
    """Raise `EngineError` or `BackboneError` if this backbone cannot be quantised.

    `ds_config` names the DeepSpeed file that shards the backbone, if one does.
    """
    if config.quantise == "none":
        return
    if ds_config is not None:
        raise EngineError(
            f"backbone.quantise: {config.quantise} weights are whole on every rank, and "
            f"{ds_config} shards them; leave run.ds_config out, name a file of stage 0, or set "
            "quantise: none"
        )
    if config.quantise == "nf4":
        with torch.device("meta"):
            model = make_model(blueprint)
        linears = list_linears(model, blueprint).items()
        uneven = {last_part(name): m.in_features for name, m in linears if m.in_features % BLOCK}
        if uneven:
            listed = ", ".join(f"{name} of {width}" for name, width in uneven.items())
            raise BackboneError(
                f"backbone.quantise: nf4 takes rows of weights in blocks of {BLOCK}, and those of "
                f"{listed} do not divide into them; use int8"
            )


def list_linears(model: nn.Module, blueprint: Blueprint) -> dict[str, nn.Linear]:
    """The linears to quantise, by name: those in the blocks."""
    family, config = blueprint.family, blueprint.model_config
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and family.is_in_block(name, config)
    }


def allocate(model: nn.Module, blueprint: Blueprint, kind: str, device: torch.device) -> None:
    """Allocate memory for what of a model is on the meta device, except for linears to quantise."""
    quantised = {} if kind == "none" else list_linears(model, blueprint)

    def give_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    for name, module in model.named_modules():
        if name not in quantised:
            module._apply(give_memory, recurse=False)


def put(model: nn.Module, name: str, weight_OI: Tensor, kind: str, device: torch.device) -> None:
    """Replace the linear whose weight is called `name` by a quantised one."""
    place = name.removesuffix(".weight")
    model.set_submodule(place, make_linear(weight_OI, kind=kind, device=device))


def make_linear(weight_OI: Tensor, *, kind: str, device: torch.device) -> nn.Linear:
    """A frozen linear of kind `int8` or `nf4` (double quantisation) on `device`.

    It computes in the data type of the weight that it is made from.
    """
    bitsandbytes = import_bitsandbytes()
    width_O, width_I = weight_OI.shape
    dtype, host = weight_OI.dtype, weight_OI.cpu()
    with torch.device("meta"):
        if kind == "int8":
            linear = bitsandbytes.nn.Linear8bitLt(
                width_I, width_O, bias=False, has_fp16_weights=False, threshold=OUTLIER
            )
        else:
            linear = bitsandbytes.nn.Linear4bit(
                width_I, width_O, bias=False, compute_dtype=dtype, quant_storage=dtype
            )
    if kind == "int8":
        weight = bitsandbytes.nn.Int8Params(host, requires_grad=False)
    else:
        weight = bitsandbytes.nn.Params4bit(
            host, quant_type="nf4", quant_storage=dtype, module=linear
        )
    linear.weight = weight.to(device)
    keep_format(linear)
    quantised: nn.Linear = linear.eval()
    return quantised


def keep_format(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    In evaluation on a CPU with AVX512-BF16 it packs them, irreversibly, for a kernel that has no
    gradient: a model that was evaluated once would go on training with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its warnings about casts and kernels to download."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes
