"""The training loop: one optimizer step is fetch, forward and backward, reduce, update, check.

Every rank holds the full adapter and makes the same update. Gradients of summed losses are reduced
over ranks once per step, as one flat buffer together with the loss and its count, and then divided
by the global count; so sharding, accumulation and the number of ranks do not change the result.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import Adapter
from mhr_scale.analysis.monitor import Monitor
from mhr_scale.config import PretrainConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DivergenceError, RunError
from mhr_scale.families.packed import Packed
from mhr_scale.families.sending import send_numbers
from mhr_scale.passes import validation
from mhr_scale.passes.filled import filled
from mhr_scale.rows.batching import StepBatches, number_rows
from mhr_scale.rows.tokens import TokenSet
from mhr_scale.run import stopping
from mhr_scale.run.runlog import Metrics, Progress, RecentSteps, log
from mhr_scale.run.trackers import Curves
from mhr_scale.run.tracking import Tracking
from mhr_scale.run.writer import Writer
from mhr_scale.seeds import seed_from
from mhr_scale.training import checkpoint, optim, saved_steps
from mhr_scale.training.optim import OptimizerState

#: Counts cross ranks as two float32 numbers each, multiples of this and the rest: exact up to
#: 2**36, over 4096 ranks.
LOW = 2**12


@dataclass(slots=True)
class StepSums:
    """What one rank adds up over its micro batches of a step."""

    loss: float = 0.0
    loss_tokens: int = 0
    examples: int = 0
    tokens: int = 0
    positions: int = 0
    padding: int = 0
    row_losses: list[tuple[Packed, Tensor]] = field(default_factory=list)


class Trainer:
    """Trains one adapter on one backbone; holds what a step needs and nothing else."""

    def __init__(
        self,
        config: PretrainConfig,
        *,
        placed: PlacedBackbone,
        adapter: Adapter,
        tokens: TokenSet,
        batches: StepBatches,
        backbone_facts: Mapping[str, Any],
        save_steps: tuple[int, ...] = (),
        monitor: Monitor | None = None,
    ) -> None:
        self.config = config
        self.placed = placed
        self.engine = placed.engine
        self.adapter = adapter
        self.tokens = tokens
        self.batches = batches
        self.backbone_facts = dict(backbone_facts)
        self.save_steps = save_steps
        self.folder = Path(config.run.folder)
        self.optimizer = optim.make_optimizer(adapter, config.optim)
        self.step = 0
        self.resume_step: int | None = None
        self.writer = Writer()
        self.monitor = monitor
        self._copy: Adapter | None = None
        self._metrics: Metrics | None = None
        self._is_stop_agreed = False
        self._saved_step: int | None = None

    # -- the loop --------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, validating, logging and saving on the way.

        A rank that is asked to stop ends all of them after the step: saved, by `Stopped`.
        """
        config = self.config
        start = -1 if self.resume_step is None else self.step
        tracking = Tracking(config.run.trackers if self.engine.rank == 0 else ())
        tracked = tracking.opened(Curves(folder=self.folder, resume_step=start))
        with stopping.held(), self.writer, tracked as track:
            if self.engine.rank == 0:
                path = self.folder / "metrics.jsonl"
                self._metrics = Metrics(path, resume_step=start, also=track)
            if self.resume_step is None and config.run.validate_every >= 0:
                self._log_validation()
            if self.resume_step is None:
                self._log_alignment()
            progress = Progress(config.schedule.steps, start=self.step, what="train")
            recent, start_time = RecentSteps(), time.monotonic()
            for micro_batches in self.batches.load(self.step, config.schedule.steps):
                values = self._train_step(micro_batches, start_time)
                progress.advance(recent.add(values))
                self._validate_and_save()
                if self._is_stop_agreed and self.step < config.schedule.steps:
                    self._stop()
                start_time = time.monotonic()
            progress.close()
        self.engine.gather_barrier()

    def _train_step(self, micro_batches: list[Packed], start_time: float) -> dict[str, float]:
        """One optimizer step, logged if due; returns its metrics."""
        config = self.config
        rates = optim.set_rates(self.optimizer, optim.rate_factor(config.schedule, self.step))
        sums = self.accumulate(micro_batches)
        facts = self.reduce_gradients(sums)
        norm = optim.gradient_norm(self.adapter.parameters())
        if config.optim.clip_norm is not None:
            optim.clip_gradients(self.adapter.parameters(), norm, config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = self._read(facts, norm, sums)
        self.step += 1
        self.writer.check()
        seconds = time.monotonic() - start_time
        line = {"step": self.step, **values, "seconds": seconds}
        line |= {f"lr_{name}": rate for name, rate in rates.items()}
        line["tokens_per_second"] = values["tokens"] / seconds
        if self.step % config.run.log_every == 0 or self.step == config.schedule.steps:
            self._write(line)
        return line

    def _stop(self) -> None:
        """Save this step unless it is saved, then raise `Stopped` on all ranks. Collective."""
        if self._saved_step != self.step:
            self.save()
        self.writer.wait()
        self.engine.gather_barrier()
        raise stopping.stop(f"step {self.step} is saved")

    def accumulate(self, micro_batches: list[Packed]) -> StepSums:
        """Forward and backward passes of this rank's micro batches of a step.

        Gradients of the summed loss accumulate in the adapter's parameters.
        """
        config, sums = self.config, StepSums()
        self.placed.model.train()
        for number, on_host in enumerate(micro_batches):
            packed = on_host.to(self.engine.device)
            torch.manual_seed(
                seed_from("dropout", config.run.seed, self.step, number, self.engine.rank)
            )
            seeds = [seed_from("noise", config.run.seed, row.number) for row in packed.rows]
            with filled(
                self.adapter,
                packed,
                seeds=seeds,
                uniform_share=optim.uniform_share(config.schedule, self.step),
            ) as slots:
                loss = validation.forward(
                    self.placed, packed, label_smoothing=config.loss.label_smoothing
                )
                slots.backward(loss.sum.sum())
                self.engine.after_backward()
            sums.row_losses.append((packed, loss.sum.detach()))
            sums.examples += len(packed.rows)
            sums.tokens += packed.n_input_tokens + packed.n_target_tokens
            sums.loss_tokens += packed.n_target_tokens
            sums.positions += packed.n_positions
            sums.padding += packed.n_padding
        self.engine.check_same_modules()
        return sums

    def reduce_gradients(self, sums: StepSums) -> Tensor:
        """Sum gradients and counts over ranks in one buffer; divide by the global count.

        Whether a rank was asked to stop travels with them, so all ranks know it after this step.
        Returns the sums of the step, on the device, for `_read`. Collective.
        """
        adapter, engine = self.adapter, self.engine
        dense = [p for p in adapter.inventory.parameters() if p.requires_grad]
        logits = adapter.routing_logits
        tasks: list[int] = []
        if logits is not None and logits.requires_grad:
            tasks = self._tasks_of_step() if adapter.row_gradients else []
            if not adapter.row_gradients:
                dense.append(logits)
        for parameter in dense:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        total = torch.stack([row_losses.sum() for _, row_losses in sums.row_losses]).sum()
        is_by_token = self.config.loss.normalise == "tokens"
        counts = (
            *(sums.loss_tokens if is_by_token else sums.examples, sums.examples, sums.tokens),
            *(sums.positions, sums.padding, int(stopping.is_asked())),
        )
        parts = [part for count in counts for part in divmod(count, LOW)]
        facts = torch.cat([total.reshape(1), send_numbers(parts, total.device, dtype=total.dtype)])
        rows = adapter.gradient_rows(tasks) if tasks else None
        buffers = [p.grad.reshape(-1) for p in dense if p.grad is not None]
        buffers += [rows.reshape(-1)] if rows is not None else []
        if engine.world_size > 1:
            flat = engine.reduce_sum(torch.cat([*buffers, facts]))
            _unpack(flat, [*buffers, facts])
        count = facts[1] * LOW + facts[2]
        for buffer in buffers:
            buffer.div_(count)
        if rows is not None:
            adapter.set_gradient_rows(tasks, rows)
        return facts

    def _read(self, facts: Tensor, norm: Tensor, sums: StepSums) -> dict[str, float]:
        """The step's loss, examples, tokens, share of padding and gradient norm.

        Here, once a step, the host waits for the device. Stops the run if the loss or a gradient
        was not a number: the update is made then, and lost with the run. Collective.
        """
        loss, *parts, grad_norm = torch.cat([facts, norm.reshape(1)]).tolist()
        counts = [high * LOW + low for high, low in zip(parts[::2], parts[1::2], strict=True)]
        count, examples, tokens, positions, padding, asked = counts
        self._is_stop_agreed = asked > 0
        loss = loss / count
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise DivergenceError(self._describe_divergence(loss, sums))
        return {
            "loss": loss,
            "examples": examples,
            "tokens": tokens,
            "padding_share": padding / positions,
            "grad_norm": grad_norm,
        }

    def _describe_divergence(self, loss: float, sums: StepSums) -> str:
        """Name the step and the tasks whose rows have no finite loss. Collective."""
        names = self.adapter.task_names
        local = {
            names[task]
            for packed, row_losses in sums.row_losses
            for task, value in zip(packed.tasks, row_losses.tolist(), strict=True)
            if not math.isfinite(value)
        }
        diverged = sorted(set().union(*self.engine.gather_objects(local)))
        saved = saved_steps.find_resume(self.folder)
        way_out = "lower optim.lr, optim.routing_lr or optim.clip_norm, in another run.folder"
        last = f"step {saved} is saved" if saved is not None else "nothing is saved yet"
        if not diverged:
            tasks = ", ".join(names[task] for task in self._tasks_of_step())
            return (
                f"step {self.step + 1}: the gradient is not finite though every loss is "
                f"(loss {loss:g}; tasks in this step: {tasks}); {last}; {way_out}"
            )
        listed = ", ".join(diverged)
        return f"step {self.step + 1}: loss is not finite in {listed}; {last}; {way_out}"

    # -- validation ------------------------------------------------------------------------------

    def validate(self) -> dict[str, Any]:
        """Mean loss per target token on all validation rows, overall and by task. Collective."""
        rows, batch = number_rows(self.tokens.validation), self.config.batch
        return validation.reduce_losses(
            self.placed,
            self.adapter,
            rows,
            max_rows=batch.micro_batch_size,
            pad_multiple=batch.pad_multiple,
            is_flat=self.batches.is_flat,
        )

    # -- saving and resuming ---------------------------------------------------------------------

    def resume(self) -> None:
        """Resume from the newest undamaged step in the run folder, if there is one. Collective."""
        step = self.engine.broadcast_object(self._rank0_find() if self.engine.rank == 0 else None)
        if isinstance(step, RunError):
            raise step
        if step is None:
            return
        progress = checkpoint.load(self.folder, step, self.adapter, self.optimizer)
        if progress.get("plan") != self.batches.plan.fingerprint:
            raise RunError(
                f"{self.folder}: its sample stream came from other data or another mixture; "
                "use another run.folder"
            )
        self.step = self.resume_step = self._saved_step = int(progress["step"])

    def _rank0_find(self) -> int | RunError | None:
        """The step to resume from, or the error for all ranks to raise."""
        try:
            step = saved_steps.find_whole(self.folder)
            if step is not None:
                checkpoint.publish(self.folder, step)
            return step
        except RunError as error:
            return error

    def save(self, *, validation_loss: float | None = None) -> None:
        """Save the current step after checking that all ranks hold the same adapter. Collective.

        Rank 0 copies it to the host and writes in the background; `writer.wait` waits for that.
        """
        self.engine.check_equal(list(self.adapter.parameters()), what="adapters")
        self._saved_step = self.step
        if self.engine.rank:
            return
        self.writer.wait()  # the previous write reads the same copy
        self._copy = checkpoint.copy_adapter(self.adapter, self._copy)
        optimizer = checkpoint.optimizer_state(self.adapter, self.optimizer)
        progress = {
            "plan": self.batches.plan.fingerprint,
            "samples": self.step * self.config.batch.batch_size,
        }
        if validation_loss is not None:
            progress["validation_loss"] = validation_loss
        self.writer.submit(partial(self._write_step, self._copy, optimizer, self.step, progress))

    def _write_step(
        self, adapter: Adapter, optimizer: OptimizerState, step: int, progress: dict[str, Any]
    ) -> None:
        """Write a saved step, in the background: from copies, which no later step modifies."""
        if self._metrics is not None:
            self._metrics.flush()
        folder = checkpoint.save(
            self.folder,
            adapter,
            optimizer,
            step=step,
            progress=progress,
            backbone=self.backbone_facts,
            origin={"run": self.folder.name, "seed": self.config.run.seed},
            keep=self.config.run.keep,
            spare=self.save_steps,
            keep_best=self.config.run.keep_best,
        )
        log.info("saved %s", folder)

    def _validate_and_save(self) -> None:
        """Validate, then save, where either is due: a save includes its validation loss."""
        run, is_last = self.config.run, self.step == self.config.schedule.steps
        is_due = run.validate_every > 0 and self.step % run.validate_every == 0
        loss = None
        if is_due or (is_last and run.validate_every >= 0):
            loss = self._log_validation()
        self._log_alignment()
        is_due = bool(run.save_every) and self.step % run.save_every == 0
        if is_last or is_due or self.step in self.save_steps:
            self.save(validation_loss=loss)

    def _log_validation(self) -> float | None:
        """Validate and log; returns the mean loss, or None without rows. Collective."""
        values = self.validate()
        loss: float | None = values["validation_loss"]
        if loss is not None:
            log.info("step %d: validation loss %.4f", self.step, loss)
            self._write({"step": self.step, **values})
        return loss

    def _log_alignment(self) -> None:
        """Measure and log gradient alignment if due; the run is not affected. Collective."""
        if self.monitor is not None and self.monitor.is_due(self.step):
            values = self.monitor.gather_values()
            if values is not None:
                log.info("step %d: alignment %.4f", self.step, values["alignment"])
                self._write({"step": self.step, **values})

    # -- small parts -----------------------------------------------------------------------------

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(values)

    def _tasks_of_step(self) -> list[int]:
        """Tasks of the global batch, which every rank knows without communication."""
        return sorted({sample.task for sample in self.batches.samples(self.step)})


def _unpack(flat: Tensor, buffers: list[Tensor]) -> None:
    """Copy a flat buffer back into the tensors that were concatenated."""
    start = 0
    for buffer in buffers:
        buffer.copy_(flat[start : start + buffer.numel()])
        start += buffer.numel()
