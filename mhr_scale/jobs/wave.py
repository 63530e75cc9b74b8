"""A wave: jobs that share forward and backward passes, each exactly as if it were alone.

Shape letters: J jobs, B batch rows of all jobs, consecutive for each job.

The loss is the sum of the jobs' means; gradients of different jobs never mix, since every job has
its own slot; clipping, rates and Adafactor statistics are per job (`job_optim`). A job that leaves
is removed from the stacked tensors.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.config import AdaptConfig, OptimConfig, ScheduleConfig, VariantConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow
from mhr_scale.jobs import job_optim
from mhr_scale.jobs.job import Job, JobProgress
from mhr_scale.jobs.job_data import JobData
from mhr_scale.jobs.start import stack, trained_numbers, unstack
from mhr_scale.passes import few_shot_loss
from mhr_scale.passes.filled import filled
from mhr_scale.passes.losses import Loss
from mhr_scale.seeds import seed_from
from mhr_scale.training import checkpoint, optim, saved_steps

#: A sequence of a wave's rows has a multiple of so many tokens for each thread. With few of them a
#: product may round otherwise (measured in float32: below four), and an activation rounds the last
#: numbers of a thread's share otherwise if they fill no vector.
TOKEN_MULTIPLE = 8


@dataclass(slots=True)
class Member:
    """A job in a wave."""

    job: Job
    data: JobData
    steps: int
    progress: JobProgress = field(default_factory=JobProgress)


@dataclass(frozen=True, slots=True)
class StepValues:
    """The metrics of one step of a wave: under each name a list with one number per job."""

    values: dict[str, list[float]]

    def of(self, number: int) -> dict[str, float]:
        """One job's numbers."""
        return {name: values[number] for name, values in self.values.items()}

    def is_finite(self, number: int) -> bool:
        """Whether a job's loss and gradient are finite."""
        return all(math.isfinite(self.values[name][number]) for name in ("loss", "grad_norm"))


class Wave:
    """The stacked tensors of some jobs of one variant, and their optimizer.

    `full.FullWave` is the subclass for kind backbone.
    """

    def __init__(
        self,
        config: AdaptConfig,
        variant: VariantConfig,
        members: Sequence[Member],
        adapter: Adapter,
        *,
        step: int,
    ) -> None:
        self.config = config
        self.variant = variant
        self.members = list(members)
        self.adapter = adapter
        self.step = step
        self.optimizer = job_optim.make_job_optimizer(adapter, self._optim)

    @classmethod
    def open(
        cls,
        config: AdaptConfig,
        variant: VariantConfig,
        members: Sequence[Member],
        adapters: Sequence[Adapter],
        *,
        device: torch.device,
        saved: Sequence[checkpoint.Saved] = (),
    ) -> "Wave":
        """Open a wave of jobs at their start, or of jobs saved after the same step."""
        names = [member.job.name for member in members]
        wave = cls(
            config,
            variant,
            members,
            stack(names, adapters, routing_only=variant.kind == "routing").to(device),
            step=int(saved[0].progress["step"]) if saved else 0,
        )
        if saved:
            states = [job.optimizer for job in saved]
            folders = [member.job.folder(Path(config.run.folder)) for member in members]
            places = [str(saved_steps.step_folder(folder, wave.step)) for folder in folders]
            job_optim.load_job_states(wave.adapter, wave.optimizer, states, places=places)
        return wave

    @cached_property
    def _optim(self) -> OptimConfig:
        config, variant = self.config.optim, self.variant
        return replace(
            config,
            lr=config.lr if variant.lr is None else variant.lr,
            routing_lr=config.routing_lr if variant.routing_lr is None else variant.routing_lr,
        )

    @property
    def trained_numbers(self) -> int:
        """Numbers that one job trains."""
        return trained_numbers(self.adapter)

    def thawed(self, model: Any) -> AbstractContextManager[None]:
        """The block in which the wave runs; it leaves the weights of `model` unchanged."""
        return nullcontext()

    # -- one step --------------------------------------------------------------------------------

    def train_step(self, placed: PlacedBackbone) -> StepValues:
        """Train every job by one step; a job whose gradients are not finite is not updated."""
        batches = [member.data.batch(self.step) for member in self.members]
        counts = [len(batch) for batch in batches]
        owned = [replace(row, task=n) for n, batch in enumerate(batches) for row in batch]
        packed = placed.pack(
            owned,
            at_least=self.members[0].data.shape,
            is_flat=placed.lays_flat(self.config.waves.packing, "waves.packing"),
            token_multiple=TOKEN_MULTIPLE * torch.get_num_threads(),
        )
        factors = self._set_rates()
        with filled(self.adapter, packed, seeds=self._seeds(batches)) as slots:
            parts = few_shot_loss.forward(
                self.config.protocol, placed, packed, lambda _, part: _job_means(part, counts)
            )
            slots.backward(parts["loss"].sum())
            placed.engine.after_backward()
        norm_J = self._update(factors)
        self.step += 1
        names = [*parts, "grad_norm"]
        measured = torch.stack([*(part.detach().float() for part in parts.values()), norm_J])
        values = dict(zip(names, measured.tolist(), strict=True))
        return StepValues({**values, **self._list_rates(factors)})

    def _update(self, factors: Sequence[float]) -> Tensor:
        """Clip, step and drop the gradients; returns the jobs' norms (J,) before clipping."""
        norm_J = job_optim.clip_jobs(self.adapter, self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm_J

    def _set_rates(self) -> list[float]:
        protocol = self.config.protocol
        factors = []
        for member in self.members:
            schedule = ScheduleConfig(
                steps=member.steps, warmup_fraction=protocol.warmup_fraction, decay=protocol.decay
            )
            factors.append(optim.rate_factor(schedule, self.step))
        factor_J = torch.tensor(factors)
        peaks = {"inventory": self._optim.lr, "routing": self._optim.routing_lr}
        job_optim.set_job_rates(
            self.optimizer, {name: factor_J * peak for name, peak in peaks.items()}
        )
        return factors

    def _list_rates(self, factors: Sequence[float]) -> dict[str, list[float]]:
        """Every job's rates as the log has them: `lr` is the routing's where that alone trains."""
        peaks = {"inventory": self._optim.lr, "routing": self._optim.routing_lr}
        trained = [str(group["name"]) for group in self.optimizer.param_groups]
        first, *others = sorted(trained)  # the inventory, if it trains
        names = {first: "lr", **{name: f"lr_{name}" for name in others}}
        return {
            label: [peaks[name] * factor for factor in factors] for name, label in names.items()
        }

    def _seeds(self, batches: Sequence[Sequence[EncodedRow]]) -> list[int]:
        """One seed per row for policies that draw numbers; it does not depend on the other jobs."""
        return [
            seed_from("noise", member.job.name, self.step, row)
            for member, batch in zip(self.members, batches, strict=True)
            for row in range(len(batch))
        ]

    # -- single jobs -----------------------------------------------------------------------------

    def take(self, number: int) -> Adapter:
        """One job's current adapter, on the host."""
        return unstack(self.adapter, number, self.members[number].job.task)

    def keep(self, number: int, folder: Path, *, backbone: dict[str, Any]) -> None:
        """Write one job's current adapter, its best so far, into `folder`."""
        artefact.save(
            self.take(number),
            folder,
            step=self.step,
            backbone=backbone,
            origin=self._origin(number),
        )

    def kept(self, numbers: Sequence[int], folders: Sequence[Path]) -> Adapter:
        """The best adapters of some jobs, stacked, ready to be scored."""
        return stack(
            [self.members[number].job.name for number in numbers],
            [artefact.load(folder) for folder in folders],
            routing_only=self.variant.kind == "routing",
        )

    def publish(self, number: int, kept: Path, folder: Path, *, backbone: dict[str, Any]) -> None:
        """Copy one job's best adapter to its result folder."""
        artefact.save(
            artefact.load(kept),
            folder / "adapter",
            step=self.members[number].progress.best_step,
            backbone=backbone,
            origin=self._origin(number),
        )

    def _origin(self, number: int) -> dict[str, Any]:
        return {"job": self.members[number].job.name}

    def drop(self, numbers: Sequence[int]) -> None:
        """Remove jobs; the remaining ones are not affected."""
        remaining = [number for number in range(len(self.members)) if number not in numbers]
        self.members = [self.members[number] for number in remaining]
        if not remaining or not numbers:
            return
        device = next(self.adapter.parameters()).device
        smaller = stack(
            [member.job.name for member in self.members],
            [unstack(self.adapter, n, self.adapter.task_names[n]) for n in remaining],
            routing_only=self.variant.kind == "routing",
        ).to(device)
        optimizer = job_optim.make_job_optimizer(smaller, self._optim)
        job_optim.take_jobs(self.optimizer, remaining, optimizer)
        self.adapter, self.optimizer = smaller, optimizer

    def copy(
        self, number: int, run: Path, *, backbone: dict[str, Any]
    ) -> Callable[[], object] | None:
        """A function that saves one job's current state, whatever happens to the wave meanwhile.

        Saved as the job would be alone, so that it may resume in any wave. None: nothing to save.
        """
        member = self.members[number]
        return partial(
            checkpoint.save,
            member.job.folder(run),
            self.take(number),
            job_optim.job_state(self.adapter, self.optimizer, number),
            step=self.step,
            progress={"standing": asdict(member.progress)},
            backbone=backbone,
            origin=self._origin(number),
            keep=1,
            publish=False,
        )


def _job_means(loss: Loss, counts: list[int]) -> Tensor:
    """The mean of each job (J,) from sums and counts of its rows (B,); 0 where nothing counts."""
    sums, numbers = loss.sum.split(counts), loss.count.split(counts)
    return torch.stack([a.sum() / b.sum().clamp(min=1) for a, b in zip(sums, numbers, strict=True)])
