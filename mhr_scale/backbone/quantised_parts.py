"""A linear in 8 or 4 bits as the tensors that bitsandbytes writes of it: made, read, put together.

Shape letters: I in features, O out features.

int8: `weight` (O, I); `SCB` (O,), the largest magnitude of each row; `weight_format`, a zero.
nf4: `weight` (O I / 2, 1), two numbers a byte; `weight.absmax`, a scale for every 64 numbers, in 8
bits itself; `weight.nested_absmax`, a scale for every 256 of those; `weight.quant_map` and
`weight.nested_quant_map`, what the codes stand for; and a JSON text as bytes, with shape and type.
"""

import json
import logging
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhr_scale.backbone.shards import Weight
from mhr_scale.backbone.weights import WeightSource
from mhr_scale.errors import BackboneError

#: int8: columns of activations with a value this large stay unquantised (Dettmers et al. 2022).
OUTLIER = 6.0
#: nf4: weights that share a scale, and scales that share one. The CPU kernel is wrong if a row
#: ends within a block.
BLOCK, NESTED_BLOCK = 64, 256
#: nf4: the JSON text, and its length in a file: with blanks at its end, as files are laid out
#: before anything is quantised.
TEXT, TEXT_BYTES = "weight.quant_state.bitsandbytes__nf4", 256
#: The part that tells a quantised linear from others.
MARKS = {"int8": "SCB", "nf4": TEXT}
#: Numbers that are packed at a time: they stay in a core's cache.
CHUNK = 1 << 18


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its warnings about casts and kernels to download."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def plan_parts(linear: str, shape: tuple[int, ...], kind: str) -> list[Weight]:
    """The tensors of a linear of this name in a file, the weight first."""
    width_O, width_I = shape
    if kind == "int8":
        parts = {
            "weight": ((width_O, width_I), torch.int8),
            "SCB": ((width_O,), torch.float32),
            "weight_format": ((), torch.uint8),
        }
    else:
        n_blocks = width_O * width_I // BLOCK
        parts = {
            "weight": ((width_O * width_I // 2, 1), torch.uint8),
            "weight.absmax": ((n_blocks,), torch.uint8),
            "weight.quant_map": ((16,), torch.float32),
            "weight.nested_absmax": ((-(-n_blocks // NESTED_BLOCK),), torch.float32),
            "weight.nested_quant_map": ((256,), torch.float32),
            TEXT: ((TEXT_BYTES,), torch.uint8),
        }
    return [
        Weight(name=f"{linear}.{part}", shape=size, dtype=dtype)
        for part, (size, dtype) in parts.items()
    ]


# -- making them -----------------------------------------------------------------------------------


def pack(weight_OI: Tensor, kind: str) -> dict[str, Tensor]:
    """Quantise the weight of a linear where it lies: its parts, bit for bit as bitsandbytes does.

    int8 rounds from float16; nf4 (double quantisation) from the weight as it is.
    """
    functional, on_cpu = import_bitsandbytes().functional, weight_OI.device.type == "cpu"
    if kind == "int8":
        n_rows = max(1, CHUNK // weight_OI.shape[1]) if on_cpu else weight_OI.shape[0]
        made = [
            functional.int8_vectorwise_quant(rows.to(torch.float16))[:2]
            for rows in weight_OI.split(n_rows)
        ]
        weight, scales = (torch.cat(chunks) for chunks in zip(*made, strict=True))
        by_row = torch.zeros((), dtype=torch.uint8)
        return {"weight": weight, "SCB": scales, "weight_format": by_row}
    if on_cpu:
        codes, scales = _pack_nf4(weight_OI)
        offset = scales.mean()
        nested, outer = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        state = functional.QuantState(
            absmax=nested,
            shape=weight_OI.shape,
            dtype=weight_OI.dtype,
            blocksize=BLOCK,
            code=functional.get_4bit_type("nf4", device="cpu"),
            quant_type="nf4",
            offset=offset,
            state2=outer,
        )
    else:
        codes, state = functional.quantize_4bit(
            weight_OI.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    text = bytes(parts[TEXT].tolist()).ljust(TEXT_BYTES)
    parts[TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {"weight": codes, **parts}


def _pack_nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte, and the scale of every block: ten times as fast as bitsandbytes on a CPU.

    A code is the number of bounds below a scaled weight, as a binary search finds it there.
    """
    values = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    bounds = ((values[:-1] + values[1:]) / 2).numpy()
    flat = weight_OI.reshape(-1)
    codes = torch.empty(flat.numel() // 2, 1, dtype=torch.uint8)
    scales = torch.empty(flat.numel() // BLOCK, dtype=torch.float32)
    for start in range(0, flat.numel(), CHUNK):
        blocks = flat[start : start + CHUNK].reshape(-1, BLOCK).float()
        scale = blocks.abs().amax(-1)
        factors = 1.0 / scale.clamp(min=1e-38)
        scaled = (blocks * factors[:, None]).clamp(-1, 1).reshape(-1).numpy()
        found, is_above = np.zeros(scaled.size, np.uint8), np.empty(scaled.size, np.bool_)
        for bound in bounds:
            np.greater(scaled, bound, out=is_above)
            np.add(found, is_above.view(np.uint8), out=found)
        pairs = torch.from_numpy(found[::2] << 4 | found[1::2])
        codes[start // 2 : start // 2 + pairs.numel(), 0] = pairs
        scales[start // BLOCK : start // BLOCK + scale.numel()] = scale
    return codes, scales


# -- using them ------------------------------------------------------------------------------------


def make_linear(
    parts: Mapping[str, Tensor], *, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> nn.Linear:
    """A frozen linear whose parts are these tensors, not copies; nf4 computes in `dtype`."""
    bitsandbytes = import_bitsandbytes()
    width_O, width_I = shape
    weight = parts["weight"]
    with torch.device("meta"):
        if kind == "int8":
            linear = bitsandbytes.nn.Linear8bitLt(
                width_I, width_O, bias=False, has_fp16_weights=False, threshold=OUTLIER
            )
        else:
            linear = bitsandbytes.nn.Linear4bit(
                width_I, width_O, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
    if kind == "int8":
        linear.weight = bitsandbytes.nn.Int8Params(
            weight, requires_grad=False, CB=weight, SCB=parts["SCB"]
        )
    else:
        linear.weight = bitsandbytes.nn.Params4bit.from_prequantized(
            weight, _statistics(parts), device=weight.device, module=linear
        )
        linear.quant_state.dtype = dtype
    keep_format(linear)
    made: nn.Linear = linear.eval()
    return made


def unpack(parts: Mapping[str, Tensor], kind: str) -> Tensor:
    """The weight (O, I) that the parts stand for, in float32."""
    functional = import_bitsandbytes().functional
    if kind == "int8":
        whole: Tensor = functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        return whole
    state = functional.QuantState.from_dict(_statistics(parts), parts["weight"].device)
    state.dtype = torch.float32
    found: Tensor = functional.dequantize_4bit(parts["weight"], state)
    return found


def _statistics(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All parts but the weight, in a dictionary that bitsandbytes may empty."""
    return {name.removeprefix("weight."): part for name, part in parts.items() if name != "weight"}


def keep_format(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    In evaluation on a CPU with AVX512-BF16 it packs them, irreversibly, for a kernel that has no
    gradient: a model that was evaluated once would go on training with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


# -- a folder of them ------------------------------------------------------------------------------


def settings_of(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` has to say for the same linears and numbers."""
    if kind == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": OUTLIER}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def stored_kind(settings: Any, names: Set[str]) -> str:
    """How the weights of these names are quantised, by their config.json: `none`, `int8`, `nf4`.

    What says so may be a left-over, and what is set otherwise than ours is none of these.
    """
    for kind, mark in MARKS.items():
        wanted = {**settings_of(kind, torch.float32), "quant_method": "bitsandbytes"}
        wanted.pop("bnb_4bit_compute_dtype", None)
        is_said = isinstance(settings, dict) and wanted.items() <= settings.items()
        if is_said and any(name.endswith(f".{mark}") for name in names):
            return kind
    return "none"


class QuantisedSource:
    """A source of which some weights are stored as quantised linears.

    It has them by the names and shapes of the model; reading one gives what its parts stand for.
    """

    def __init__(self, source: WeightSource, kind: str, *, way_out: str) -> None:
        """Raises `BackboneError` if a part is missing or is not what it should be."""
        self.kind, self._source = kind, source
        mark = f".{MARKS[kind]}"
        linears = {n.removesuffix(mark) for n in source.names() if n.endswith(mark)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        parts: set[str] = set()
        for linear in sorted(linears):
            self._shapes[f"{linear}.weight"] = shape = self._shape_of(linear, way_out)
            for part in plan_parts(linear, shape, kind):
                self._check(part, way_out)
                parts.add(part.name)
        others = source.names() - parts
        self._names = others | self._shapes.keys()
        self._dtype = source.dtype(min(others))
        self._last: tuple[str, Tensor] | None = None

    def _shape_of(self, linear: str, way_out: str) -> tuple[int, ...]:
        if self.kind == "int8":
            return self._source.shape(f"{linear}.weight")
        name = f"{linear}.{TEXT}"
        try:
            width_O, width_I = map(int, json.loads(bytes(self._view(name).tolist()))["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise BackboneError(
                f"{self._source.file(name)}: {name} is no description of a linear; {way_out}"
            ) from error
        return width_O, width_I

    def _check(self, part: Weight, way_out: str) -> None:
        if part.name not in self._source.names():
            raise BackboneError(
                f"{self._folder()}: {part.name} is missing, a part of a quantised linear; {way_out}"
            )
        found = self._view(part.name)
        shape = tuple(found.shape) if part.name.endswith(TEXT) else part.shape
        if (tuple(found.shape), found.dtype) != (shape, part.dtype):
            raise BackboneError(
                f"{self._source.file(part.name)}: {part.name} is {list(found.shape)} of "
                f"{found.dtype}, a linear in {self.kind} has {list(part.shape)} of {part.dtype}; "
                f"{way_out}"
            )

    def _folder(self) -> Path | None:
        files = map(self._source.file, sorted(self._source.names()))
        return next((file.parent for file in files if file is not None), None)

    def _view(self, name: str) -> Tensor:
        found = self._source.view(name)
        assert found is not None, "quantised weights are in files"
        return found

    def views(self, name: str) -> dict[str, Tensor]:
        """What the files hold of a weight, or the first of its parts."""
        return self._source.views(name)

    def is_quantised(self, name: str) -> bool:
        """Whether a weight is stored as parts."""
        return name in self._shapes

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a quantised weight as they lie in their file."""
        linear = name.removesuffix("weight")
        planned = plan_parts(linear.removesuffix("."), self._shapes[name], self.kind)
        return {p.name.removeprefix(linear): self._view(p.name) for p in planned}

    def names(self) -> frozenset[str]:
        """Names of the model's weights."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight, as the model has it."""
        return self._shapes.get(name) or self._source.shape(name)

    def file(self, name: str) -> Path | None:
        """The file that holds a weight, or the numbers of a quantised one."""
        return self._source.file(name)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of one weight; for a quantised one, that of the others."""
        return self._dtype if name in self._shapes else self._source.dtype(name)

    def view(self, name: str) -> Tensor | None:
        """The weight as it lies in its mapped file; None for a quantised one."""
        return None if name in self._shapes else self._source.view(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened weight; in float32 of a quantised one."""
        if name not in self._shapes:
            return self._source.read(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = (name, unpack(self.parts(name), self.kind).reshape(-1))
        return self._last[1][start:stop]
