"""From routing logits to mixing weights (docs/method.md 2).

Shape letters: U slots, T tasks, G routing groups, Q splits, S skills.

A policy is one row of `POLICIES`: a function from the slots' logits to activations p >= 0, and
what that function needs. Whatever the policy, the weights are p normalised over the skills,
w = p / (sum p + 1e-12).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-12
INIT_BOUND = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which policy turns logits into weights, and the numbers that policies read."""

    policy: str = "learned"
    temperature: float = 1.0
    """Of the relaxed Bernoulli noise."""
    random_probability: float = 0.5
    """Of a skill that is switched on at random."""
    random_empty: Literal["off", "uniform"] = "off"
    """What a row without any skill gets: no adapter, or the mean."""


def init_logits(shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """Routing logits ~ U(-1e-3, 1e-3): every weight starts within 1e-3 of 1 / S."""
    return torch.empty(*shape).uniform_(-INIT_BOUND, INIT_BOUND, generator=generator)


def normalise(p: Tensor) -> Tensor:
    """Weights over the last dimension (skills): p / (sum p + 1e-12)."""
    return p / (p.sum(-1, keepdim=True) + EPS)


def uniform_numbers(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One independent block of U(0, 1) numbers per seed, float32, shape (len(seeds), *shape).

    A row's numbers depend on its seed alone: they are the same on any rank, in any batch and when
    a forward pass is recomputed.
    """
    blocks = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        blocks.append(torch.rand(*shape, generator=generator))
    return torch.stack(blocks)


def learned(logits_UGQS: Tensor, routing: Routing, seeds: Sequence[int] | None) -> Tensor:
    """p = sigmoid(z)."""
    return torch.sigmoid(logits_UGQS)


def noisy(logits_UGQS: Tensor, routing: Routing, seeds: Sequence[int] | None) -> Tensor:
    """Relaxed Bernoulli: p = sigmoid((z + log u - log(1 - u)) / temperature) while training."""
    if seeds is None:
        return torch.sigmoid(logits_UGQS)
    u = uniform_numbers(seeds, logits_UGQS.shape[1:]).to(logits_UGQS)
    u = u.clamp(torch.finfo(u.dtype).tiny, 1.0 - torch.finfo(torch.float32).eps)
    return torch.sigmoid((logits_UGQS + u.log() - (-u).log1p()) / routing.temperature)


def straight_through(logits_UGQS: Tensor, routing: Routing, seeds: Sequence[int] | None) -> Tensor:
    """p = round(sigmoid(z)) forward with the sigmoid's gradient, while training."""
    p = torch.sigmoid(logits_UGQS)
    return p if seeds is None else p + (p.round() - p).detach()


def uniform(logits_UGQS: Tensor, routing: Routing, seeds: Sequence[int] | None) -> Tensor:
    """p = 1: the mean of the inventory."""
    return torch.ones_like(logits_UGQS)


def random(logits_UGQS: Tensor, routing: Routing, seeds: Sequence[int] | None) -> Tensor:
    """A random binary mask of skills for each row while training; in evaluation p = 1 (Random).

    One mask per row and routing group, the same for all splits of the group. A row without any
    skill has weight 0 everywhere (`random_empty: off`, the literal formula) or the mean.
    """
    if seeds is None:
        return uniform(logits_UGQS, routing, seeds)
    _, n_groups, _, n_skills = logits_UGQS.shape
    u = uniform_numbers(seeds, (n_groups, 1, n_skills))
    mask = (u < routing.random_probability).to(logits_UGQS)
    if routing.random_empty == "uniform":
        mask = torch.where(mask.sum(-1, keepdim=True) == 0, torch.ones_like(mask), mask)
    return mask.expand_as(logits_UGQS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A row of `POLICIES`: how mixing weights come from routing logits.

    `activate` turns logits (U, G, Q, S) into activations of that shape; its `seeds`, one per slot,
    are there only while the model trains. With `has_logits` there is a table of logits, which
    trains if `trains_logits`; without, `activate` sees zeros. A policy that `draws` numbers while
    training has a slot for each batch row instead of each task. `method` is its name in tables
    where that is not Poly's or MHR's.
    """

    activate: Callable[[Tensor, Routing, Sequence[int] | None], Tensor]
    has_logits: bool = True
    trains_logits: bool = True
    draws: bool = False
    method: str | None = None


POLICIES: dict[str, Policy] = {
    "learned": Policy(activate=learned),
    "noisy": Policy(activate=noisy, draws=True),
    "straight_through": Policy(activate=straight_through),
    "uniform": Policy(activate=uniform, has_logits=False),
    "random": Policy(activate=random, has_logits=False, draws=True, method="Random"),
    "fixed": Policy(activate=learned, trains_logits=False),
}


def mixing_weights(logits_UGQS: Tensor, routing: Routing, *, seeds: Sequence[int] | None) -> Tensor:
    """Mixing weights (U, G, Q, S) of the slots under a policy; `seeds` while training."""
    return normalise(POLICIES[routing.policy].activate(logits_UGQS, routing, seeds))
