"""From routing logits to mixing weights (docs/method.md 2).

Shape letters: U slots, T tasks, G routing groups, Q splits, S skills.

A policy is a function from the slots' logits to activations p >= 0; what it needs says its row of
`policies.POLICIES`. Whatever the policy, the weights are p normalised over the skills,
w = p / (sum p + 1e-12).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mhr_scale.adapters.policies import POLICIES, Routing
from mhr_scale.families.sending import send

EPS = 1e-12
INIT_BOUND = 1e-3


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
    u = uniform_numbers(seeds, logits_UGQS.shape[1:])
    u = send(u, logits_UGQS.device).to(logits_UGQS.dtype)
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
    mask = (u < routing.random_probability).to(logits_UGQS.dtype)
    mask = send(mask, logits_UGQS.device)
    if routing.random_empty == "uniform":
        mask = torch.where(mask.sum(-1, keepdim=True) == 0, torch.ones_like(mask), mask)
    return mask.expand_as(logits_UGQS)


#: The function of every policy: logits (U, G, Q, S) to activations of that shape. Its `seeds`, one
#: per slot, are there only while the model trains.
ACTIVATIONS: dict[str, Callable[[Tensor, Routing, Sequence[int] | None], Tensor]] = {
    "learned": learned,
    "noisy": noisy,
    "straight_through": straight_through,
    "uniform": uniform,
    "random": random,
    "fixed": learned,
}
assert ACTIVATIONS.keys() == POLICIES.keys()


def mixing_weights(logits_UGQS: Tensor, routing: Routing, *, seeds: Sequence[int] | None) -> Tensor:
    """Mixing weights (U, G, Q, S) of the slots under a policy; `seeds` while training."""
    return normalise(ACTIVATIONS[routing.policy](logits_UGQS, routing, seeds))
