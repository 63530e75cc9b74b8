"""A fingerprint of a backbone: a few logits, which also differ if weights are wrongly tied.

`convert` computes them in float32 from the weights it wrote, module by module, and stores them
beside the weights. Every run compares its backbone with them once, in its own placement and data
type (`engine.check_backbone`).

Shape letters: B rows, L tokens, V entries of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.manifest import MANIFEST, WAY_OUT, Fingerprint
from mhr_scale.backbone.on_demand import hollow_model, take_weights, weights_on_demand
from mhr_scale.errors import BackboneError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow
from mhr_scale.seeds import seed_from

N_ROWS, N_INPUTS, N_TARGETS, N_KEPT, MAX_INPUTS = 2, 16, 4, 32, 64
#: Significant digits of a stored logit: more than float32 sums of different kernels agree on.
DIGITS = 7
#: Largest difference from the stored logits, as a share of their spread, of a correct backbone.
#: float32: other kernels sum in another order (1e-6 measured on random T5s of 24 + 24 blocks).
#: Weights that are quantised at the start are other weights than the stored ones: 1 % to 5 %
#: measured in 8 bits, 4 % to 40 % in 4 bits, where a wrongly tied `lm_head` made 23 % (toy
#: backbone) to 500 %. Those of a quantised folder are the stored ones, and their noise is measured.
TOLERANCES = {"float32": 1e-3, "int8": 0.2, "nf4": 0.6}
#: bfloat16 rounds every activation to 8 bits, some hundred times in a row: 0.4 % to 2.4 % measured.
#: The error depends on the weights, so it is measured at conversion; other kernels round elsewhere,
#: hence the factor. Swapping two matrices of one block makes 0.4 % to 100 %.
NOISE_FACTOR, LEAST_BFLOAT16 = 5.0, 0.02


# -- questions: the token rows ---------------------------------------------------------------------


def make_questions(blueprint: Blueprint, prompts: Sequence[Sequence[int]] = ()) -> Fingerprint:
    """A fingerprint without logits yet: prompts as token ids, or fixed pseudo-random rows."""
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
    """Token ids that depend on their position alone; ids 0 to 2 are left out as special tokens."""
    first = min(3, size - 1)
    return [
        first + seed_from("fingerprint", what, row, place) % (size - first)
        for place in range(length)
    ]


def answer(questions: Fingerprint, logits_BLV: Tensor) -> Fingerprint:
    """Complete a fingerprint: from logits of the whole vocabulary, rounded."""
    selected = logits_BLV[..., questions.vocabulary].double()
    norms = torch.linalg.vector_norm(logits_BLV.double(), dim=-1)
    return replace(
        questions,
        logits=[[[_rounded(x) for x in row] for row in rows] for rows in selected.tolist()],
        norms=[[_rounded(x) for x in row] for row in norms.tolist()],
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def difference(stored: Fingerprint, computed: Fingerprint) -> float:
    """The difference of two fingerprints, as a share of the stored one's spread; 0 if equal.

    A constant added to all logits of a position counts in the norms only: it says little, and T5's
    logits have a large one.
    """
    try:
        expected, actual = (torch.tensor(f.logits).double() for f in (stored, computed))
        expected_norms, norms = (torch.tensor(f.norms).double() for f in (stored, computed))
    except ValueError:
        return math.inf
    if expected.shape != actual.shape or expected_norms.shape != norms.shape:
        return math.inf
    if not expected.numel():
        return math.inf
    expected, actual = (x - x.mean(-1, keepdim=True) for x in (expected, actual))
    tiny = torch.finfo(torch.float32).tiny
    spread = float((actual - expected).norm() / expected.norm().clamp_min(tiny))
    length = float((norms - expected_norms).norm() / expected_norms.norm().clamp_min(tiny))
    worst = max(spread, length)
    return worst if math.isfinite(worst) else math.inf


# -- answers: from a model, or from a checkpoint ---------------------------------------------------


@torch.no_grad()
def ask(model: Any, family: Family, questions: Fingerprint, device: torch.device) -> Fingerprint:
    """The fingerprint of a model, in evaluation mode. Collective under ZeRO-3."""
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
    """The fingerprint of whole weights in float32, and the noise of computing it in bfloat16."""
    exact = ask_source(blueprint, questions)
    noise = difference(exact, ask_source(blueprint, questions, torch.bfloat16))
    return replace(exact, noise=_rounded(noise))


def make_quantised(
    blueprint: Blueprint, model: Any, questions: Fingerprint, plain: Fingerprint
) -> Fingerprint:
    """The fingerprint of what quantised weights stand for, in float32.

    Its noise is that of `model`, which bitsandbytes computes on the CPU; its distance is that from
    `plain`, the fingerprint of the same weights before they were quantised, to `model`.
    """
    exact = ask_source(blueprint, questions)
    computed = ask(model, blueprint.family, questions, torch.device("cpu"))
    noise, distance = (_rounded(difference(one, computed)) for one in (exact, plain))
    return replace(exact, noise=noise, distance=distance)


def ask_source(
    blueprint: Blueprint,
    questions: Fingerprint,
    dtype: torch.dtype = torch.float32,
    *,
    rounded: torch.dtype | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint as our loader reads it, computed in `dtype` on the CPU.

    Weights are read when their module runs and freed after it: memory holds one module's. They are
    `rounded` to a data type first, as a conversion does.
    """
    model, weights = hollow_model(blueprint, dtype, rounded=rounded)
    what = f"fingerprint in {str(dtype).removeprefix('torch.')}"
    with weights_on_demand(model, weights, what=what):
        return ask(model, blueprint.family, questions, torch.device("cpu"))


def ask_model(
    model: nn.Module, family: Family, questions: Fingerprint, *, dtype: torch.dtype
) -> Fingerprint:
    """The fingerprint of a model on the CPU whose weights are rounded to `dtype`, in float32.

    The model cannot be used afterwards.
    """
    weights = take_weights(model, rounded=dtype)
    with weights_on_demand(model, weights, what="compare with transformers"):
        return ask(model, family, questions, torch.device("cpu"))


def tolerance_of(stored: Fingerprint, how: str, *, is_measured: bool = False) -> float:
    """The largest difference of a correct backbone, by its data type or quantisation.

    `is_measured` if the stored noise is that of this quantisation.
    """
    if how == "bfloat16" or is_measured:
        return max(LEAST_BFLOAT16, NOISE_FACTOR * stored.noise)
    return TOLERANCES[how]


def check_questions(stored: Fingerprint, blueprint: Blueprint) -> None:
    """Raise `BackboneError` if a fingerprint's rows are malformed or not in the vocabulary."""
    place, size = f"{blueprint.folder}/{MANIFEST}: fingerprint", blueprint.model_config.vocab_size
    if len(stored.inputs) != len(stored.targets) or len(set(map(len, stored.targets))) > 1:
        raise BackboneError(
            f"{place}: {len(stored.inputs)} inputs, targets of "
            f"{', '.join(str(len(row)) for row in stored.targets) or 'no'} tokens; {WAY_OUT}"
        )
    rows_by_name = {
        "inputs": stored.inputs,
        "targets": stored.targets,
        "vocabulary": [stored.vocabulary],
    }
    for name, rows in rows_by_name.items():
        if not rows or not all(rows):
            raise BackboneError(f"{place}.{name}: a row without a token; {WAY_OUT}")
        foreign = [token for row in rows for token in row if not 0 <= token < size]
        if foreign:
            raise BackboneError(f"{place}.{name}: {foreign[0]} is not in 0..{size - 1}; {WAY_OUT}")
