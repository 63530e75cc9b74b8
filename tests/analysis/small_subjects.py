"""A tiny backbone in float64 with an adapter that has learned something, and rows for its tasks."""

from dataclasses import dataclass

import numpy as np
import torch
from placed import place_model
from small_t5 import small_t5
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mhr_scale.adapters import Adapter, attach
from mhr_scale.analysis.alignment import AlignedTask, GradientSource
from mhr_scale.config import AdapterConfig
from mhr_scale.families.packed import EncodedRow

NAMES = ("add", "copy", "drop", "echo")

CONFIGS = {
    "LoRA": AdapterConfig(rank=2, n_skills=1),
    "Poly": AdapterConfig(rank=2, n_skills=3),
    "MHR": AdapterConfig(rank=2, n_skills=3, n_splits=4, granularity="block"),
    "(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=1),
    "MHR-(IA)3": AdapterConfig(kind="ia3", layout="light", n_skills=2, n_splits=2),
}


@dataclass(frozen=True)
class Setup:
    """What a measurement needs, and the bare model for computing it another way."""

    source: GradientSource
    bare: nn.Module
    adapter: Adapter
    tasks: list[AlignedTask]


def make_setup(config: AdapterConfig, *, micro_batch_size: int = 2, n_rows: int = 5) -> Setup:
    """An adapter whose every tensor tells, in a model of its own."""
    torch.manual_seed(3)
    placed = place_model(small_t5().double())
    adapter = attach(placed.model, config, tasks=NAMES).double()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            spread = 1.0 if "routing" in name else 0.2
            parameter += spread * torch.randn_like(parameter)
    source = GradientSource(
        is_flat=False,
        placed=placed,
        adapter=adapter,
        micro_batch_size=micro_batch_size,
        pad_multiple=4,
    )
    rng = np.random.default_rng(5)
    tasks = [
        AlignedTask(name=name, rows=tuple(make_row(rng, n, number) for n in range(n_rows)))
        for number, name in enumerate(NAMES)
    ]
    return Setup(source, small_t5().double(), adapter, tasks)


def make_row(rng: np.random.Generator, number: int, task: int) -> EncodedRow:
    """A random row of some length."""
    ids = rng.integers(3, 200, size=int(rng.integers(3, 9)))
    target = rng.integers(3, 200, size=int(rng.integers(2, 6)))
    return EncodedRow(ids, (target,), task=task, number=number)


def direct_cosines(setup: Setup, *, linears: tuple[str, ...] = ()) -> np.ndarray:
    """The definition, written out: dense weights, one row at a time, one gradient per task."""
    parameters = [p.detach().clone().requires_grad_() for p in setup.adapter.inventory.parameters()]
    names = [name for name, _ in setup.adapter.inventory.named_parameters()]
    gradients = []
    for number, task in enumerate(setup.tasks):
        tensors = dict(zip(names, parameters, strict=True))
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for row in task.rows:
            (target,) = row.answers
            weights = dense_weights(setup, tensors, number)
            logits = functional_call(
                setup.bare,
                weights,
                kwargs={
                    "input_ids": torch.as_tensor(row.input_ids)[None],
                    "labels": torch.as_tensor(target)[None],
                },
            ).logits
            loss = loss + F.cross_entropy(logits[0], torch.as_tensor(target), reduction="sum")
            count += len(target)
        found = torch.autograd.grad(loss / count, parameters)
        gradients.append(pick_linears(setup, dict(zip(names, found, strict=True)), linears))
    g_TP = torch.stack(gradients)
    units = g_TP / g_TP.norm(dim=1, keepdim=True)
    return (units @ units.T).numpy()


def pick_linears(setup: Setup, found: dict[str, Tensor], linears: tuple[str, ...]) -> Tensor:
    """One flat gradient, of some linears or of all."""
    parts = []
    for stack in setup.adapter.inventory.stacks:
        for row, member in enumerate(stack.members):
            if not linears or setup.adapter.sites[member].name in linears:
                for side in setup.adapter.inventory.sides:
                    parts.append(found[f"{side}_{stack.key}"][row].flatten())
    return torch.cat(parts)


def dense_weights(setup: Setup, tensors: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """The backbone's weights with the task's update written into them."""
    adapter = setup.adapter
    made: dict[str, Tensor] = {}
    for stack in adapter.inventory.stacks:
        for row, member in enumerate(stack.members):
            site = adapter.sites[member]
            key = f"{site.name}.weight"
            frozen = setup.bare.get_parameter(key).detach()
            w_QS = mixing(setup, site.routing_group(adapter.config.granularity, 1), task)
            if adapter.config.kind == "ia3":
                l_QSO = tensors[f"l_{stack.key}"][row]
                scaling = torch.cat([w @ l_SO for w, l_SO in zip(w_QS, l_QSO, strict=True)])
                made[key] = frozen * scaling[:, None]
                continue
            a_QSIR, b_QSRO = (tensors[f"{side}_{stack.key}"][row] for side in "AB")
            a = torch.cat([torch.tensordot(w, a, 1) for w, a in zip(w_QS, a_QSIR, strict=True)], 0)
            b = torch.cat([torch.tensordot(w, b, 1) for w, b in zip(w_QS, b_QSRO, strict=True)], 1)
            made[key] = frozen + adapter.config.scale * (a @ b).T
    return made


def mixing(setup: Setup, group: str, task: int) -> Tensor:
    """Mixing weights (Q, S) of one task in one routing group, by the formula."""
    config, logits = setup.adapter.config, setup.adapter.routing_logits
    if logits is None:
        shape = (config.n_splits, config.n_skills)
        return torch.full(shape, 1.0 / config.n_skills, dtype=torch.float64)
    p = 1.0 / (1.0 + torch.exp(-logits.detach()[task, setup.adapter.groups.index(group)]))
    return p / p.sum(-1, keepdim=True)
