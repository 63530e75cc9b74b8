"""Running a rank's waves, from their first step to the results of their jobs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.config import AdaptConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.errors import DivergenceError, RunError
from mhr_scale.families.packed import PAD_MULTIPLE, EncodedRow
from mhr_scale.jobs.job import Job, clean, write_result
from mhr_scale.jobs.job_data import ScoredSet
from mhr_scale.jobs.lockstep import Lockstep
from mhr_scale.jobs.wave import StepValues, Wave
from mhr_scale.passes.scoring import generate_answers
from mhr_scale.rows.batching import Batch
from mhr_scale.run import stopping
from mhr_scale.run.files import to_json_lines, write_text
from mhr_scale.run.runlog import Metrics, Progress, log
from mhr_scale.run.trackers import Curves
from mhr_scale.run.tracking import Tracking
from mhr_scale.run.writer import Writer
from mhr_scale.scores import summary
from mhr_scale.scores.questions import Question, answerers, judge, keeps_texts
from mhr_scale.tasks import metrics
from mhr_scale.training import saved_steps


class Runner:
    """Runs waves on one rank: steps, evaluations, saves, results."""

    def __init__(
        self,
        config: AdaptConfig,
        *,
        placed: PlacedBackbone,
        tokenizer: Any,
        backbone_facts: dict[str, Any],
        total_steps: int,
    ) -> None:
        self.config = config
        self.placed = placed
        self.tokenizer = tokenizer
        self.backbone_facts = backbone_facts
        self.folder = Path(config.run.folder)
        self.lockstep = Lockstep(placed.engine, self._run_dummy)
        self.writer = Writer()
        self.tracking = Tracking(config.run.trackers)
        self.lost: list[str] = []
        self.progress = Progress(total_steps, start=0, what="adapt", unit="job-step")

    # -- a wave ----------------------------------------------------------------------------------

    def run(self, wave: Wave, facts: Callable[[Job], Mapping[str, Any]]) -> None:
        """Train a wave until its last job is finished; `facts` are added to each job's result."""
        wave.adapter.bind(self.placed.adapted)
        with stopping.held(), self.writer, ExitStack() as tracked:
            jobs = [member.job for member in wave.members]
            logs = {job: self._open_log(job, wave, tracked) for job in jobs}
            try:
                self._train(wave, facts, logs)
            except stopping.Stopped:
                self._save_now(wave, logs)
                raise

    def _open_log(self, job: Job, wave: Wave, tracked: ExitStack) -> Metrics:
        """The record of a job, whose trackers close with the wave."""
        folder, resume_step = job.folder(self.folder), wave.step or -1
        folder.mkdir(parents=True, exist_ok=True)
        curves = Curves(folder=folder, resume_step=resume_step, job=job.name, run=self.folder)
        track = tracked.enter_context(self.tracking.opened(curves))
        return Metrics(folder / "metrics.jsonl", resume_step=resume_step, also=track)

    def _train(
        self,
        wave: Wave,
        facts: Callable[[Job], Mapping[str, Any]],
        logs: Mapping[Job, Metrics],
    ) -> None:
        """Train a wave from its current step on; any pass may raise `Stopped`."""
        if wave.step:
            self._evaluate(wave, self._unevaluated(wave), logs)
            self._finish(wave, facts)
        elif self.config.selection.at_start:
            self._evaluate(wave, range(len(wave.members)), logs)
        while wave.members:
            self.lockstep.turn("train")
            self.placed.model.train()
            values = wave.train_step(self.placed)
            self._log(wave, values, logs)
            self._drop_lost(wave, values)
            self._evaluate(wave, self._due(wave), logs)
            self._finish(wave, facts)
            self._save(wave, logs)

    def _log(self, wave: Wave, values: StepValues, logs: Mapping[Job, Metrics]) -> None:
        for number, member in enumerate(wave.members):
            is_due = wave.step % self.config.run.log_every == 0 or wave.step == member.steps
            if is_due and values.is_finite(number):
                logs[member.job].write({"step": wave.step, **values.of(number)})
            self.progress.advance(f"{wave.members[0].job.variant} step {wave.step}")

    def _drop_lost(self, wave: Wave, values: StepValues) -> None:
        """Drop jobs whose loss or gradient is not finite; the others are not affected."""
        lost = [n for n in range(len(wave.members)) if not values.is_finite(n)]
        self._note_lost(wave, lost, what="loss or gradient")
        self._drop(wave, lost)

    def _note_lost(self, wave: Wave, numbers: Sequence[int], *, what: str) -> None:
        for number in numbers:
            name = wave.members[number].job.name
            log.error("%s: %s is not finite in step %d", name, what, wave.step)
            self.lost.append(f"{name} (step {wave.step})")
            self.progress.skip(wave.members[number].steps - wave.step)

    def _drop(self, wave: Wave, numbers: Sequence[int]) -> None:
        if numbers:
            wave.drop(numbers)
            if wave.members:
                wave.adapter.bind(self.placed.adapted)

    def _save(self, wave: Wave, logs: Mapping[Job, Metrics]) -> None:
        every = self.config.waves.save_every
        is_due = wave.step % every == 0 if every else bool(self._due(wave))
        if is_due:
            self._submit(wave, range(len(wave.members)), logs)

    def _save_now(self, wave: Wave, logs: Mapping[Job, Metrics]) -> None:
        """Save every job that is beyond its last save, even in the middle of an evaluation."""
        self.writer.wait()
        folders = [member.job.folder(self.folder) for member in wave.members]
        saved = [saved_steps.find_resume(folder) or 0 for folder in folders]
        self._submit(wave, [n for n, step in enumerate(saved) if step != wave.step], logs)
        self.writer.wait()

    def _submit(self, wave: Wave, numbers: Sequence[int], logs: Mapping[Job, Metrics]) -> None:
        """Save some jobs in the background, then remove adapters that are no longer their best."""
        writes: list[Callable[[], object]] = []
        for number in numbers:
            member = wave.members[number]
            write = wave.copy(number, self.folder, backbone=self.backbone_facts)
            if write is not None:
                writes += [logs[member.job].flush, write]
            folder, best = member.job.folder(self.folder), member.progress.best_step
            writes.append(partial(_drop_older, folder / "best", best))
        self.writer.submit(lambda: [write() for write in writes])

    # -- evaluation ------------------------------------------------------------------------------

    def _due(self, wave: Wave) -> list[int]:
        """Jobs to evaluate after this step: every `every_epochs` epochs and after the last one."""
        every = self.config.selection.every_epochs
        return [
            number
            for number, member in enumerate(wave.members)
            if member.data.selects_on != "last"
            and (
                wave.step % (every * member.data.steps_per_epoch) == 0 or wave.step == member.steps
            )
        ]

    def _unevaluated(self, wave: Wave) -> list[int]:
        """Jobs due at the step they were saved at that were stopped before their evaluation."""
        evaluations = {n: wave.members[n].progress.evaluations for n in self._due(wave)}
        return [n for n, past in evaluations.items() if not past or past[-1][0] != wave.step]

    def _evaluate(self, wave: Wave, numbers: Sequence[int], logs: Mapping[Job, Metrics]) -> None:
        """Score jobs on their selection rows, and keep adapters that are better than before."""
        sets = []
        for number in numbers:
            data = wave.members[number].data
            scored = data.test if data.selects_on == "test" else data.selection
            if scored is not None:
                sets.append((number, scored))
        if not sets:
            return
        lost = []
        for (number, _), lines in zip(sets, self.score(wave.adapter, sets), strict=True):
            member = wave.members[number]
            if lines is None:
                lost.append(number)
                continue
            score = metrics.score_of(lines)
            logs[member.job].write({"step": wave.step, "score": score})
            if member.progress.take(wave.step, score):
                self._keep(wave, number, lines if member.data.selects_on == "test" else [])
        self._note_lost(wave, lost, what="a score")
        self._drop(wave, lost)

    def _keep(self, wave: Wave, number: int, lines: Sequence[Mapping[str, Any]]) -> Path:
        """Write a job's adapter as the best so far, with the scores that selected it."""
        member = wave.members[number]
        folder = member.job.folder(self.folder) / "best" / f"{wave.step:06d}"
        wave.keep(number, folder, backbone=self.backbone_facts)
        if lines:
            write_text(folder / summary.SCORES, to_json_lines(lines))
        return folder

    def score(
        self, adapter: Adapter, sets: Sequence[tuple[int, ScoredSet]]
    ) -> list[list[dict[str, Any]] | None]:
        """Score sets of rows, each under its slot; returns the lines of each set, in order.

        None instead of lines if the scores of a slot are not finite.
        """
        rows: list[EncodedRow] = []
        questions: list[tuple[int, Question]] = []
        for set_number, (slot, scored) in enumerate(sets):
            for row, question in zip(scored.rows, scored.questions, strict=True):
                rows.append(replace(row, number=len(rows), task=slot))
                questions.append((set_number, question))
        self.placed.model.eval()
        judged: dict[int, dict[str, Any]] = {}
        options = self.config.scoring
        texts = [keeps_texts(options, len(scored.rows)) for _, scored in sets]
        for way in answerers(rows, self.placed, adapter, self.tokenizer, options):
            for batch in way.batches:
                for row, value in self._answer(way.name, way.run, batch):
                    set_number, question = questions[row.number]
                    judged[row.number] = judge(question, value, with_texts=texts[set_number])
        lines: list[list[dict[str, Any]]] = [[] for _ in sets]
        for number, (set_number, _) in enumerate(questions):
            if number in judged:
                lines[set_number].append(judged[number])
        counts = [len(scored.rows) for _, scored in sets]
        return [part if len(part) == n else None for part, n in zip(lines, counts, strict=True)]

    def _answer(
        self, kind: str, run: Callable[[Batch], list[Any]], batch: Batch
    ) -> list[tuple[EncodedRow, Any]]:
        """Rows of a batch with their answers, without those of slots whose scores are not finite.

        Such a slot spoils its batch: the rows of each slot are then run separately.
        """
        self.lockstep.turn(kind)
        try:
            return list(zip(batch, run(batch), strict=True))
        except DivergenceError:
            slots = sorted({row.task for row in batch})
            if len(slots) == 1:
                return []
            parts = ([row for row in batch if row.task == slot] for slot in slots)
            return [answer for part in parts for answer in self._answer(kind, run, part)]

    # -- results ---------------------------------------------------------------------------------

    def _finish(self, wave: Wave, facts: Callable[[Job], Mapping[str, Any]]) -> None:
        """Write the results of jobs that are finished, and drop them from the wave."""
        patience = self.config.selection.patience
        done = [
            number
            for number, member in enumerate(wave.members)
            if wave.step >= member.steps
            or (patience is not None and member.progress.worse >= patience)
        ]
        if not done:
            return
        folders = {}
        for number in done:
            member = wave.members[number]
            if member.data.selects_on == "last":
                member.progress.best_step = wave.step
                self._keep(wave, number, [])
            best = member.job.folder(self.folder) / "best"
            folders[number] = best / f"{member.progress.best_step:06d}"
        lost = []
        unscored = [n for n in done if wave.members[n].data.selects_on != "test"]
        if unscored:
            lost = self._score_best(wave, unscored, [folders[number] for number in unscored])
        self._note_lost(wave, lost, what="a score")
        trained = wave.trained_numbers
        for number, best in folders.items():
            member = wave.members[number]
            if number in lost:
                continue
            entries = {"steps": wave.step, "trained_numbers": trained, **facts(member.job)}
            self._write_result(wave, number, best, entries)
            self.progress.skip(member.steps - wave.step)
        self._drop(wave, done)

    def _score_best(self, wave: Wave, numbers: Sequence[int], folders: Sequence[Path]) -> list[int]:
        """Score the best checkpoints of some jobs on their test rows, all of them together.

        Returns the jobs whose scores are not finite.
        """
        best = wave.kept(numbers, folders)
        best.bind(self.placed.adapted)
        tests = [wave.members[number].data.test for number in numbers]
        sets = list(enumerate(tests))
        lost = []
        for number, folder, lines in zip(numbers, folders, self.score(best, sets), strict=True):
            if lines is None:
                lost.append(number)
            else:
                write_text(folder / summary.SCORES, to_json_lines(lines))
        wave.adapter.bind(self.placed.adapted)
        return lost

    def _write_result(
        self, wave: Wave, number: int, best: Path, entries: Mapping[str, Any]
    ) -> None:
        """Move the best checkpoint into place, then write the result, then clean up."""
        self.writer.wait()  # a pending write would recreate what is cleaned up
        member = wave.members[number]
        folder, progress = member.job.folder(self.folder), member.progress
        wave.publish(number, best, folder, backbone=self.backbone_facts)
        lines = summary.read_scores(best / summary.SCORES)
        if len(lines) != len(member.data.test.rows):
            raise RunError(f"{best}: not the scores of all its rows; delete {folder} and run again")
        write_text(folder / summary.SCORES, to_json_lines(lines))
        write_result(
            member.job,
            self.folder,
            {
                "score": metrics.score_of(lines),
                "metric": lines[0]["metric"],
                "examples": len(lines),
                "best_step": progress.best_step,
                "selected_on": member.data.selects_on,
                "evaluations": progress.evaluations,
                **entries,
            },
        )
        clean(member.job, self.folder)

    def close(self) -> None:
        """Run dummy passes until the jobs of all ranks are finished. Collective."""
        with stopping.held():
            self.lockstep.finish()
        self.progress.close()

    # -- dummy passes ----------------------------------------------------------------------------

    def _run_dummy(self, kind: str) -> None:
        """A dummy pass of a kind: one row of a few tokens, through the same modules."""
        placed, model, options = self.placed, self.placed.model, self.config.scoring
        token = self.tokenizer.eos_token_id
        row = EncodedRow(np.full(PAD_MULTIPLE, token), (np.full(1, token),))
        was_training = model.training
        try:
            model.train(kind == "train")
            with adapters_off(model):
                if kind == "generate":
                    generate_answers(
                        placed,
                        None,
                        [row],
                        self.tokenizer,
                        beams=options.beams,
                        max_new_tokens=options.max_new_tokens,
                    )
                    return
                with torch.set_grad_enabled(kind == "train"):
                    logits_BDV = placed.logits(placed.pack([row]))
                    if kind == "train":
                        logits_BDV.float().sum().backward()
                        placed.engine.after_backward()
        finally:
            model.train(was_training)


def _drop_older(folder: Path, best: int) -> None:
    """Remove the adapters of steps before the best one."""
    for old in folder.glob("*"):
        if old.name.isdecimal() and int(old.name) < best:
            shutil.rmtree(old)
