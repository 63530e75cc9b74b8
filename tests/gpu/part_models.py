"""Whole models of several families: the device against transformers' own parts on the CPU.

The truth of a model is a step over padded rows, in float32 on the CPU, with none of our faster
parts: losses, logits, and gradients of an MHR adapter on every linear.
"""

from dataclasses import replace
from typing import Any

import torch
from adapters.tiny import randomise
from board import Board, Found, Scale
from compared import (
    CPU,
    EPS,
    distance,
    furthest,
    furthest_of_numbers,
    held,
    share_of_equal,
    without_tf32,
)
from families.laid_rows import MHR, ON, TASKS, adapted, make, make_rows, pack, step
from families.restated_varlen import counted
from passes import shared_rows
from placed import place_model
from torch import Tensor

from mhr_scale.adapters import Adapter, find_sites
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import find_family
from mhr_scale.passes.scoring import generate_answers, rank_choices

#: With none of our faster parts.
BARE = replace(ON, fused_attention=False, fused_gate=False, fused_norm=False)
#: What tells them apart: two stacks and position biases; rotary and grouped heads; capped scores
#: under windows; learned positions; blocks whose parts run side by side; norms of q and k; experts.
NAMES = ("t5 v1.1", "llama", "gemma2", "gpt2", "phi")
MORE = ("t5 v1.0", "mt5", "umt5", "mistral", "qwen3", "neox", "opt", "falcon", "gptj", "qwen3 moe")
#: Whose rows of one text each go to the variable-length kernel, on GPUs in half precision.
VARLEN = ("llama", "phi", "opt", "mistral", "gemma3")
FLOAT32 = 2e-5
#: Roundings to half precision, one behind the other, that a number may have seen in one direction.
HALF = 16.0
#: How much further from the truth rows laid flat may be than padded ones, in half precision.
MUCH_FURTHER = 1.5

Numbers = dict[str, Tensor]


def measure(board: Board, scale: Scale) -> None:
    """Every form of a step, half precision, shared prompts, ranking and generation."""
    without_tf32()
    for name in NAMES[:3] if scale.is_tiny else (*NAMES, *MORE):
        board.run(f"{name}: forms of a step", lambda name=name: forms(name, scale))
    for name in VARLEN[:1] if scale.is_tiny else (*VARLEN, "gemma2", "t5 v1.1"):
        for dtype in (torch.bfloat16, torch.float16):
            title = f"{name}: {str(dtype).removeprefix('torch.')}"
            board.run(title, lambda n=name, dtype=dtype: in_half(n, dtype, scale))
    for name in ("gemma2",) if scale.is_tiny else ("llama", "gemma2", "gpt2", "phi"):
        board.run(f"{name}: shared prompts", lambda name=name: shared(name, scale))
    for name in ("t5 v1.1", "llama"):
        board.run(f"{name}: ranking", lambda name=name: ranking(name, scale))
        for beams in (1, 3):
            title = f"{name}: generation, {beams} beam(s)"
            board.run(title, lambda n=name, beams=beams: generation(n, beams, scale))


def forms(name: str, scale: Scale) -> Found:
    """Padded rows and rows laid flat, faster parts on and off, blocks computed anew."""
    truth = take(name, BARE, CPU)
    values: dict[str, Any] = {"bare": furthest(take(name, BARE, scale.device), truth)}
    for switch in ("attention", "gate", "norm"):
        settings = replace(BARE, **{f"fused_{switch}": True})
        values[switch] = furthest(take(name, settings, scale.device), truth)
    fused = make(name)
    is_flat = find_family(fused.config).cannot_lay(fused) is None
    padded = take(name, ON, scale.device)
    values["padded"] = furthest(padded, truth)
    fast = take(name, ON, scale.device, is_flat=True) if is_flat else padded
    values["flat" if is_flat else "padded again"] = furthest(fast, truth)
    for mode in ("reentrant", "non_reentrant"):
        settings = replace(ON, recompute=mode)
        found = take(name, settings, scale.device, is_flat=is_flat)
        values[mode] = furthest(found, truth)
        values[f"{mode}_bits"] = f"{share_of_equal(found, fast):.0%}"
    goal = "losses, logits, gradients within 2e-5 of the CPU's; bits: tensors equal to those of"
    return held(values, FLOAT32, f"{goal} a step without recomputation")


def take(
    name: str,
    settings: BackboneConfig,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    rows: list[EncodedRow] | None = None,
    is_flat: bool = False,
    is_rounded: torch.dtype | None = None,
) -> Numbers:
    """Losses, logits and gradients of a step; weights rounded to another type if it is given."""
    model = make(name, settings, dtype=dtype, device=device)
    if is_rounded is not None:
        model.to(is_rounded).to(dtype)
    losses, logits, gradients = step(model, adapted(model), pack(model, rows, is_flat=is_flat))
    return {"losses": losses, "logits": logits.float(), **gradients}


def in_half(name: str, dtype: torch.dtype, scale: Scale) -> Found:
    """Rows of one text each, padded and laid flat, over weights in half precision.

    On a GPU the variable-length kernel runs; on the CPU, where there is none, its restatement.
    """
    rows = [replace(row, answers=row.answers[:1]) for row in make_rows()]
    truth = take(name, BARE, CPU, rows=rows, is_rounded=dtype)
    values: dict[str, Any] = {}
    with counted(is_restated=not scale.on_gpu) as calls:
        for is_flat in (False, True):
            found = take(name, ON, scale.device, dtype=dtype, rows=rows, is_flat=is_flat)
            values["flat" if is_flat else "padded"] = distance(found, truth)
    values["varlen_calls"] = len(calls)
    is_used = bool(calls) == (name in VARLEN)
    eps = EPS[dtype]
    most = min(HALF * eps, MUCH_FURTHER * values["padded"] + eps)
    return Found(
        values,
        holds=is_used and values["padded"] <= HALF * eps and values["flat"] <= most,
        goal=f"norms of differences from float32 within 16 eps ({HALF * eps:.3g}), flat rows at "
        "most 1.5 times as far as padded ones and one eps; the kernel "
        + ("runs" if name in VARLEN else "does not run"),
    )


def shared(name: str, scale: Scale) -> Found:
    """Scores of choices, what prompts begin with alike once, against padded rows on the CPU."""
    rows = shared_rows.make_rows()
    truth = scores(*place(name, CPU, BARE), rows)
    found = scores(*place(name, scale.device), rows, is_shared=True)
    return held({"scores": furthest_of_numbers(found, truth)}, FLOAT32, "within 2e-5 of the CPU's")


def ranking(name: str, scale: Scale) -> Found:
    """Scores of choices, padded and laid flat, against those of padded rows on the CPU."""
    truth = scores(*place(name, CPU, BARE), make_rows())
    placed, adapter = place(name, scale.device)
    values = {}
    for is_flat in (False, True):
        found = scores(placed, adapter, make_rows(), is_flat=is_flat)
        values["flat" if is_flat else "padded"] = furthest_of_numbers(found, truth)
    return held(values, FLOAT32, "within 2e-5 of the CPU's")


def generation(name: str, beams: int, scale: Scale) -> Found:
    """Answers in float32, token by token."""

    def answer(device: torch.device, settings: BackboneConfig, **changes: int) -> list[str]:
        rows = [replace(row, **changes) for row in make_rows()]
        options: dict[str, Any] = {"beams": beams, "max_new_tokens": 8}
        return generate_answers(*place(name, device, settings), rows, Ids(), **options)

    truth, found, of_one = answer(CPU, BARE), answer(scale.device, ON), answer(CPU, BARE, task=0)
    n_equal = sum(ours == theirs for ours, theirs in zip(found, truth, strict=True))
    return Found(
        {"equal": n_equal, "answers": len(truth), "different": len(set(truth))},
        holds=n_equal == len(truth) and len(set(truth)) > 1 and of_one != truth,
        goal="every answer is the CPU's, and they depend on their rows and on the task",
    )


class Ids:
    """A tokenizer whose words are token ids."""

    def batch_decode(self, ids: list[Any], *, skip_special_tokens: bool) -> list[str]:
        """Texts of rows of ids."""
        return [" ".join(str(int(token)) for token in row) for row in ids]


def place(
    name: str, device: torch.device, settings: BackboneConfig = ON
) -> tuple[PlacedBackbone, Adapter]:
    """A model where it computes, and its adapter."""
    model = make(name, settings)
    sites = find_sites(model, MHR.layout)
    placed = place_model(model, sites, device=device)
    adapter = randomise(Adapter(MHR, sites, task_names=TASKS))
    adapter.bind(placed.adapted)
    return placed, adapter


def scores(
    placed: PlacedBackbone, adapter: Adapter, rows: list[EncodedRow], **options: bool
) -> list[float]:
    """The scores of all choices of all rows."""
    ranked = rank_choices(placed, adapter, rows, length_norm=1.0, **options)
    return [score for of_row in ranked for score in of_row]
