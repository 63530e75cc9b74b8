"""What the measuring parts of `accept.py` would take of a GPU's memory, found without one.

Every way runs once at its full shape on the meta device, with the operations that a GPU would get:
a wrong shape or argument shows here, and so does what would not fit. Steps of the trainer are
those that `plan` counts.
"""

import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from board import Board, Found, Scale
from card_models import Backbones, Step, backbone_of
from few_shot_counts import Counter, like_a_gpu
from paired import GIB, Timed, distinct
from part_plan import predict
from step_time_counts import Live

from mhr_scale.config import HardwareConfig
from mhr_scale.planning.hardware import Machines, find_machines


def rehearse_all(parts: dict[str, Any], card: str) -> int:
    """Rehearse modules by name, for a card of the table of `plan`; 0 if all runs and fits, else 1.

    The last line tells how many ways fail or do not fit.
    """
    machines = find_machines(HardwareConfig(gpu=card, gpus=1))
    usable = machines.usable / GIB
    scale = Scale(is_tiny=False, device=torch.device("meta"))
    n_bad = 0
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as folder, like_a_gpu():
            board = Board(Path(folder), scale)
            board.part = name
            rehearse(part, board, machines)
        for entry in board.entries.values():
            gib = entry.values.get("gib")
            bad = bool(entry.error) or (isinstance(gib, float) and gib > usable)
            n_bad += bad
            print(f"{name}: {entry.name}: {gib or 0.0:.1f} GiB {'!' if bad else ''}{entry.error}")
    print(f"{n_bad} fail or are above the {usable:.1f} GiB that tensors can use on {card}")
    return int(n_bad > 0)


def rehearse(part: Any, board: Board, machines: Machines) -> None:
    """Run a part's own code with its timing replaced."""

    def run_steps(
        board: Board, backbones: Backbones, steps: Sequence[Step], rate: float, **_: Any
    ) -> None:
        for step in steps:
            board.run(step.name, lambda s=step: planned(s, board.scale, machines))

    replaced: dict[str, Any] = {
        "take_turns": once,
        "run_steps": run_steps,
        "flops_of": lambda way: 1.0,
        "matrix_rate": lambda *_: machines.bf16_flops,
    }
    own = {name: value for name, value in replaced.items() if hasattr(part, name)}
    with mock.patch.multiple(part, **own):
        part.measure(board, board.scale)


def once(ways: Sequence[Any], scale: Scale, **_: Any) -> dict[str, Timed]:
    """Each way once: its bytes, and a second that means nothing."""
    found = {}
    for way in ways:
        timed = found[way.name] = Timed(seconds=[1.0])
        own = [*way.model.parameters(), *way.model.buffers()]
        held = sum(tensor.untyped_storage().nbytes() for tensor in distinct(own))
        if getattr(way, "update", None) is not None:
            way = replace(way, update=None)  # the meta device has no sparse gradients
        try:
            with Counter("meta"), Live(own) as live:
                way.step()
        except Exception:
            timed.error = traceback.format_exc(limit=-8)
        timed.above = float(live.peak)
        timed.peak = held + timed.above
        print(f"  {way.name}: {timed.peak / GIB:.1f} GiB", file=sys.stderr, flush=True)
    return found


def planned(step: Step, scale: Scale, machines: Machines) -> Found:
    """A step of the trainer as `plan` has it."""
    case, _ = predict(step, backbone_of(step.backbone, scale), machines, on_gpu=True)
    return Found({"gib": case.memory(case.counts.few).total / GIB})
