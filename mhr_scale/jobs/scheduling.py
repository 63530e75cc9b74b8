"""Which jobs form a wave, how many, and which rank runs it: pure functions.

Jobs of a wave share a variant, the shape of their batches and the step they stand at: each computes
what it would compute alone, to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mhr_scale.jobs.job import Job

#: Jobs per wave at most where the recipe does not say.
LARGEST = 32
#: Share of the free memory that a wave may take.
USABLE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What is known of a job before it starts; the shape of its batches in rows and tokens."""

    job: Job
    step: int
    steps: int
    batch_size: int
    width: int
    depth: int
    scored_tokens: int = 0

    @property
    def cost(self) -> float:
        """Tokens through the model, a backward pass counted as one more forward pass."""
        rows = (self.steps - self.step) * self.batch_size
        return 2.0 * rows * (self.width + self.depth) + self.scored_tokens


@dataclass(frozen=True, slots=True)
class Planned:
    """The jobs of a wave to be."""

    jobs: tuple[Outlook, ...]

    @property
    def variant(self) -> str:
        """The jobs' variant."""
        return self.jobs[0].job.variant

    @property
    def step(self) -> int:
        """The step all of them stand at."""
        return self.jobs[0].step

    @property
    def cost(self) -> float:
        """Cost of the wave, in the unit of `Outlook.cost`."""
        return sum(outlook.cost for outlook in self.jobs)


def plan_waves(
    outlooks: Sequence[Outlook], *, size: int, world_size: int, alone: Sequence[str] = ()
) -> list[Planned]:
    """Cut jobs into waves of at most `size`, small enough that every rank gets some.

    Jobs of the variants in `alone` share no pass. The result depends on the set of jobs alone.
    """
    if not outlooks:
        return []
    size = max(1, min(size, -(-len(outlooks) // world_size)))
    groups: dict[tuple[str, int, int, int, int], list[Outlook]] = {}
    for one in sorted(outlooks, key=lambda o: (o.steps, o.job)):
        key = (one.job.variant, one.step, one.batch_size, one.width, one.depth)
        groups.setdefault(key, []).append(one)
    waves = []
    for key, members in sorted(groups.items()):
        own_size = 1 if key[0] in alone else size
        n_waves = -(-len(members) // own_size)
        even = -(-len(members) // n_waves)
        waves += [Planned(tuple(members[at : at + even])) for at in range(0, len(members), even)]
    return waves


def deal(waves: Sequence[Planned], world_size: int) -> list[list[Planned]]:
    """Each rank's waves: the dearest first, each to the rank with the least to do so far."""
    loads = [0.0] * world_size
    dealt: list[list[Planned]] = [[] for _ in range(world_size)]
    for wave in sorted(waves, key=lambda w: (-w.cost, w.jobs[0].job)):
        rank = loads.index(min(loads))
        dealt[rank].append(wave)
        loads[rank] += wave.cost
    return dealt


def wave_size(free_bytes: float, dearest_job: float) -> int:
    """Jobs that fit beside each other, at least 1 and at most `LARGEST`.

    `dearest_job` is what the job that takes most takes, in bytes.
    """
    return max(1, min(LARGEST, int(USABLE * free_bytes / dearest_job)))
