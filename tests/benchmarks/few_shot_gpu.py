"""What a GPU would give: steps counted on the meta device at the real shapes of T5.

An estimate, not a measurement. A step takes the longest of three: the launches of its kernels, the
time the device computes, and the fetching of frozen weights where they are not resident. The three
overlap fully, rows are padded; kernels reach fixed shares of the peaks (`few_shot_counts.CHIPS`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from few_shot_counts import CHIPS, Counter, Counts, count, like_a_gpu
from few_shot_peft import Method, PeftLoop
from few_shot_ways import Bench, Setting, Waves, Way

from mhr_scale.adapters import find_sites
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.gradients import order_gradients
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.modes import set_dropout
from mhr_scale.run.runlog import Progress


def _v1_1(d_model: int, d_ff: int, heads: int, layers: int) -> Setting:
    return Setting(
        d_model=d_model,
        d_ff=d_ff,
        heads=heads,
        layers=layers,
        rows=8,
        tokens=32,
        vocabulary=32128,
        dtype="bfloat16",
    )


#: T5 v1.1 (LM-adapt, T0); small with 8 heads of 64, for 8 splits.
SHAPES = {
    "small": _v1_1(512, 1024, 8, 8),
    "base": _v1_1(768, 2048, 12, 12),
    "large": _v1_1(1024, 2816, 16, 24),
    "XL": _v1_1(2048, 5120, 32, 24),
    "XXL": _v1_1(4096, 10240, 64, 24),
}
#: Where the frozen weights come from in every pass, and how fast: bytes/s.
LINKS = {
    "resident": math.inf,
    "offloaded, 25 GB/s": 25e9,
    "ZeRO-3 on 8, 230 GB/s": 230e9 / (7 / 8),
    "ZeRO-3 on 8, 11 GB/s": 11e9 / (7 / 8),
}
#: Forward and backward each need all frozen weights.
PASSES = 2.0
SIZES = (1, 8, 24)
META = torch.device("meta")


def estimates(shapes: Sequence[str], *, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by shape, input length, chip and link: ms per job-step one by one, and what others gain.

    The jobs are of kind full (MHR, 8 skills, 8 splits, rank 1) under AdamW, 8 rows each, bfloat16.
    """
    progress = Progress(len(shapes) * len(tokens), start=0, what="counted", unit="shape")
    rows = []
    for name in shapes:
        for length in tokens:
            counts, weight_bytes = counted_ways(name, length)
            rows += [
                {"shape": name, "tokens": length, "chip": chip.name, "weights": link}
                | estimate(counts, number, weight_bytes=weight_bytes, link=speed)
                for link, speed in LINKS.items()
                for number, chip in enumerate(CHIPS)
            ]
            progress.advance(f"{name}, {length} tokens")
    progress.close()
    return rows


def counted_ways(name: str, length: int) -> tuple[dict[str, tuple[Counts, int]], float]:
    """Counts and jobs per step of every way, and the bytes of the frozen weights."""
    setting = replace(SHAPES[name], tokens=length)
    blueprint = read_blueprint(setting.backbone())
    found = {}
    with like_a_gpu():
        with META, Counter("meta"):
            ours, bare = (make_model(blueprint).to(torch.bfloat16) for _ in range(2))
            set_dropout(bare, 0.0)
            set_dropout(ours, 0.0)
            sites = find_sites(ours, "full")
            placed = PlacedBackbone(
                engine=Engine({}, timeout_seconds=60.0, device=META),
                family=blueprint.family,
                model=ours,
                adapted=wrap(ours, sites),
            )
            order_gradients(ours, blueprint.family)
            bench = Bench(setting, "full", "adamw", sites, packing=False)
            first = bench.start(0)
            bench.start = lambda number: first
        ways: list[Way] = [Waves(bench, placed, size=size) for size in SIZES]
        methods: tuple[Method, ...] = ("lora", "poly")
        ways += [
            PeftLoop(bench, bare, method=method, device=META, many_tensors=True)
            for method in methods
        ]
        for way in ways:
            with META, Counter("meta"):
                handle = way.open(range(way.size))
            with Counter("meta"):
                way.step(handle)
            found[way.name] = count(lambda: way.step(handle), device="meta"), way.size  # noqa: B023
            way.close(handle)
    return found, 2.0 * sum(parameter.numel() for parameter in bare.parameters())


def estimate(
    counts: dict[str, tuple[Counts, int]], chip: int, *, weight_bytes: float, link: float
) -> dict[str, Any]:
    """Milliseconds per job-step one by one, what bounds them, and how much longer others take."""
    seconds, bounds = {}, {}
    for way, (found, size) in counts.items():
        parts = {
            "launches": found.kernels * CHIPS[chip].launch_seconds,
            "device": found.device_seconds[chip],
            "link": PASSES * weight_bytes / link,
        }
        bounds[way] = max(parts, key=lambda part: parts[part])
        seconds[way] = parts[bounds[way]] / size
    alone = seconds["one by one, padded"]
    return {
        "one by one, ms": 1000 * alone,
        "bound by": bounds["one by one, padded"],
        "waves of 8 gain": alone / seconds["waves of 8, padded"],
        "waves of 24 gain": alone / seconds["waves of 24, padded"],
        "PEFT LoRA / waves of 8": seconds["PEFT LoRA"] / seconds["waves of 8, padded"],
        "PEFT Poly / waves of 8": seconds["PEFT Poly"] / seconds["waves of 8, padded"],
        "counts": {way: found.per(size) for way, (found, size) in counts.items()},
    }
