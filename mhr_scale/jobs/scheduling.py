"""Which jobs form a wave, how many, and which rank runs it: pure functions.

Jobs of a wave share a variant, the shape of their batches and their current step: each computes,
to the bit, what it would compute alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mhr_scale.jobs.job import Job

#: Maximum number of jobs per wave if the recipe does not set one.
LARGEST = 32
#: Share of the free memory that a wave may use.
USABLE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEstimate:
    """The work of a job, known before it starts: its steps, and its batches in rows and tokens."""

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
class PlannedWave:
    """The jobs of a wave, before it is opened."""

    jobs: tuple[JobEstimate, ...]

    @property
    def variant(self) -> str:
        """The jobs' variant."""
        return self.jobs[0].job.variant

    @property
    def step(self) -> int:
        """The current step of all of them."""
        return self.jobs[0].step

    @property
    def cost(self) -> float:
        """Cost of the wave, in the unit of `JobEstimate.cost`."""
        return sum(estimate.cost for estimate in self.jobs)


def plan_waves(
    estimates: Sequence[JobEstimate], *, size: int, world_size: int, alone: Sequence[str] = ()
) -> list[PlannedWave]:
    """Group jobs into waves of at most `size`, small enough that every rank gets some.

    Jobs of the variants in `alone` share no pass. The result depends on the set of jobs alone.
    """
    if not estimates:
        return []
    size = max(1, min(size, -(-len(estimates) // world_size)))
    groups: dict[tuple[str, int, int, int, int], list[JobEstimate]] = {}
    for estimate in sorted(estimates, key=lambda e: (e.steps, e.job)):
        variant, rows = estimate.job.variant, estimate.batch_size
        key = (variant, estimate.step, rows, estimate.width, estimate.depth)
        groups.setdefault(key, []).append(estimate)
    waves = []
    for key, members in sorted(groups.items()):
        largest = 1 if key[0] in alone else size
        n_waves = -(-len(members) // largest)
        n_jobs = -(-len(members) // n_waves)
        waves += [
            PlannedWave(tuple(members[start : start + n_jobs]))
            for start in range(0, len(members), n_jobs)
        ]
    return waves


def assign_waves(waves: Sequence[PlannedWave], world_size: int) -> list[list[PlannedWave]]:
    """Each rank's waves: the most expensive first, each to the rank with the least work so far."""
    loads = [0.0] * world_size
    waves_of_rank: list[list[PlannedWave]] = [[] for _ in range(world_size)]
    for wave in sorted(waves, key=lambda w: (-w.cost, w.jobs[0].job)):
        rank = loads.index(min(loads))
        waves_of_rank[rank].append(wave)
        loads[rank] += wave.cost
    return waves_of_rank


def wave_size(free_bytes: float, job_bytes: float) -> int:
    """How many jobs fit into the free memory, at least 1 and at most `LARGEST`.

    `job_bytes` is the memory of the most expensive job.
    """
    return max(1, min(LARGEST, int(USABLE * free_bytes / job_bytes)))
