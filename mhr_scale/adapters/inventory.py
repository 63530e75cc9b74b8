"""The inventory: every adapted linear's skills, stacked by shape.

Shape letters: N linears of one shape, T tasks, Q splits, S skills, R rank, I in features of one
split, O out features of one split (I * Q and O * Q are the full widths).

All linears of one shape live in one tensor per side, so that mixing them is one batched product.
Per linear the tensors are those of the reference: A (Q, S, I, R) is split along the input,
B (Q, S, R, O) along the output (docs/method.md 3); an (IA)3 skill is a vector l (Q, S, O). Where
inventories are private to tasks, each of these has T in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.sites import Site
from mhr_scale.seeds import seed_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The linears of one shape: their positions in the adapter's list of sites."""

    in_features: int
    out_features: int
    members: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name of the stack in parameter names, such as `1024x4096`."""
        return f"{self.in_features}x{self.out_features}"


def make_stacks(sites: tuple[Site, ...]) -> tuple[Stack, ...]:
    """Group sites by shape, in order of first appearance."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, site in enumerate(sites):
        members.setdefault((site.in_features, site.out_features), []).append(index)
    return tuple(
        Stack(in_features=i, out_features=o, members=tuple(m)) for (i, o), m in members.items()
    )


class Inventory(nn.Module):
    """Trainable skills of all adapted linears, float32, one tensor per shape and side."""

    def __init__(
        self, config: AdapterConfig, sites: tuple[Site, ...], *, n_tasks: int, seed: int
    ) -> None:
        super().__init__()
        self.sites = sites
        self.stacks = make_stacks(sites)
        self.sides = ("A", "B") if config.kind == "lora" else ("l",)
        copies = (n_tasks,) if config.private else ()
        for stack in self.stacks:
            skills = [_init_site(config, sites[m], copies, seed=seed) for m in stack.members]
            for side in self.sides:
                tensor = torch.stack([tensors[side] for tensors in skills])
                self.register_parameter(f"{side}_{stack.key}", nn.Parameter(tensor))

    def stacked(self, stack: Stack, side: str) -> nn.Parameter:
        """The stacked tensor of one shape: (N, Q, S, I, R), (N, Q, S, R, O) or (N, Q, S, O).

        Private to tasks: (N, T, Q, S, ...).
        """
        return self.get_parameter(f"{side}_{stack.key}")

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each linear's tensors under `<linear>.<side>`, as views into the stacks."""
        for stack in self.stacks:
            for row, member in enumerate(stack.members):
                for side in self.sides:
                    name = f"{self.sites[member].name}.{side}"
                    yield name, self.stacked(stack, side).data[row]


def _init_site(
    config: AdapterConfig, site: Site, copies: tuple[int, ...], *, seed: int
) -> dict[str, Tensor]:
    """Initial skills of one linear (docs/method.md 1): A ~ U(-c, c), c = 1 / sqrt(3 d_in); B = 0.

    `d_in` is the full input width, so the distribution does not depend on the number of splits.
    The numbers depend on the seed and the linear's name alone.
    """
    q, s, r = config.n_splits, config.n_skills, config.rank
    i, o = site.in_features // q, site.out_features // q
    if config.kind == "ia3":
        return {"l": torch.ones(*copies, q, s, o)}
    generator = torch.Generator().manual_seed(seed_from("inventory", seed, site.name))
    bound = (3 * site.in_features) ** -0.5
    a_QSIR = torch.empty(*copies, q, s, i, r).uniform_(-bound, bound, generator=generator)
    return {"A": a_QSIR, "B": torch.zeros(*copies, q, s, r, o)}
