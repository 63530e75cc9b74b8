"""Tokens' slots: a product for each range of tokens, or one with the columns of all slots masked.

python tests/benchmarks/slot_products.py [--dtype bfloat16] [--json FILE]

All low-rank products of a linear, forward and backward, of tokens that are in ranges of their
slots, over slots x rank x width x tokens: `Spans` against `Masked`, in turns. `RowMap` chooses by
one number (`MOST_MASKED`). The table says where that choice is slower than the other by more than a
fifth, and what other numbers would have cost: the mean over all cases of the time against the
better of the two.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import RESULTS, machine
from step_time_ways import Setting
from torch import Tensor

from mhr_scale.adapters.by_slot import MOST_MASKED, BySlot, Masked, Span, Spans
from mhr_scale.run.runlog import Progress, start_logging

#: In and out features.
WIDTHS = ((256, 256), (256, 512), (512, 1536), (1536, 512), (576, 1536), (2048, 2048))
SLOTS, RANKS, TOKENS = (2, 4, 8, 16, 64), (1, 3, 4, 16), (64, 512, 2048)
#: How much slower the chosen way may be.
MARGIN = 1.2
#: What `MOST_MASKED` could be.
LIMITS = tuple(int(base * 10**power) for power in (4, 5, 6, 7) for base in (1, 1.5, 2, 3, 4, 6, 8))
SHORTEST_SECONDS = 2e-3
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Row:
    """Time all cases, print where the rule is wrong, and return what the JSON file gets."""
    args = parse(arguments)
    start_logging()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    cases = [
        (tokens, width, slots, rank)
        for tokens, width, slots, rank in itertools.product(
            args.tokens, WIDTHS[: args.widths], args.slots, args.ranks
        )
        if slots <= tokens
    ]
    progress = Progress(len(cases), start=0, what=f"slots, {args.dtype}", unit="case")
    rows = []
    for tokens, (n_in, n_out), slots, rank in cases:
        rows.append(time_case(tokens, n_in, n_out, slots, rank, dtype=dtype, turns=args.turns))
        progress.advance(f"{tokens} x {n_in}, {slots} slots of rank {rank}")
    progress.close()
    found = {"machine": machine(Setting(dtype=dtype)), "dtype": args.dtype, "rows": rows}
    found["machine"]["load_after"] = os.getloadavg()
    limit = MOST_MASKED[dtype]
    found |= {"limit": limit, "costs": {one: cost(rows, one) for one in (*LIMITS, limit)}}
    print(to_markdown(rows, found["costs"], limit))
    if args.json:
        keep(Path(args.json), args.dtype, found)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[*TOKENS], help="tokens of all slots")
    add("--slots", nargs="+", type=int, default=[*SLOTS], help="slots")
    add("--ranks", nargs="+", type=int, default=[*RANKS], help="hidden columns of a slot")
    add("--widths", type=int, default=len(WIDTHS), help="the first so many shapes (all)")
    add("--turns", type=int, default=9, help="turns (9)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    add("--threads", type=int, default=1, help="threads (1)")
    add("--json", help=f"keep the figures here too (say {RESULTS.name}/slot_products_cpu.json)")
    return parser.parse_args(arguments)


def time_case(
    n_tokens: int, n_in: int, n_out: int, n_slots: int, rank: int, *, dtype: Any, turns: int
) -> Row:
    """Medians of both ways, and of their ratio within a turn."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inner = torch.randperm(n_tokens - 1, generator=generator)[: n_slots - 1].add(1).tolist()
    cuts = [0, *sorted(inner), n_tokens]
    spans = tuple(Span(slot, *ends) for slot, ends in enumerate(itertools.pairwise(cuts)))
    mask = torch.zeros(n_tokens, n_slots, 1, dtype=dtype)
    for span in spans:
        mask[span.start : span.stop, span.slot] = 1.0
    x, g = draw(n_tokens, n_in), draw(n_tokens, n_out)
    a_UIR, b_URO = draw(n_slots, n_in, rank), draw(n_slots, rank, n_out)
    ways = {"spans": Spans(spans, n_tokens), "masked": Masked(spans, n_tokens, mask)}
    y, dx = torch.zeros_like(g), torch.zeros_like(x)

    def run(by: BySlot) -> None:
        h = by.down(x, a_UIR)
        by.add_up_(y, h, b_URO)
        dh = by.pull(g, b_URO)
        by.add_down_(dx, dh, a_UIR)
        by.grad_a(x, dh, a_UIR)
        by.grad_b(h, g, b_URO)

    repeats = 1
    for by in ways.values():
        run(by)
        begun = time.perf_counter()
        run(by)
        repeats = max(repeats, int(SHORTEST_SECONDS / (time.perf_counter() - begun)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in [*ways][:: -1 if turn % 2 else 1]:
            begun = time.process_time()
            for _ in range(repeats):
                run(ways[name])
            times[name].append((time.process_time() - begun) / repeats)
    ratios = [m / s for s, m in zip(times["spans"], times["masked"], strict=True)]
    return {
        **{"tokens": n_tokens, "in": n_in, "out": n_out, "slots": n_slots, "rank": rank},
        **{f"{name}_us": 1e6 * statistics.median(seconds) for name, seconds in times.items()},
        "masked / spans": statistics.median(ratios),
    }


def size(row: Row) -> float:
    """What `RowMap.by_slot` compares with the limit."""
    return float(row["tokens"] * row["in"] * row["rank"])


def slowdown(row: Row, limit: float) -> float:
    """How many times as long as the better way the one takes that a limit chooses."""
    ratio = row["masked / spans"]
    chosen = ratio if size(row) <= limit else 1.0
    return float(chosen / min(1.0, ratio))


def cost(rows: Sequence[Row], limit: float) -> float:
    """The mean slowdown."""
    return statistics.fmean(slowdown(row, limit) for row in rows)


def keep(file: Path, dtype: str, found: Row) -> None:
    """Add one data type's figures to the file."""
    whole: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(whole | {dtype: found}, indent=1) + "\n", encoding="utf-8")


def to_markdown(rows: Sequence[Row], costs: dict[int, float], limit: int) -> str:
    """Where the rule is wrong, and what other limits cost."""
    wrong = [row for row in rows if slowdown(row, limit) > MARGIN]
    lines = [f"{len(wrong)} of {len(rows)} cases are slower by more than {MARGIN - 1:.0%}:", ""]
    lines += ["| tokens | in | out | slots | rank | spans us | masked us | masked / spans | size |"]
    lines += ["|---" * 9 + "|"]
    for row in wrong:
        cells = [*(str(row[name]) for name in ("tokens", "in", "out", "slots", "rank"))]
        cells += [f"{row['spans_us']:.0f}", f"{row['masked_us']:.0f}"]
        cells += [f"{row['masked / spans']:.2f}", f"{size(row):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    best = min(costs, key=lambda one: costs[one])
    lines += ["", f"limit {limit:,} (now): mean slowdown {costs[limit]:.3f}; the least is "]
    lines[-1] += f"{costs[best]:.3f} at {best:,}"
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
