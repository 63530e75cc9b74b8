"""A plan as text, and as plain values for JSON."""

from dataclasses import asdict
from typing import Any

from mhr_scale.planning.cost import GIB, Estimate
from mhr_scale.planning.hardware import (
    CONTEXT_GIB,
    FRAGMENTED,
    MEMORY_SHARE,
    PRODUCT_SHARE,
)
from mhr_scale.planning.kinds import Plan
from mhr_scale.run.tables import prose, render

#: Names of backbone settings in a recipe whose backbone comes with its adapter.
RENAMED = {"backbone.dtype": "backbone_dtype", "backbone.quantise": "backbone_quantise"}
#: Columns of a rank's memory, and their heads; `host` is a machine's.
COLUMNS = (
    "weights",
    "gathered",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "process",
)
HEADS = ("weights", "whole", "adapter", "grad", "optim", "activ", "logits", "process")


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds and FLOP."""
    chosen = plan.chosen
    return {
        "kind": plan.kind,
        "what": plan.what,
        "hardware": {**asdict(plan.machines), "usable": plan.machines.usable},
        "placements": [estimate.as_json() for estimate in plan.estimates],
        "use": None if chosen is None else {**chosen.as_json(), "settings": settings(plan, chosen)},
        "notes": [*plan.notes, *assumptions(plan)],
    }


def as_text(plan: Plan) -> str:
    """The plan as a table, the placement to use and why, and the assumptions."""
    machines = plan.machines
    heads = [
        "GiB of a rank",
        *HEADS,
        "total",
        "host",
        plan.rows_are,
        "most",
        "s/step",
        "tokens/s",
        "limit",
    ]
    above = (
        f"{plan.kind}: {plan.what}\n"
        f"on {machines.ranks} x {machines.name} in {machines.nodes} machine(s), "
        f"{machines.memory / GIB:.1f} GiB each, {machines.usable / GIB:.1f} of it usable\n\n"
    )
    notes = [f"  {line}" for line in (*plan.notes, *assumptions(plan))]
    below = "\n".join(["", *_advice(plan), "", "Assumed:", *notes]) + "\n"
    table = render(heads, [_row(estimate) for estimate in plan.estimates])
    return prose(above) + table + prose(below)


def _row(estimate: Estimate) -> list[str]:
    name = estimate.placement.name + (" + recompute" if estimate.recompute != "none" else "")
    memory = estimate.memory
    parts = [_gib(getattr(memory, column)) for column in (*COLUMNS, "total", "host")]
    head = [name, *parts, str(estimate.rows), str(estimate.largest_rows)]
    if not estimate.fits:
        why = estimate.why_not or f"{estimate.rows} do not fit"
        return [*head, "", "", f"does not fit: {why}"]
    pace = [_figure(estimate.step_seconds), _figure(estimate.tokens_per_second)]
    return [*head, *pace, estimate.seconds.limit]


def _gib(size: float) -> str:
    """Bytes in GiB; nothing is "-", and little is not nothing."""
    if not size:
        return "-"
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB else "<0.01"


def _rate(flops: float) -> str:
    unit, factor = ("TFLOP/s", 1e12) if flops >= 1e12 else ("GFLOP/s", 1e9)
    return f"{_figure(flops / factor)} {unit}"


def _advice(plan: Plan) -> list[str]:
    chosen = plan.chosen
    if chosen is None:
        return [
            "Nothing fits: more or larger cards, shorter rows, or hardware.nodes for more machines."
        ]
    chosen_settings = " ".join(f"{name}={value}" for name, value in settings(plan, chosen).items())
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in chosen.extra.items())
    lines = [
        f"Use: {chosen.placement.name}",
        f"  {chosen_settings}",
        f"  {figures}",
        f"  {_why(chosen)}",
    ]
    if chosen.recompute != "none" and plan.kind == "adapt":
        lines.append("  (backbone.recompute: in a recipe with a backbone part of its own)")
    return lines


def _figure(value: float) -> str:
    """A number with three digits, or more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"


def _why(estimate: Estimate) -> str:
    parts = estimate.seconds.parts
    shares = ", ".join(
        f"{name} {_figure(value * 1e3)} ms" for name, value in parts.items() if value
    )
    return (
        f"{estimate.passes} pass(es) a step, {_figure(estimate.flop / 1e12)} TFLOP, "
        f"{estimate.kernels:,.0f} kernels; "
        f"of a pass: {shares}; limited by {estimate.seconds.limit}"
    )


def settings(plan: Plan, estimate: Estimate) -> dict[str, str]:
    """The recipe's settings that select an estimate's placement and rows."""
    chosen = dict(estimate.placement.settings)
    if plan.kind != "pretrain":
        chosen = {RENAMED.get(name, name): value for name, value in chosen.items()}
    if plan.kind != "evaluate":
        chosen["backbone.recompute"] = estimate.recompute
    rows = {"pretrain": "batch.micro_batch_size", "adapt": "waves.size"}.get(plan.kind)
    if rows is not None:
        chosen[rows] = str(estimate.rows)
    return chosen


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind the figures."""
    machines = plan.machines
    lines = [
        "bytes, operations and kernels are counted on the program itself; frozen weights have no "
        "gradients and no optimizer state",
        f"matrix products reach {_rate(machines.bf16_flops)} in bf16 and "
        f"{_rate(machines.fp32_flops)} in fp32, memory {_figure(machines.memory_rate / 1e9)} GB/s, "
        f"gathers {_figure(machines.gather_rate / 1e9)} GB/s, the host's link "
        f"{_figure(machines.host_rate / 1e9)} GB/s",
        "gathers, copies and products overlap; the longest of them is the time of a pass",
        "int8 and nf4 are counted as bf16 whose weights are unpacked for every product",
        "kernels and bytes are counted as without backbone.compile, which joins some; under it "
        "only replicated whole weights are considered",
    ]
    if machines.on_gpu:
        of_peaks = (
            f"of the makers' peaks products reach {PRODUCT_SHARE:.0%}, memory {MEMORY_SHARE:.0%}"
        )
        lines.insert(
            1,
            f"{CONTEXT_GIB} GiB and {FRAGMENTED:.0%} of a card are not the run's; "
            f"{machines.measured or of_peaks}; a kernel costs "
            f"{_figure(machines.launch_seconds * 1e6)} us to start",
        )
    else:
        lines += [
            "on a CPU host memory is the ranks' own: host is what all ranks of a machine take",
            "mapped: the backbone's files hold that data type (convert writes it), and lie once in "
            "a machine's file cache beside the ranks; what has no room there is read again in "
            f"every pass, at {_figure(machines.disk_rate / 1e9)} GB/s (hardware.disk_gb_s)",
        ]
    return lines
