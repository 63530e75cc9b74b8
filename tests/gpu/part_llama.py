"""Steps at the shapes of Llama-3.1-8B, rows of 2,048 tokens: every way, ours packed and so on."""

from dataclasses import replace

import torch
from board import Board, Found, Scale
from card_models import LLAMA_8B, LORA, MHR_8, Backbones, Step, compiled, run_steps
from paired import flops_of, found_of, take_turns, with_goal
from part_card import matrix_rate
from step_time_causal import CAUSAL_SHAPES, causal_ways
from step_time_ways import Setting

from mhr_scale.planning.steps import Shape

WAYS = (
    "frozen stock",
    "frozen fused",
    "LoRA",
    "Poly",
    "MHR 8",
    "MHR 64",
    "PEFT LoRA, all logits",
    "PEFT LoRA",
    "PEFT Poly",
)
BASES = ("frozen stock", "PEFT LoRA, all logits", "PEFT LoRA")
#: Tokens/s of LoRA in bfloat16 elsewhere, by what the card's name has in it: NeMo AutoModel,
#: Llama3-8B, 4,096 tokens; Qwen-7B, 2,048 tokens.
PUBLISHED = {"H100": 12473.0, "H200": 12473.0, "A100": 3150.0}


def setting_of(scale: Scale) -> Setting:
    """Two rows of 2,048 tokens, 256 of them targets."""
    rows, tokens, targets = (4, 32, 16) if scale.is_tiny else (2, 1792, 256)
    model = "llama-tiny" if scale.is_tiny else "llama-8b"
    return Setting(
        model=model, rows=rows, tokens=tokens, targets=targets, device=scale.device, updates=True
    )


def steps(scale: Scale) -> list[Step]:
    """Steps of the trainer over 4 such rows, LoRA packed first: what is published elsewhere."""
    rows, width, depth = (4, 16, 8) if scale.is_tiny else (4, 1792, 256)
    lora = Step(
        name="LoRA, packed",
        backbone=LLAMA_8B,
        shape=Shape(rows=rows, width=width, depth=depth, n_tasks=rows),
        adapter=LORA,
        packing=True,
    )
    mhr = replace(lora, name="MHR 8, packed", adapter=MHR_8)
    return [
        lora,
        mhr,
        replace(mhr, name="MHR 8, padded", packing=False),
        replace(mhr, name="MHR 8, recomputing", recompute="non_reentrant"),
    ]


def published(scale: Scale) -> dict[str, tuple[str, float]]:
    """The goal on this card, if one of its kind has published figures."""
    name = torch.cuda.get_device_name(scale.device) if scale.on_gpu else ""
    rates = [rate for kind, rate in PUBLISHED.items() if kind in name]
    return {"tokens_per_s": (">=", rates[0])} if rates else {}


def measure(board: Board, scale: Scale) -> None:
    """All ways, then the trainer's steps."""
    backbones = Backbones(LLAMA_8B, scale)
    rate, setting = matrix_rate(board, scale), setting_of(scale)
    batch = f"{setting.rows} x ({setting.tokens} + {setting.targets})"

    def compare() -> dict[str, Found | str]:
        assert CAUSAL_SHAPES[setting.model]["hidden_size"] == backbones.stock.config.hidden_size
        ways = causal_ways(backbones.stock, setting, WAYS)
        found = take_turns(ways, scale)
        flops = flops_of(ways[0]) if not found[ways[0].name].error else float("nan")
        tokens = setting.rows * (setting.tokens + setting.targets)
        entries = found_of(found, bases=BASES, flops=flops, tokens=tokens, rate=rate)
        goals = {"x frozen stock": ("<=", 1.05), "x PEFT LoRA, all logits": ("<=", 0.75)}
        with_goal(entries, "MHR 8", goals, scale)
        return {f"{batch}, {way}": entry for way, entry in entries.items()}

    board.run_together([f"{batch}, {way}" for way in WAYS], compare)
    run_steps(board, backbones, steps(scale), rate, goals=published(scale))
    run_steps(board, backbones, compiled(steps(scale)[1], scale), rate)
