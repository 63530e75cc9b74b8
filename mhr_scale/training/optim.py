"""Optimizers of inventory and routing, learning-rate schedule, clipping.

Adafactor's second moment is factored over whole tensors, so stacking must not change which numbers
share statistics: `lead` says how many leading dimensions index separate tensors. A stacked
parameter is then updated exactly as its members would be separately.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter
from mhr_scale.config import OptimConfig, ScheduleConfig
from mhr_scale.errors import RunError
from mhr_scale.families.fused import is_on_cpu

#: Optimizer state off the device: tensors as `<parameter>/<part>`, numbers by parameter and part.
OptimizerState: TypeAlias = tuple[dict[str, Tensor], dict[str, dict[str, float]]]


#: Adafactor's constants, as in transformers: the epsilon of squared gradients, the least RMS that
#: scales a rate, the largest RMS of an update, and the exponent of the second moment's decay.
LEAST_SQUARE, LEAST_RMS, LARGEST_UPDATE, DECAY_RATE = 1e-30, 1e-3, 1.0, -0.8


#: Numbers of a stack that an optimizer works on at once: so many stay in a processor's cache; on a
#: GPU so many take longer than starting their kernels. What is made on the way takes up to 16 bytes
#: of each.
AT_ONCE = {"cpu": 2**18}
AT_ONCE_ON_DEVICES = 2**22


class Adafactor(Optimizer):
    """Adafactor without momentum or relative steps (Shazeer and Stern 2018; transformers' rules).

    Each parameter group has `lr` and `weight_decay`. It may set `lead` (leading dimensions that
    index separate tensors, default 0) and `routing` (the parameter is a routing table (T, G, Q, S):
    G separate tables (T, Q * S), whose gradient may be sparse over T; with `rows_apart` T * G
    tables (1, Q * S), dense). A table row without a gradient is not changed at all, so the sparse
    update equals the dense one.

    A group's `lr` may be a tensor that broadcasts against its parameters (tables apart: against
    (T, G, 1, Q * S)), such as one rate per task.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, scale_parameter: bool) -> None:
        layout = {"lead": 0, "routing": False, "rows_apart": False}
        super().__init__(groups, {"scale_parameter": scale_parameter, **layout})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Adafactor takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    update = _step_rows if parameter.grad.is_sparse else _step_dense
                    update(parameter, group, state)


def _blocks(tensor: Tensor, group: dict[str, Any]) -> tuple[Tensor, int]:
    """The tensor as blocks of separate tensors, and the number of leading block dimensions."""
    if not group["routing"]:
        return tensor, group["lead"]
    tables_TGX = tensor.flatten(2)
    return (tables_TGX.unsqueeze(2), 2) if group["rows_apart"] else (tables_TGX.transpose(0, 1), 1)


def at_once(stack: Tensor) -> list[slice]:
    """Ranges of the linears (dimension 0) of a stack that are worked on together.

    No linear is divided, and none is alone if there are several: torch may sum to one number in
    another order than to many.
    """
    n_linears, most = stack.shape[0], AT_ONCE["cpu"] if is_on_cpu(stack) else AT_ONCE_ON_DEVICES
    count = max(2, most * n_linears // max(1, stack.numel()))
    firsts = list(range(0, max(1, n_linears - 1), count))
    return [slice(*ends) for ends in pairwise([*firsts, n_linears])]


def _beta2(state: dict[str, Any]) -> float:
    return float(1.0 - math.pow(state["step"], DECAY_RATE))


def _rate(values: Tensor, group: dict[str, Any], dims: tuple[int, ...]) -> Tensor | float:
    """Learning rate, times the RMS of each separate tensor under `scale_parameter`."""
    lr: Tensor | float = group["lr"]
    if not group["scale_parameter"]:
        return lr
    rms = values.square().mean(dims, keepdim=True).sqrt()
    return rms.clamp(min=LEAST_RMS) * lr


def _step_dense(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
    """One update of a stacked parameter from a dense gradient, some of its linears at a time."""
    assert parameter.grad is not None
    values, lead = _blocks(parameter.data, group)
    gradient, _ = _blocks(parameter.grad, group)
    is_factored = values.dim() - lead >= 2
    if is_factored and "row" not in state:
        state["row"] = torch.zeros_like(gradient[..., 0])
        state["column"] = torch.zeros_like(gradient[..., 0, :])
    elif not is_factored and "square" not in state:
        state["square"] = torch.zeros_like(gradient)
    statistics = [state[name] for name in (("row", "column") if is_factored else ("square",))]
    is_stack = lead > 0 and not group["routing"]
    for linears in at_once(values) if is_stack else [slice(None)]:
        own = [statistic[linears] for statistic in statistics]
        _step_part(values[linears], gradient[linears], own, group, lead, _beta2(state))


def _step_part(
    values: Tensor,
    gradient: Tensor,
    statistics: list[Tensor],
    group: dict[str, Any],
    lead: int,
    beta2: float,
) -> None:
    """Update values in place, and their statistics: row and column means, or each square."""
    dims = tuple(range(lead, values.dim()))
    square = gradient.square().add_(LEAST_SQUARE)
    if len(statistics) == 2:
        row, column = statistics
        row.mul_(beta2).add_(square.mean(-1), alpha=1.0 - beta2)
        column.mul_(beta2).add_(square.mean(-2), alpha=1.0 - beta2)
        del square
        update = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1) * gradient
        update.mul_(column.rsqrt().unsqueeze(-2))
    else:
        (second,) = statistics
        update = second.mul_(beta2).add_(square, alpha=1.0 - beta2).rsqrt().mul_(gradient)
        del square
    rms = update.square().mean(dims, keepdim=True).sqrt()
    update.div_((rms / LARGEST_UPDATE).clamp_(min=1.0))
    rate = _rate(values, group, dims)
    if group["weight_decay"]:
        values.sub_(values * (rate * group["weight_decay"]))
    values.sub_(update.mul_(rate))


def _step_rows(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
    """One update of a routing table (T, G, Q, S) from the gradient of some of its rows.

    U rows of T have a gradient; the statistics are those of the dense update with zeros elsewhere.
    """
    assert parameter.grad is not None
    assert group["routing"]
    assert not group["rows_apart"]
    gradient = parameter.grad.coalesce()
    rows = gradient.indices()[0]
    gradient_GUX = gradient.values().flatten(2).transpose(0, 1)
    n_tasks, beta2 = parameter.shape[0], _beta2(state)
    square_GUX = gradient_GUX.square()
    if "row" not in state:
        state["row"] = gradient_GUX.new_zeros(gradient_GUX.shape[0], n_tasks)
        state["column"] = gradient_GUX.new_zeros(gradient_GUX.shape[0], gradient_GUX.shape[2])
    row_GT = state["row"].mul_(beta2).add_(LEAST_SQUARE * (1.0 - beta2))
    row_GT.index_add_(1, rows, square_GUX.mean(-1), alpha=1.0 - beta2)
    column_GX = (
        state["column"]
        .mul_(beta2)
        .add_(square_GUX.sum(1) / n_tasks + LEAST_SQUARE, alpha=1.0 - beta2)
    )
    share_GU = row_GT.index_select(1, rows) / row_GT.mean(-1, keepdim=True)
    update_GUX = gradient_GUX * share_GU.rsqrt().unsqueeze(-1) * column_GX.rsqrt().unsqueeze(1)
    mean_square = update_GUX.square().sum((1, 2), keepdim=True) / (n_tasks * update_GUX.shape[2])
    update_GUX.div_((mean_square.sqrt() / LARGEST_UPDATE).clamp_(min=1.0))
    rate = _rate(_blocks(parameter.data, group)[0], group, (1, 2))
    update_UGQS = (update_GUX * rate).transpose(0, 1).reshape(-1, *parameter.shape[1:])
    parameter.data.index_add_(0, rows, update_UGQS, alpha=-1.0)


def make_groups(adapter: Adapter, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups `inventory` and, where routing trains, `routing`, with their peak rates."""
    groups: list[dict[str, Any]] = [
        {
            "params": list(adapter.inventory.parameters()),
            "lr": config.lr,
            "name": "inventory",
            "weight_decay": config.weight_decay,
        }
    ]
    if adapter.routing_logits is not None and adapter.routing_logits.requires_grad:
        groups.append(
            {
                "params": [adapter.routing_logits],
                "lr": config.routing_lr,
                "name": "routing",
                "weight_decay": 0.0,
            }
        )
    for group in groups:
        group["peak_lr"] = group["lr"]
    return groups


def has_row_gradients(config: OptimConfig) -> bool:
    """Whether an adapter's routing gradients may stay sparse over tasks.

    Under Adafactor a row without a gradient stays as it is; AdamW's momentum moves it too.
    """
    return config.name == "adafactor"


def make_optimizer(adapter: Adapter, config: OptimConfig) -> Optimizer:
    """The optimizer of an adapter: one group for the inventory, one for the routing logits.

    Under Adafactor every adapted linear (of every task, where inventories are private) keeps
    separate statistics.
    """
    assert has_row_gradients(config) or not adapter.row_gradients, "AdamW moves every row"
    groups = make_groups(adapter, config)
    if config.name == "adamw":
        return make_adamw(groups, config)
    for group in groups:
        group["routing"] = group["name"] == "routing"
        group["lead"] = 2 if adapter.config.private else 1
    return Adafactor(groups, scale_parameter=config.scale_parameter)


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """torch's AdamW as one kernel a tensor: nothing is made on the way."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)


def check_states(optimizer: Optimizer, adapter: Adapter, *, place: str) -> None:
    """Raise `RunError` unless an optimizer's state fits the adapter's parameters.

    Either no trainable parameter has state, or all have. `place` names its source in errors.
    """
    names = {parameter: name for name, parameter in adapter.named_parameters()}
    if not any(optimizer.state.values()):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, name = optimizer.state.get(parameter, {}), names[parameter]
            shapes = _state_shapes(optimizer, group, parameter)
            for part in sorted(shapes.keys() ^ (state.keys() - {"step"})):
                what = "missing" if part in shapes else "unknown"
                raise RunError(f"{place}: {what} {name}/{part}; delete this step")
            for part, shape in shapes.items():
                fault = _fault(state[part], shape, parameter.dtype)
                if fault:
                    raise RunError(f"{place}: {name}/{part} {fault}; delete this step")
            step = state.get("step")
            step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
            if type(step) not in (int, float) or not 1 <= step < math.inf:
                fault = f"{name}/step is {step!r}, no number of steps"
                raise RunError(f"{place}: {fault}; delete this step")


def _state_shapes(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, torch.Size]:
    """Shapes of the tensors that an optimizer keeps for a parameter, except its step."""
    if not isinstance(optimizer, Adafactor):
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.shape)
    values, lead = _blocks(parameter.data, group)
    if values.dim() - lead < 2:
        return {"square": values.shape}
    return {"row": values.shape[:-1], "column": values.shape[:-2] + values.shape[-1:]}


def _fault(value: Any, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """What is wrong with a tensor of the state, or None."""
    if not isinstance(value, Tensor):
        return f"is {value!r}, no tensor"
    if value.shape != shape:
        return f"is {list(value.shape)}, not {list(shape)}"
    if value.dtype != dtype:
        return f"is {value.dtype}, not {dtype}"
    return None if bool(value.isfinite().all()) else "holds NaN or infinity"


def rate_factor(config: ScheduleConfig, step: int) -> float:
    """Share of the peak rate in step `step`, counted from 0.

    Linear warm-up from 0, then decay to 0 at `steps`: the reference's schedule, whose first update
    has rate 0 where there is a warm-up.
    """
    warmup = config.warmup
    if step < warmup:
        return step / warmup
    if config.decay == "constant":
        return 1.0
    left = (config.steps - step) / max(1, config.steps - warmup)
    if config.decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return max(0.0, left)


def uniform_share(config: ScheduleConfig, step: int) -> float:
    """How far routing is moved to uniform in step `step`, counted from 0 (docs/method.md 9).

    1 - cos(pi / 2 * progress), where progress goes from 0 to 1 over the last
    `anneal_routing_steps` steps; the last step trains the average itself.
    """
    left = config.steps - 1 - step
    if left >= config.anneal_routing_steps:
        return 0.0
    progress = 1.0 - left / config.anneal_routing_steps
    return 1.0 - math.cos(0.5 * math.pi * progress)


def set_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to `factor` times its peak; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of all gradients, sparse ones included; a scalar on the device."""
    norms = [
        torch.linalg.vector_norm(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, clip_norm: float) -> None:
    """Scale all gradients by min(1, clip_norm / (norm + 1e-6))."""
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            (gradient._values() if gradient.is_sparse else gradient).mul_(factor)
