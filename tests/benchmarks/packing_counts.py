"""What a step takes on a GPU, padded and packed in several ways: counted and reckoned, run nowhere.

python tests/benchmarks/packing_counts.py FOLDER TOKENIZER [--models t0 llama]

FOLDER holds JSONL tasks. A step has 16 rows of as many tasks, whose lengths stand at equal steps in
the order of all rows of the folder, in micro batches of 4 rows, or with as many tokens. Its forward
and backward pass run on tensors without memory, as a GPU would run them. Ways that the program does
not have are reckoned: its own step without attention, and attention by its shapes.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.config import AdapterConfig, BackboneConfig, BatchConfig, JsonlTasks
from mhr_scale.families import varlen
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.t5 import GATED
from mhr_scale.passes import validation
from mhr_scale.passes.filled import filled
from mhr_scale.planning import steps, tracing
from mhr_scale.planning.sizes import read_sizes
from mhr_scale.rows.batching import cut_batches
from mhr_scale.rows.tokens import open_tokens

ROWS, MICRO = 16, 4
MODELS = {"t0": "bigscience/T0", "llama": "meta-llama/Llama-3.1-8B"}
#: What takes rows apart, attends, and lays them flat again.
APART = ("index_select", "index_copy_")
#: Matrix products of attention, forward and backward, each of 2 FLOP a number.
PRODUCTS = 2 + 5
#: Rows and columns of a tile of flex attention.
TILE = 128
#: Tensors as large as queries, or as keys, that attention reads or writes in both passes.
OF_QUERIES, OF_KEYS = 2 + 4, 2 + 4


@dataclass(frozen=True)
class Count:
    """FLOP and bytes of a step, those of attention among them, and kernels."""

    flop: float = 0.0
    moved: float = 0.0
    of_attention: float = 0.0
    moved_by_attention: float = 0.0
    kernels: float = 0.0

    def plus(self, other: "Count", factor: float = 1.0) -> "Count":
        """The sum with so many of another."""
        return Count(*(a + factor * b for a, b in zip(vars(self).values(), vars(other).values())))


class Kernels(TorchDispatchMode):
    """Counts what is dispatched, as `plan` does; attention apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[bool, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        outputs = list(tracing._tensors_in((result,)))
        known = {t.untyped_storage()._cdata for t in tracing._tensors_in((args, kwargs.values()))}
        is_new = any(t.untyped_storage()._cdata not in known for t in outputs)
        is_kernel = func.namespace in tracing.KERNELS_OF and name not in tracing.NO_KERNEL
        if is_kernel and (is_new or func._schema.is_mutable):
            tensors = [*tracing._tensors_in((args, kwargs.values())), *outputs]
            one = self.counts["attention" in name or "attn" in name or name in APART]
            one[0] += tracing._flop(func, name, args, kwargs, result)
            one[1] += sum(map(tracing._numel_bytes, tensors))
            one[2] += 1
        return result

    def count(self) -> Count:
        """All of it."""
        (flop, moved, n), (of_attention, by_attention, m) = self.counts[False], self.counts[True]
        return Count(flop + of_attention, moved + by_attention, of_attention, by_attention, n + m)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("tokenizer")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args()
    rows = usual_rows(given.folder, given.tokenizer)
    n_tokens = sum(len(row.input_ids) + row.n_answer_tokens for row in rows)
    print(f"{ROWS} rows, {n_tokens} tokens, {max(len(row.input_ids) for row in rows)} at most\n")
    for name in given.models:
        blueprint = read_sizes(BackboneConfig(name=MODELS[name]))
        padded = counted(blueprint, rows, is_flat=False)
        print(f"| {MODELS[name]} | TFLOP | of attention | GB | of attention | kernels |")
        print("|---|---|---|---|---|---|")
        for way, count in ways(blueprint, rows, padded):
            figures = (count.flop / 1e12, count.of_attention / 1e12)
            sizes = (count.moved / 1e9, count.moved_by_attention / 1e9)
            kernels = f"{count.kernels:,.0f}" if count.kernels else ""
            print(
                f"| {way} | {figures[0]:.1f} ({count.flop / padded.flop:.2f}) | {figures[1]:.3f} "
                f"| {sizes[0]:.0f} ({count.moved / padded.moved:.2f}) | {sizes[1]:.1f} "
                f"| {kernels} |"
            )
        print()


def usual_rows(folder: str, tokenizer: str) -> list[EncodedRow]:
    """Rows at equal steps in the order of all rows by their length."""
    suite = JsonlTasks(suite="jsonl", folder=folder)
    tokens = open_tokens(suite, AutoTokenizer.from_pretrained(tokenizer), BatchConfig(), GATED)
    every = sorted(
        (len(row.input_ids), len(row.answers[0])) for task in tokens.train for row in task
    )
    print(f"{len(every):,} rows, {np.mean([a + b for a, b in every]):.1f} tokens a row")
    taken = [every[int(len(every) * (n + 0.5) / ROWS)] for n in range(ROWS)]
    return [
        EncodedRow(np.ones(a, dtype=int), (np.ones(b, dtype=int),), task=n, number=n)
        for n, (a, b) in enumerate(taken)
    ]


def ways(
    blueprint: Blueprint, rows: Sequence[EncodedRow], padded: Count
) -> Iterator[tuple[str, Count]]:
    """Every way with its count."""
    with mock.patch.object(varlen, "fits", return_value=False):
        flat = counted(blueprint, rows, is_flat=True)
    yield "padded, micro batches of 4 rows", padded
    yield "flat, attention in rectangles", flat
    is_t5 = blueprint.model_config.is_encoder_decoder
    if not is_t5:
        own = counted(blueprint, rows, is_flat=True)
        exact = reckoned(blueprint, rows, lambda q, k: sum(a * b for a, b in zip(q, k)) / 2)
        yield (
            "flat, variable-length attention",
            replace(
                own,
                flop=own.flop - own.of_attention + exact.of_attention,
                of_attention=exact.of_attention,
            ),
        )
    rest = replace(
        flat,
        flop=flat.flop - flat.of_attention,
        moved=flat.moved - flat.moved_by_attention,
        of_attention=0.0,
        moved_by_attention=0.0,
        kernels=0.0,
    )
    dense = reckoned(blueprint, rows, lambda q, k: sum(q) * sum(k), mask_bytes=2.0)
    yield "one sequence, block-diagonal masks (reckoned)", rest.plus(dense)
    if is_t5:
        tiles = reckoned(blueprint, rows, lambda q, k: n_tiles(q, k) * TILE * TILE)
        yield "one sequence, flex attention with the bias (reckoned)", rest.plus(tiles)


def counted(blueprint: Blueprint, rows: Sequence[EncodedRow], *, is_flat: bool) -> Count:
    """A step over rows, its depth extrapolated from shallow models."""
    depths = {s: b.count for s, b in blueprint.family.blocks(blueprint.model_config).items()}
    low, high = ({stack: n for stack in depths} for n in (2, 3))
    base, deeper = (
        step(steps._shallow(blueprint, sized), rows, is_flat=is_flat) for sized in (low, high)
    )
    more = next(iter(depths.values())) - 2
    return base.plus(deeper, more).plus(base, -more)


def step(blueprint: Blueprint, rows: Sequence[EncodedRow], *, is_flat: bool) -> Count:
    """Forward and backward passes of all micro batches."""
    config = AdapterConfig(
        n_skills=8, n_splits=8, layout="full" if is_t5(blueprint) else "attention"
    )
    imagined = steps.imagine_model(
        blueprint, BackboneConfig(name="shapes"), steps.fresh(config, ROWS)
    )
    total, adapter = Count(), imagined.adapter
    with steps.counted(imagined, on_gpu=True) as (_, placed):
        placed.model.train()
        for batch in cut_batches(rows, max_rows=MICRO, is_flat=is_flat):
            packed = placed.pack(batch, is_flat=is_flat)
            with filled(adapter, packed) as slots, Kernels() as kernels:
                slots.backward(validation.forward(placed, packed).sum.sum())
            total = total.plus(kernels.count())
    return total


def is_t5(blueprint: Blueprint) -> bool:
    """Whether there is an encoder."""
    return bool(blueprint.model_config.is_encoder_decoder)


def reckoned(
    blueprint: Blueprint,
    rows: Sequence[EncodedRow],
    pairs: Callable[[Sequence[int], Sequence[int]], float],
    *,
    mask_bytes: float = 0.0,
) -> Count:
    """Attention of a step over flat rows, `pairs` of queries and keys in each micro batch.

    Masks are read in both passes; T5's have a bias for each head in them, but in cross-attention.
    """
    config, total = blueprint.model_config, Count()
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", heads)
    width = getattr(config, "d_kv", None) or config.hidden_size // heads
    for batch in cut_batches(rows, max_rows=MICRO, is_flat=True):
        inputs = [len(row.input_ids) for row in batch]
        targets = [row.n_answer_tokens for row in batch]
        whole = [a + b - 1 for a, b in zip(inputs, targets)]
        kinds = [(whole, whole, 1)]
        if is_t5(blueprint):
            kinds = [(inputs, inputs, heads), (targets, targets, heads), (targets, inputs, 1)]
        for q, k, n_masks in kinds:
            flop = 2.0 * PRODUCTS * pairs(q, k) * heads * width
            moved = 2.0 * width * (OF_QUERIES * sum(q) * heads + OF_KEYS * sum(k) * keys)
            moved += 2.0 * mask_bytes * n_masks * sum(q) * sum(k)
            total = total.plus(Count(flop, moved, flop, moved), config.num_hidden_layers)
    return total


def n_tiles(q: Sequence[int], k: Sequence[int]) -> int:
    """Tiles in which a row's queries meet its keys."""
    touched = set()
    ends_q, ends_k = np.cumsum(q), np.cumsum(k)
    for n_q, n_k, end_q, end_k in zip(q, k, ends_q, ends_k):
        for i in range((end_q - n_q) // TILE, (end_q - 1) // TILE + 1):
            for j in range((end_k - n_k) // TILE, (end_k - 1) // TILE + 1):
                touched.add((i, j))
    return len(touched)


if __name__ == "__main__":
    main()
