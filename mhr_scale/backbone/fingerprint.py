"""A few logits that tell one backbone from another, and a wrongly tied one from a right one.

`convert` computes them in float32 from the weights it wrote, module by module, and stores them
beside the weights. Every run compares its backbone with them once, where and how it lies
(`engine.check_backbone`).

B rows, L tokens, V entries of the vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import Blueprint, make_model, plan_copies
from mhr_scale.backbone.manifest import MANIFEST, WAY_OUT, Fingerprint
from mhr_scale.backbone.weights import read_whole
from mhr_scale.errors import BackboneError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow
from mhr_scale.run.runlog import ByteProgress
from mhr_scale.seeds import seed_from

N_ROWS, N_INPUTS, N_TARGETS, N_KEPT, MAX_INPUTS = 2, 16, 4, 32, 64
#: Significant digits of a stored logit: more than float32 sums of other kernels agree in.
DIGITS = 7
#: Largest difference from the stored logits, as a share of their spread, that a right backbone
#: makes. float32: other kernels sum in another order (1e-6 seen at 24 + 24 blocks, T5s at random).
#: Weights in 8 and 4 bits are other weights: 1 % to 5 %, and 4 % to 40 % seen, where a wrongly tied
#: `lm_head` made 23 % (toy backbone) to 500 %.
TOLERANCES = {"float32": 1e-3, "int8": 0.2, "nf4": 0.6}
#: bfloat16 rounds every activation to 8 bits, some hundred times in a row: 0.4 % to 2.4 % seen. It
#: follows from the weights, so it is measured at conversion; other kernels round elsewhere, and so
#: many times as much passes. Swapping two matrices of one block makes 0.4 % to 100 %.
NOISE_FACTOR, LEAST_BFLOAT16 = 5.0, 0.02


# -- what is asked ---------------------------------------------------------------------------------


def make_questions(blueprint: Blueprint, prompts: Sequence[Sequence[int]] = ()) -> Fingerprint:
    """Token rows without answers yet: prompts as token ids, or fixed pseudo-random ones."""
    size = blueprint.model_config.vocab_size
    rows = [list(prompt[:MAX_INPUTS]) for prompt in prompts]
    rows = rows or [_ids(size, "input", row, N_INPUTS) for row in range(N_ROWS)]
    step = max(1, size // N_KEPT)
    return Fingerprint(
        inputs=rows,
        targets=[_ids(size, "target", row, N_TARGETS) for row in range(len(rows))],
        vocabulary=list(range(0, size, step))[:N_KEPT],
        logits=[],
        norms=[],
        noise=0.0,
    )


def _ids(size: int, what: str, row: int, length: int) -> list[int]:
    """Token ids that depend on their place alone; the first three often have meanings."""
    first = min(3, size - 1)
    return [
        first + seed_from("fingerprint", what, row, place) % (size - first)
        for place in range(length)
    ]


def answer(questions: Fingerprint, logits_BLV: Tensor) -> Fingerprint:
    """The questions with the logits of the whole vocabulary as their answer, rounded."""
    kept = logits_BLV[..., questions.vocabulary].double()
    norms = torch.linalg.vector_norm(logits_BLV.double(), dim=-1)
    return replace(
        questions,
        logits=[[[_rounded(x) for x in row] for row in rows] for rows in kept.tolist()],
        norms=[[_rounded(x) for x in row] for row in norms.tolist()],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def difference(stored: Fingerprint, found: Fingerprint) -> float:
    """How far two answers are apart, as a share of the spread of the stored one; 0 is the same.

    A constant added to all logits of a position counts for the norms only: it tells little, and
    T5's logits have a large one.
    """
    try:
        theirs, ours = torch.tensor(stored.logits).double(), torch.tensor(found.logits).double()
        norms, own = torch.tensor(stored.norms).double(), torch.tensor(found.norms).double()
    except ValueError:
        return math.inf
    if theirs.shape != ours.shape or norms.shape != own.shape or not theirs.numel():
        return math.inf
    theirs, ours = (x - x.mean(-1, keepdim=True) for x in (theirs, ours))
    tiny = torch.finfo(torch.float32).tiny
    spread = float((ours - theirs).norm() / theirs.norm().clamp_min(tiny))
    length = float((own - norms).norm() / norms.norm().clamp_min(tiny))
    worst = max(spread, length)
    return worst if math.isfinite(worst) else math.inf


# -- answers by whoever holds the weights ----------------------------------------------------------


@torch.no_grad()
def ask(model: Any, family: Family, questions: Fingerprint, device: torch.device) -> Fingerprint:
    """The answer of a model, in evaluation mode. Collective under ZeRO-3."""
    rows = [
        EncodedRow(np.asarray(ids), (np.asarray(target),))
        for ids, target in zip(questions.inputs, questions.targets, strict=True)
    ]
    packed = family.pack(rows, model.config, pad_multiple=1).to(device)
    was_training = model.training
    model.eval()
    try:
        logits_BLV = family.logits(model, packed)
    finally:
        model.train(was_training)
    return answer(questions, logits_BLV.float().cpu())


def make(blueprint: Blueprint, questions: Fingerprint) -> Fingerprint:
    """The fingerprint of a checkpoint: its answer, and what computing in bfloat16 makes of it."""
    exact = ask_source(blueprint, questions)
    return replace(
        exact, noise=_rounded(difference(exact, ask_source(blueprint, questions, torch.bfloat16)))
    )


def ask_source(
    blueprint: Blueprint, questions: Fingerprint, dtype: torch.dtype = torch.float32
) -> Fingerprint:
    """The answer of a checkpoint as our loader reads it, computed in `dtype` on the CPU.

    Weights are read when their module runs and dropped after it: memory holds one of them.
    """
    with torch.device("meta"):
        model = make_model(blueprint).to(dtype)
    copies = plan_copies(model, blueprint)
    names = {id(parameter): name for name, parameter in copies.items()}
    total = sum(parameter.nbytes for parameter in copies.values())
    progress, seen = ByteProgress(total, what="fingerprint"), set()

    def read(parameter: nn.Parameter) -> Tensor:
        name = names[id(parameter)]
        if name not in seen:  # a tied one is read again
            progress.add(name, parameter.nbytes)
        seen.add(name)
        return read_whole(blueprint.source, name).to(dtype)

    with weights_on_demand(model, read):
        found = ask(model, blueprint.family, questions, torch.device("cpu"))
    progress.close()
    return found


def ask_model(model: nn.Module, family: Family, questions: Fingerprint) -> Fingerprint:
    """The answer of a model on the CPU, computed in float32; one weight is cast at a time.

    The model is of no use afterwards. What it ties stays tied.
    """
    held: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # some look at the data type of a weight before they call the weight's module
                there = torch.empty_like(parameter, dtype=torch.float32, device="meta")
                module._parameters[name] = nn.Parameter(there, requires_grad=False)
                held[id(module._parameters[name])] = parameter.detach()
    with weights_on_demand(model, lambda parameter: held[id(parameter)].float()):
        return ask(model, family, questions, torch.device("cpu"))


@contextmanager
def weights_on_demand(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Let every module run with weights that are made for its call and dropped after it."""
    handles = []
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        if not own:
            continue

        def fetch(module: nn.Module, inputs: Any, own: dict[str, nn.Parameter] = own) -> None:
            for name, parameter in own.items():
                module._parameters[name] = nn.Parameter(make(parameter), requires_grad=False)

        def drop(
            module: nn.Module, inputs: Any, output: Any, own: dict[str, nn.Parameter] = own
        ) -> None:
            module._parameters.update(own)

        handles += [
            module.register_forward_pre_hook(fetch),
            module.register_forward_hook(drop, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tolerance_of(stored: Fingerprint, how: str) -> float:
    """The largest difference that a right backbone makes, by its data type or quantisation."""
    if how == "bfloat16":
        return max(LEAST_BFLOAT16, NOISE_FACTOR * stored.noise)
    return TOLERANCES[how]


def check_questions(stored: Fingerprint, blueprint: Blueprint) -> None:
    """Raise `BackboneError` unless a fingerprint asks what this backbone can be asked."""
    place, size = f"{blueprint.folder}/{MANIFEST}: fingerprint", blueprint.model_config.vocab_size
    if len(stored.inputs) != len(stored.targets) or len(set(map(len, stored.targets))) > 1:
        raise BackboneError(
            f"{place}: {len(stored.inputs)} inputs, targets of "
            f"{', '.join(str(len(row)) for row in stored.targets) or 'no'} tokens; {WAY_OUT}"
        )
    asked = {
        "inputs": stored.inputs,
        "targets": stored.targets,
        "vocabulary": [stored.vocabulary],
    }
    for name, rows in asked.items():
        if not rows or not all(rows):
            raise BackboneError(f"{place}.{name}: a row without a token; {WAY_OUT}")
        foreign = [token for row in rows for token in row if not 0 <= token < size]
        if foreign:
            raise BackboneError(f"{place}.{name}: {foreign[0]} is not in 0..{size - 1}; {WAY_OUT}")
