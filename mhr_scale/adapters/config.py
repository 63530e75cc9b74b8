"""The adapter section of a recipe."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mhr_scale.adapters.policies import POLICIES, Routing
from mhr_scale.errors import ConfigError
from mhr_scale.recipe.part import part

#: Upper bound of ranks, skills and splits: no backbone is wide enough for more.
LARGEST_SIZE = 1 << 20

#: The setting `adapter.blocks` for all blocks.
ALL_BLOCKS = "all"

if TYPE_CHECKING:  # a type checker needs literals spelt out; recipes are checked against the table
    Policy = str
    Ranges = str
else:
    Policy = Literal[tuple(POLICIES)]
    Ranges = str | int  # YAML reads the number of a single block as one


@part
class AdapterConfig:
    """The adapter: which linears, how many skills, how routing mixes them.

    `n_skills: 1` is plain LoRA; `n_skills > 1` with `n_splits: 1` is Poly, with more splits MHR.
    """

    kind: Literal["lora", "ia3"] = "lora"
    """A low-rank pair per skill, or an (IA)3 scaling vector per skill."""
    layout: str | tuple[str, ...] = "full"
    """Which linears are adapted: full (all of the blocks), light (keys, values and what the gate of
    the feed-forward multiplies; where one linear holds them among others, all of it), attention; or
    a list of names or ends of names, as PEFT's target_modules: [q_proj, v_proj]."""
    blocks: Ranges = ALL_BLOCKS
    """Which blocks have adapters: all, or numbers and ranges from 0, such as 8-15 or 0-3,28-31; of
    two stacks, those of both."""
    rank: int = 1
    """Low rank R of one skill; ignored by ia3, which has none."""
    alpha: float = 1.0
    """The adapter's output is scaled by alpha / rank."""
    n_skills: int = 8
    """Skills S in the inventory of each adapted linear."""
    n_splits: int = 1
    """Blocks Q of each linear's width with a routing of their own (1 = Poly, more = MHR)."""
    granularity: Literal["linear", "sublayer", "block", "blocks", "stack", "model"] = "linear"
    """Which linears share one routing table; `blocks` = every `block_span` blocks."""
    block_span: int = 1
    """Number of consecutive blocks that share a routing table under granularity `blocks`."""
    policy: Policy = "learned"
    """How mixing weights come from routing logits."""
    private: bool = False
    """Whether each task has an inventory of its own: what AdapterSoup averages."""
    temperature: float = 1.0
    """Temperature of the relaxed Bernoulli noise of policy `noisy`."""
    random_probability: float = 0.5
    """Probability that policy `random` switches a skill on for a row."""
    random_empty: Literal["off", "uniform"] = "off"
    """What a row without any skill gets under policy `random`: no adapter, or the mean."""

    def __post_init__(self) -> None:
        if isinstance(self.layout, list):  # as JSON has it
            object.__setattr__(self, "layout", tuple(self.layout))
        object.__setattr__(self, "blocks", str(self.blocks))
        if not self.layout or not all(self.layout):
            raise ConfigError("adapter.layout: names no linear; leave it out for all of them")
        if self.blocks != ALL_BLOCKS:
            block_numbers(self.blocks)
        for name in ("rank", "n_skills", "n_splits", "block_span"):
            if getattr(self, name) < 1:
                raise ConfigError(f"adapter.{name}: {getattr(self, name)} is not at least 1")
            if getattr(self, name) > LARGEST_SIZE:
                raise ConfigError(
                    f"adapter.{name}: {getattr(self, name)} is above {LARGEST_SIZE}, as no "
                    "backbone is wide"
                )
        if self.n_splits > 1 and self.n_skills == 1:
            raise ConfigError("adapter.n_splits: splits route between skills; set n_skills above 1")
        if self.block_span > 1 and self.granularity != "blocks":
            raise ConfigError("adapter.block_span: only granularity 'blocks' reads it")
        if self.temperature <= 0.0:
            raise ConfigError(f"adapter.temperature: {self.temperature} is not above 0")
        if not 0.0 < self.random_probability < 1.0:
            raise ConfigError(
                f"adapter.random_probability: {self.random_probability} is not in (0, 1)"
            )

    @property
    def scale(self) -> float:
        """Factor alpha / rank on the adapter's output."""
        return self.alpha / self.rank

    @property
    def is_routed(self) -> bool:
        """Whether mixing weights exist at all (more than one skill)."""
        return self.n_skills > 1

    @property
    def has_logits(self) -> bool:
        """Whether a table of routing logits exists."""
        return self.is_routed and POLICIES[self.policy].has_logits

    @property
    def routing(self) -> Routing:
        """The settings that routing policies read."""
        return Routing(
            policy=self.policy,
            temperature=self.temperature,
            random_probability=self.random_probability,
            random_empty=self.random_empty,
        )

    def single(self) -> "AdapterConfig":
        """Settings of a single-skill adapter of this kind: an average, a soup, a collapsed one."""
        return replace(
            self,
            n_skills=1,
            n_splits=1,
            policy="learned",
            granularity="linear",
            block_span=1,
            private=False,
        )

    @property
    def method(self) -> str:
        """The name this setting has in tables."""
        if self.private:
            return "private"
        if not self.is_routed:
            return "LoRA" if self.kind == "lora" else "(IA)3"
        if name := POLICIES[self.policy].method:
            return name
        family = "Poly" if self.n_splits == 1 else "MHR"
        return family if self.kind == "lora" else f"{family}-(IA)3"


def block_numbers(text: str) -> tuple[int, ...]:
    """The numbers that `adapter.blocks` names, sorted; raises `ConfigError` if it names none."""
    numbers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", piece)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(
                f"adapter.blocks: '{text}' is neither '{ALL_BLOCKS}' nor numbers and ranges from "
                "0, such as 8-15 or 0-3,28-31"
            )
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers))


def block_ranges(numbers: Iterable[int]) -> str:
    """Numbers of blocks as `adapter.blocks` says them."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
