"""Steps at the shapes of T5-XXL: every way of training, ours packed, recomputing and compiled."""

from dataclasses import replace

from board import Board, Found, Scale
from card_models import T0_11B, Backbones, Step, compiled, run_steps
from paired import flops_of, found_of, take_turns, with_goal
from part_card import matrix_rate
from step_time_ways import SHAPES, Setting, all_ways

from mhr_scale.planning.steps import Shape

WAYS = (
    "frozen stock",
    "frozen fused",
    "LoRA",
    "Poly",
    "MHR 8",
    "MHR 64",
    "PEFT LoRA",
    "PEFT LoRA, bf16",
    "PEFT Poly",
)
BASES = ("frozen stock", "PEFT LoRA")
#: What MHR with 8 splits is to take of the frozen backbone's step, and of PEFT's LoRA.
GOALS = {"x frozen stock": ("<=", 1.05), "x PEFT LoRA": ("<=", 0.75)}
#: Share of the card's measured rate that a step of T0-11B is to reach.
LEAST_SHARE = 0.45
#: Tokens of inputs and targets of 32 rows, at equal steps in the order of 2,560 rows of a sample
#: of T0's mixture (`tests/benchmarks/packing.py`), inputs cut at 512 tokens.
LENGTHS = (
    *((11, 23), (18, 17), (26, 3), (28, 17), (31, 15), (35, 16), (40, 7), (48, 7)),
    *((55, 2), (62, 5), (71, 2), (80, 2), (87, 2), (93, 16), (99, 2), (105, 2)),
    *((111, 6), (119, 4), (126, 6), (134, 2), (143, 83), (153, 11), (162, 10), (175, 2)),
    *((185, 125), (207, 2), (224, 9), (255, 2), (308, 3), (409, 9), (512, 3), (512, 8)),
)


def settings(scale: Scale) -> dict[str, Setting]:
    """Batches of the compared ways."""
    sizes = ((4, 16, 8),) if scale.is_tiny else ((8, 256, 64), (32, 128, 32))
    model = "tiny" if scale.is_tiny else "xxl"
    return {
        f"{rows} x ({tokens} + {targets})": Setting(
            model=model,
            rows=rows,
            tokens=tokens,
            targets=targets,
            device=scale.device,
            updates=True,
        )
        for rows, tokens, targets in sizes
    }


def steps(scale: Scale) -> list[Step]:
    """Steps of the trainer: MHR with 8 splits."""
    rows, width, depth = (4, 16, 8) if scale.is_tiny else (8, 256, 64)
    whole = Step(
        name="padded",
        backbone=T0_11B,
        shape=Shape(rows=rows, width=width, depth=depth, n_tasks=rows),
    )
    return [
        whole,
        replace(whole, name="packed", packing=True),
        replace(whole, name="recomputing", recompute="non_reentrant"),
        replace(whole, name="recomputing, reentrant", recompute="reentrant"),
        replace(whole, name="packed, recomputing", packing=True, recompute="non_reentrant"),
    ]


def mixed_steps(scale: Scale) -> list[Step]:
    """The trainer over rows of the lengths of a real mixture: buckets of 8 rows, and packed."""
    lengths = LENGTHS[::8] if scale.is_tiny else LENGTHS
    width, depth = (max(one) for one in zip(*lengths, strict=True))
    rows = len(lengths)
    padded = Step(
        name="lengths of T0, padded",
        backbone=T0_11B,
        shape=Shape(rows=rows, width=width, depth=depth, n_tasks=rows),
        micro=2 if scale.is_tiny else 8,
        lengths=lengths,
    )
    return [padded, replace(padded, name="lengths of T0, packed", packing=True)]


def large_step(scale: Scale) -> Step:
    """A step of T0-11B: 16 rows of 256 + 64 tokens in one pass."""
    rows, width, depth = (4, 16, 8) if scale.is_tiny else (16, 256, 64)
    shape = Shape(rows=rows, width=width, depth=depth, n_tasks=rows)
    name = f"T0-11B, {rows} x ({width} + {depth})"
    return Step(name=name, backbone=T0_11B, shape=shape, packing=True)


def all_steps(scale: Scale) -> list[Step]:
    """Every step of the trainer."""
    return [*steps(scale), *mixed_steps(scale), large_step(scale)]


def measure(board: Board, scale: Scale) -> None:
    """All ways on two batches, then the trainer's steps."""
    backbones = Backbones(T0_11B, scale)
    rate = matrix_rate(board, scale)
    for batch, setting in settings(scale).items():
        names = [f"{batch}, {way}" for way in WAYS]
        board.run_together(names, lambda s=setting, b=batch: compare(backbones, s, b, scale, rate))
    goals = {"share_of_rate": (">=", LEAST_SHARE)}
    run_steps(board, backbones, [large_step(scale)], rate, goals=goals)
    for group in (steps(scale), mixed_steps(scale)):
        run_steps(board, backbones, group, rate)
    run_steps(board, backbones, compiled(steps(scale)[1], scale), rate)


def compare(
    backbones: Backbones, setting: Setting, batch: str, scale: Scale, rate: float
) -> dict[str, Found | str]:
    """Every way on one batch."""
    assert SHAPES[setting.model]["d_model"] == backbones.stock.config.d_model
    ways = all_ways(backbones.stock, setting, WAYS)
    found = take_turns(ways, scale)
    tokens = setting.rows * (setting.tokens + setting.targets)
    flops = flops_of(ways[0]) if not found[ways[0].name].error else float("nan")
    entries = found_of(found, bases=BASES, flops=flops, tokens=tokens, rate=rate)
    with_goal(entries, "MHR 8", GOALS, scale)
    return {f"{batch}, {way}": entry for way, entry in entries.items()}
