"""What `plan` predicts against what was measured, and the rates it assumes against the card's.

`plan` itself takes a card's rates from the entries of `part_card` in `accept.json`.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import part_card
import part_llama
import part_t5
import torch
from board import Board, Found, Scale
from card_models import N_TASKS, Backbones, Step, backbone_of, run_steps
from paired import GIB
from part_card import matrix_rate, seconds

from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import BackboneConfig, HardwareConfig
from mhr_scale.planning import hardware
from mhr_scale.planning.cost import Case, Passes
from mhr_scale.planning.hardware import Machines, find_machines
from mhr_scale.planning.measured import measured_on
from mhr_scale.planning.placements import Placement, load_of, weigh
from mhr_scale.planning.steps import Shape, at_depth, fresh, trace_pretraining
from mhr_scale.planning.tracing import Trace
from mhr_scale.rows.batching import cut_batches

#: How far a predicted peak, above the weights, may be from the measured one, as a share of it.
MEMORY_WITHIN = 0.1
#: By which factor a predicted time may be off, either way.
TIME_WITHIN = 1.5
#: Products of a block of T5-XXL in a pass of 2,560 tokens: tokens, inputs, outputs.
LAYERS = ((2560, 4096, 4096), (2560, 4096, 10240), (2560, 10240, 4096))
REPLICATED = Placement(name="replicated", ds_config="", dtype="bfloat16")


def measure(board: Board, scale: Scale) -> None:
    """Rates, then a line for every step of the trainer that other parts have measured.

    If they have measured none, the first of T5's are measured here.
    """
    board.part = "card"  # its rates, which another process has measured unless this part runs alone
    part_card.measure(board, scale)
    board.part = "plan"
    board.run("products of layers", lambda: products(scale))
    machines = machine(scale)
    board.run("rates", lambda: rates(board, machines))
    steps = [("t5", step) for step in part_t5.all_steps(scale)]
    steps += [("llama", step) for step in part_llama.steps(scale)]
    steps = steps[:: 3 if scale.is_tiny else 1]
    if not any(board.values(part, step.name) for part, step in steps):
        own = part_t5.steps(scale)[: 2 if scale.is_tiny else 3]
        run_steps(board, Backbones(own[0].backbone, scale), own, matrix_rate(board, scale))
        steps = [("plan", step) for step in own]
    measured = with_measured_rates(machines, board)
    for part, step in steps:
        if values := board.values(part, step.name):
            board.run(
                f"{part}, {step.name}",
                lambda s=step, v=values: compare(s, dict(v), machines, measured, scale),
            )


# -- rates -----------------------------------------------------------------------------------------


def machine(scale: Scale) -> Machines:
    """This card by the table of `plan`; on the CPU by what `plan` measures there."""
    return find_machines(HardwareConfig(gpu=None if scale.on_gpu else "cpu", gpus=1))


def with_measured_rates(machines: Machines, board: Board) -> Machines:
    """The same as `hardware.measured` makes them of this board's file."""
    values = {key: entry.values for key, entry in board.entries.items()}
    found = measured_on(machines.name, "", values, place=str(board.file))
    return hardware.with_rates(machines, found)


def rates(board: Board, machines: Machines) -> Found:
    """Shares of the vendor's peaks that the card reaches by itself, beside those `plan` assumes."""
    card = {name: board.values("card", name) for name in ("matrix products", "memory", "copies")}
    launch = board.values("card", "launches").get("seconds")
    values: dict[str, Any] = {
        "launch_us": 1e6 * float(launch) if launch else None,
        "assumed launch_us": 1e6 * hardware.LAUNCH_SECONDS,
    }
    known = hardware.CARDS.get(machines.name)
    if machines.on_gpu:
        free, total = torch.cuda.mem_get_info()
        values["context_gib"] = (total - free - torch.cuda.memory_reserved()) / GIB
        values["assumed context_gib"] = hardware.CONTEXT_GIB
    if known is not None:
        pairs = {
            "product_share": (card["matrix products"], "flops_per_s", 1e12 * known.bf16_tflops),
            "memory_share": (card["memory"], "bytes_per_s", 1e9 * known.memory_gb_s),
            "host_share": (card["copies"], "up_bytes_per_s", 1e9 * known.host_gb_s),
        }
        for name, (own, key, peak) in pairs.items():
            values[name] = float(own[key] or 0.0) / peak if key in own else None
        layers = board.values("plan", "products of layers")["flops_per_s"]
        values["product_share of layers"] = float(layers or 0.0) / (1e12 * known.bf16_tflops)
        values["assumed product_share"] = hardware.PRODUCT_SHARE
        values["assumed memory_share"] = hardware.MEMORY_SHARE
    return Found(values)


def products(scale: Scale) -> Found:
    """FLOP/s of products as large as those of a block of T5-XXL, of random numbers, in bf16."""
    sizes = [tuple(n // 32 for n in size) for size in LAYERS] if scale.is_tiny else LAYERS
    values: dict[str, float] = {}
    flop = took = 0.0
    for n, inputs, outputs in sizes:
        options: dict[str, Any] = {"device": scale.device, "dtype": torch.bfloat16}
        x, weight = torch.randn(n, inputs, **options), torch.randn(outputs, inputs, **options)
        once = seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), scale)
        own = 2.0 * math.prod((n, inputs, outputs))
        values[f"{n} x {inputs} x {outputs}"] = own / once
        flop, took = flop + own, took + once
    return Found({"flops_per_s": flop / took, **values})


# -- predictions -----------------------------------------------------------------------------------


def compare(
    step: Step, values: dict[str, Any], machines: Machines, measured: Machines, scale: Scale
) -> Found:
    """Predicted over measured: bytes above the weights, in all, and seconds.

    `product_share that fits` is the share of the vendor's peak with which the time would be right.
    """
    config = backbone_of(step.backbone, scale)
    case, passes = predict(step, config, machines, on_gpu=scale.on_gpu)
    rows = case.counts.few
    by_table, by_rates = (
        replace(case, machines=one).estimate(rows, passes=passes, tokens=step.tokens)
        for one in (machines, measured)
    )
    memory, took = by_table.memory, values["ms"] / 1e3
    above = memory.logits + memory.activations + memory.gradients
    found = {
        "above_ratio": above / GIB / values["gib_above_weights"],
        "total_ratio": (above + memory.weights + memory.adapter) / GIB / values["gib"],
        "time_ratio": by_table.step_seconds / took,
        "time_ratio, measured rates": by_rates.step_seconds / took,
        "limit": by_table.seconds.limit,
    }
    known = hardware.CARDS.get(machines.name)
    left = took / by_table.passes - by_table.seconds.memory
    if known is not None and left > 0.0:
        flop = by_table.seconds.compute * machines.bf16_flops
        found["product_share that fits"] = flop / left / (1e12 * known.bf16_tflops)
    holds, goal = [], []
    if not scale.is_tiny:
        holds.append(1.0 / TIME_WITHIN <= found["time_ratio"] <= TIME_WITHIN)
        goal.append(f"time within a factor of {TIME_WITHIN:g}")
    if not step.lengths:  # of these `plan` says what the longest would take
        holds.append(abs(found["above_ratio"] - 1.0) <= MEMORY_WITHIN)
        goal.append(f"memory above the weights within {MEMORY_WITHIN:.0%}")
    return Found(found, all(holds) if holds else None, ", ".join(goal))


def predict(
    step: Step, config: BackboneConfig, machines: Machines, *, on_gpu: bool
) -> tuple[Case, int]:
    """What `plan` counts of a step on one replicated card: its passes, and their number."""
    blueprint = read_blueprint(config)
    longest, usual = shapes_of(step, config)
    recipe, n_micro = step.recipe(config), step.shape.rows // longest.rows

    def trace(shape: Shape) -> Trace:
        return at_depth(
            blueprint,
            lambda shallow: trace_pretraining(
                recipe, shallow, shape, n_tasks=N_TASKS, accumulates=n_micro > 1, on_gpu=on_gpu
            ),
        )

    counts = trace(longest)
    if usual != longest:
        other = trace(usual)
        counts = replace(counts, passes=other.passes, update=other.update)
    with torch.device("meta"):
        adapter = fresh(step.adapter, N_TASKS)(make_model(blueprint))
    rows = longest.rows
    case = Case(
        placement=REPLICATED,
        recompute=step.recompute,
        load=load_of(REPLICATED, weigh(blueprint), machines),
        machines=machines,
        counts=Passes(few=rows, many=2 * rows, of_few=counts, of_many=counts),
        adapter_bytes=4.0 * sum(parameter.numel() for parameter in adapter.parameters()),
        trains=True,
        reduces=False,
        is_same_precision=True,
    )
    return case, n_micro


def shapes_of(step: Step, config: BackboneConfig) -> tuple[Shape, Shape]:
    """A micro batch of rows as long as the longest, and as long as in a pass on average."""
    longest = step.micro_shape
    if not step.lengths:
        return longest, longest
    width, depth = (round(float(mean)) for mean in np.mean(step.lengths, 0))
    if step.packing:
        return longest, replace(
            longest, width=width, depth=depth, room=(longest.width, longest.depth)
        )
    blueprint = read_blueprint(config)
    batches = cut_batches(step.rows(), max_rows=step.micro)
    packed = [blueprint.family.pack(batch, blueprint.model_config) for batch in batches]
    depths = [one.labels_BD.shape[1] for one in packed for _ in one.rows]
    depth = round(float(np.mean(depths)))
    positions = sum(one.n_positions for one in packed) / len(step.lengths)
    return longest, replace(longest, width=round(positions) - depth, depth=depth)
