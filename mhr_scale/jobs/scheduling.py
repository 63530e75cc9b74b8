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
class JobEstimate:
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
class PlannedWave:
    """The jobs of a wave to be."""

    jobs: tuple[JobEstimate, ...]

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
        """Cost of the wave, in the unit of `JobEstimate.cost`."""
        return sum(estimate.cost for estimate in self.jobs)


def plan_waves(
    estimates: Sequence[JobEstimate], *, size: int, world_size: int, alone: Sequence[str] = ()
) -> list[PlannedWave]:
    """Cut jobs into waves of at most `size`, small enough that every rank gets some.

    Jobs of the variants in `alone` share no pass. The result depends on the set of jobs alone.
    """
    if not estimates:
        return []
    size = max(1, min(size, -(-len(estimates) // world_size)))
    groups: dict[tuple[str, int, int, int, int], list[JobEstimate]] = {}
    for job in sorted(estimates, key=lambda e: (e.steps, e.job)):
        key = (job.job.variant, job.step, job.batch_size, job.width, job.depth)
        groups.setdefault(key, []).append(job)
    waves = []
    for key, members in sorted(groups.items()):
        most = 1 if key[0] in alone else size
        n_waves = -(-len(members) // most)
        even = -(-len(members) // n_waves)
        waves += [
            PlannedWave(tuple(members[at : at + even])) for at in range(0, len(members), even)
        ]
    return waves


def assign_waves(waves: Sequence[PlannedWave], world_size: int) -> list[list[PlannedWave]]:
    """Each rank's waves: the dearest first, each to the rank with the least to do so far."""
    loads = [0.0] * world_size
    dealt: list[list[PlannedWave]] = [[] for _ in range(world_size)]
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
