"""One optimizer for all jobs of a wave, which updates each job exactly as if it were alone.

A wave is an adapter whose tasks are J independent jobs: their inventories are private, or they
share one frozen inventory and only their routing rows train. A job alone is a shared adapter of one
task under `optim.make_optimizer`. Statistics, clipping and learning rates are per job; kernels and
Python run once per stacked tensor, not per job.

Shape letters: J jobs, N linears of one shape, G routing groups, Q splits, S skills.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter
from mhr_scale.config import OptimConfig
from mhr_scale.errors import RunError
from mhr_scale.families.sending import send, send_numbers
from mhr_scale.training.optim import Adafactor, OptimizerState, at_once, check_states, make_groups

#: The job dimension of a group's parameters, and of their state.
JOB_DIMS = {"inventory": 1, "routing": 0}
ANOTHER_STEP = "optimizer states of different steps in one wave; delete these steps"


class AdamW(Optimizer):
    """torch's AdamW where `lr` is a tensor that broadcasts against the parameters of its group."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "AdamW takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # on the host, as torch keeps it
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                _step_adamw(parameter, group, state)


def _step_adamw(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
    """One update of a stacked parameter; of an inventory, some linears at a time."""
    assert parameter.grad is not None
    tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    step, is_stack = state["step"].item(), JOB_DIMS[group["name"]] > 0
    for linears in at_once(parameter) if is_stack else [slice(None)]:
        _step_part(*(tensor[linears] for tensor in tensors), group=group, step=step)


def _step_part(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    group: dict[str, Any],
    step: float,
) -> None:
    """Update values and their moments in place."""
    rate: Tensor = group["lr"]
    beta1, beta2 = group["betas"]
    if group["weight_decay"]:
        values.mul_(1.0 - rate * group["weight_decay"])
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    update = second.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(group["eps"])
    update.reciprocal_().mul_(first)
    values.addcmul_(update, rate, value=-1.0 / (1.0 - beta1**step))


def make_job_optimizer(wave: Adapter, config: OptimConfig) -> Optimizer:
    """The optimizer of a wave, with the rates of `config` for every job until `set_job_rates`.

    Routing gradients of a wave are dense. Clip with `clip_jobs` before each step.
    """
    groups = [group for group in make_groups(wave, config) if group["params"][0].requires_grad]
    names = {group["name"] for group in groups}
    assert names, "nothing in this wave trains"
    assert wave.config.private or "inventory" not in names, "jobs cannot train a shared inventory"
    assert not wave.row_gradients, "jobs move their own rows, all of them"
    optimizer: Optimizer
    if config.name == "adamw":
        optimizer = AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    else:
        for group in groups:
            group["lead"] = 2
            group["routing"] = group["rows_apart"] = group["name"] == "routing"
        optimizer = Adafactor(groups, scale_parameter=config.scale_parameter)
    n_jobs = len(wave.task_names)
    peaks = {group["name"]: torch.full((n_jobs,), group["peak_lr"]) for group in groups}
    set_job_rates(optimizer, peaks)
    return optimizer


def set_job_rates(optimizer: Optimizer, rates: Mapping[str, Tensor]) -> None:
    """Set the learning rates (J,) of all jobs by group name, `inventory` and `routing`.

    Weight decay scales with them. Rates of a group that does not train are ignored.
    """
    for group in optimizer.param_groups:
        like, dim, rates_J = group["params"][0], JOB_DIMS[group["name"]], rates[group["name"]]
        assert rates_J.shape == (like.shape[dim],)
        group["lr"] = _spread(send(rates_J.to(like.dtype), like.device), like, dim)


@torch.no_grad()
def clip_jobs(wave: Adapter, clip_norm: float | None) -> Tensor:
    """Clip each job's gradients by that job's global norm; returns the norms (J,) before that.

    A job whose norm is not finite gets gradients of 0, so that its tensors stay finite: NaN times a
    mask of 0 is NaN, and would reach the other jobs in the next pass. Nothing syncs the device.
    """
    gradients = [(p.grad, dim) for _, p, dim in _job_parameters(wave) if p.grad is not None]
    squares = [_squares(gradient, dim) for gradient, dim in gradients]
    norm_J = torch.stack(squares).sum(0).sqrt().to(gradients[0][0].dtype)
    is_lost_J = ~norm_J.isfinite()
    factor_J = None if clip_norm is None else (clip_norm / (norm_J + 1e-6)).clamp(max=1.0)
    for gradient, dim in gradients:
        if factor_J is not None:
            gradient.mul_(_spread(factor_J, gradient, dim))
        gradient.masked_fill_(_spread(is_lost_J, gradient, dim), 0.0)
    return norm_J


def _squares(gradient: Tensor, dim: int) -> Tensor:
    """Each job's sum of squares (J,), in float64; of an inventory, some linears at a time.

    Summed in two steps over contiguous numbers, of a linear or a routing group and then over those,
    in an order that does not depend on the number of jobs: a rounding error in the norm would make
    a job differ from the same job alone.
    """
    ranges = at_once(gradient) if dim else [slice(None)]
    parts = [gradient[part].double().square().flatten(2).sum(-1) for part in ranges]
    return torch.cat(parts).transpose(0, dim).contiguous().sum(-1)


@torch.no_grad()
def take_jobs(optimizer: Optimizer, jobs: Sequence[int], into: Optimizer) -> None:
    """Copy the state of some jobs of a wave into the optimizer of the wave made of them.

    Both optimizers come from `make_job_optimizer` with the same configuration.
    """
    for group, target in zip(optimizer.param_groups, into.param_groups, strict=True):
        assert group["name"] == target["name"]
        for old, new in zip(group["params"], target["params"], strict=True):
            index = send_numbers(jobs, old.device)
            for part, value in optimizer.state.get(old, {}).items():
                if _has_jobs(value):
                    value = value.index_select(JOB_DIMS[group["name"]], index)
                elif isinstance(value, Tensor):
                    value = value.clone()
                into.state[new][part] = value


@torch.no_grad()
def job_state(wave: Adapter, optimizer: Optimizer, job: int) -> OptimizerState:
    """One job's optimizer state on the host, with the names and shapes that it has alone."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, parameter, dim in _job_parameters(wave):
        for part, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                of_job = value
                if _has_jobs(value):
                    keeps_dim = _is_routing_shaped(value, dim)
                    of_job = value.narrow(dim, job, 1) if keeps_dim else value.select(dim, job)
                of_job = of_job.clone(memory_format=torch.contiguous_format)
                tensors[f"{name}/{part}"] = of_job.cpu()
            else:
                numbers.setdefault(name, {})[part] = value
    return tensors, numbers


@torch.no_grad()
def load_job_states(
    wave: Adapter,
    optimizer: Optimizer,
    states: Sequence[OptimizerState],
    *,
    places: Sequence[str],
) -> None:
    """Stack the states of all jobs of a wave, in their order, into its optimizer.

    `places` names the source of each in errors. Raises `RunError` unless they are states of the
    same parameters after the same step, with the shapes of an optimizer's state.
    """
    assert len(states) == len(wave.task_names)
    parameters = {name: (parameter, dim) for name, parameter, dim in _job_parameters(wave)}
    first, numbers = states[0]
    owners = {key.rpartition("/")[0] for key in first} | numbers.keys()
    if owners and owners != parameters.keys():
        raise RunError(
            f"{places[0]}: optimizer state of {sorted(owners)}, yet {sorted(parameters)} train; "
            "delete this step"
        )
    first_shapes = {key: tensor.shape for key, tensor in first.items()}
    for place, (tensors, other_numbers) in zip(places[1:], states[1:], strict=True):
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if shapes != first_shapes or other_numbers != numbers:
            raise RunError(f"{place} and {places[0]}: {ANOTHER_STEP}")
    if not all(isinstance(numbers.get(name, {}), dict) for name in parameters):
        raise RunError(
            f"{places[0]}: numbers of its optimizer's state are no objects; delete this step"
        )
    for name, (parameter, _) in parameters.items():
        optimizer.state[parameter] = dict(numbers.get(name, {}))
    for key in first:
        name, _, part = key.rpartition("/")
        parameter, dim = parameters[name]
        values = [tensors[key] for tensors, _ in states]
        if _has_jobs(values[0]):
            join = torch.cat if _is_routing_shaped(values[0], dim) else torch.stack
            optimizer.state[parameter][part] = join(values, dim).to(parameter.device)
        elif len({value.item() for value in values}) == 1:
            optimizer.state[parameter][part] = values[0].clone()
        else:
            raise RunError(f"{places[0]} and {len(places) - 1} more: {ANOTHER_STEP}")
    check_states(optimizer, wave, place=" or ".join(places[:3]))


def _job_parameters(wave: Adapter) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Name, tensor and job dimension of all trainable parameters."""
    for name, parameter in wave.named_parameters():
        if parameter.requires_grad:
            group = "routing" if parameter is wave.routing_logits else "inventory"
            yield name, parameter, JOB_DIMS[group]


def _has_jobs(value: Any) -> bool:
    """Whether a part of the state has a job dimension, unlike the step, which jobs share."""
    return isinstance(value, Tensor) and value.dim() > 0


def _is_routing_shaped(value: Tensor, dim: int) -> bool:
    """Whether state has the shape (J, G, Q, S) of routing logits: (1, G, Q, S) for a job alone."""
    return dim == JOB_DIMS["routing"] and value.dim() == 4


def _spread(values_J: Tensor, like: Tensor, dim: int) -> Tensor:
    """View a vector over the jobs so that it broadcasts against `like` along dimension `dim`."""
    return values_J.view(-1, *[1] * (like.dim() - dim - 1))
