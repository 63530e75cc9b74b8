"""A rank's waves from their first step to the results of their jobs."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.linear import AdaptedLinear
from mhr_scale.config import AdaptConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import DivergenceError, RunError
from mhr_scale.jobs.job import Job, clean, write_result
from mhr_scale.jobs.job_data import Exam
from mhr_scale.jobs.lockstep import Lockstep
from mhr_scale.jobs.wave import Member, StepValues, Wave
from mhr_scale.passes import scoring
from mhr_scale.passes.scoring import Batch, ChoiceRow
from mhr_scale.run import stopping
from mhr_scale.run.files import to_json_lines, write_text
from mhr_scale.run.runlog import Metrics, Progress, log
from mhr_scale.run.writer import Writer
from mhr_scale.scores import summary
from mhr_scale.scores.questions import Question, answerers, judge
from mhr_scale.training import checkpoint


class Runner:
    """Runs waves on one rank: steps, evaluations, saves, results."""

    def __init__(
        self,
        config: AdaptConfig,
        *,
        engine: Engine,
        model: Any,
        linears: Mapping[str, AdaptedLinear],
        tokenizer: Any,
        backbone_facts: dict[str, Any],
        total_steps: int,
    ) -> None:
        self.config = config
        self.engine = engine
        self.model = model
        self.linears = linears
        self.tokenizer = tokenizer
        self.backbone_facts = backbone_facts
        self.folder = Path(config.run.folder)
        self.lockstep = Lockstep(engine, self._run_dummy)
        self.writer = Writer()
        self.lost: list[str] = []
        self.progress = Progress(total_steps, start=0, what="adapt", unit="job-step")

    # -- a wave ----------------------------------------------------------------------------------

    def run(self, wave: Wave, facts: Callable[[Job], Mapping[str, Any]]) -> None:
        """Train a wave until its last job is finished; `facts` of a job go into its result."""
        wave.adapter.bind(self.linears)
        begun = wave.step
        logs = {
            member.job: Metrics(self._open(member) / "metrics.jsonl", resume_step=begun or -1)
            for member in wave.members
        }
        with stopping.held(), self.writer:
            try:
                self._train(wave, facts, logs)
            except stopping.Stopped:
                self._save_now(wave, logs)
                raise

    def _train(
        self,
        wave: Wave,
        facts: Callable[[Job], Mapping[str, Any]],
        logs: Mapping[Job, Metrics],
    ) -> None:
        """Train a wave from where it stands; `Stopped` may come out of any pass."""
        if wave.step:
            self._evaluate(wave, self._left_over(wave), logs)
            self._finish(wave, facts)
        elif self.config.selection.at_start:
            self._evaluate(wave, range(len(wave.members)), logs)
        while wave.members:
            self.lockstep.turn("train")
            self.model.train()
            values = wave.train_step(
                self.model,
                device=self.engine.device,
                after_backward=self.engine.after_backward,
            )
            self._log(wave, values, logs)
            self._drop_lost(wave, values)
            self._evaluate(wave, self._due(wave), logs)
            self._finish(wave, facts)
            self._save(wave, logs)

    def _open(self, member: Member) -> Path:
        folder = member.job.folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _log(self, wave: Wave, values: StepValues, logs: Mapping[Job, Metrics]) -> None:
        for number, member in enumerate(wave.members):
            is_due = wave.step % self.config.run.log_every == 0 or wave.step == member.steps
            if is_due and values.is_finite(number):
                logs[member.job].write({"step": wave.step, **values.of(number)})
            self.progress.advance(f"{wave.members[0].job.variant} step {wave.step}")

    def _drop_lost(self, wave: Wave, values: StepValues) -> None:
        """Give up jobs whose loss is no number; the others have not noticed."""
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
                wave.adapter.bind(self.linears)

    def _save(self, wave: Wave, logs: Mapping[Job, Metrics]) -> None:
        every = self.config.waves.save_every
        is_due = wave.step % every == 0 if every else bool(self._due(wave))
        if is_due:
            self._submit(wave, range(len(wave.members)), logs)

    def _save_now(self, wave: Wave, logs: Mapping[Job, Metrics]) -> None:
        """Save every job that has come further than its last save, also amid its evaluation."""
        self.writer.wait()
        folders = [member.job.folder(self.folder) for member in wave.members]
        saved = [checkpoint.find_resume(folder) or 0 for folder in folders]
        self._submit(wave, [n for n, step in enumerate(saved) if step != wave.step], logs)
        self.writer.wait()

    def _submit(self, wave: Wave, numbers: Sequence[int], logs: Mapping[Job, Metrics]) -> None:
        """Save some jobs in the background; then drop the adapters that are not their best."""
        writes: list[Callable[[], object]] = []
        for number in numbers:
            member = wave.members[number]
            write = wave.copy(number, self.folder, backbone=self.backbone_facts)
            if write is not None:
                writes += [logs[member.job].flush, write]
            folder, best = member.job.folder(self.folder), member.standing.best_step
            writes.append(partial(_drop_older, folder / "best", best))
        self.writer.submit(lambda: [write() for write in writes])

    # -- evaluation ------------------------------------------------------------------------------

    def _due(self, wave: Wave) -> list[int]:
        """Jobs to evaluate after this step: every so many epochs, and after the last one."""
        if self.config.selection.on == "last":
            return []
        every = self.config.selection.every_epochs
        return [
            number
            for number, member in enumerate(wave.members)
            if wave.step % (every * member.data.steps_per_epoch) == 0 or wave.step == member.steps
        ]

    def _left_over(self, wave: Wave) -> list[int]:
        """Jobs to evaluate at the step they were saved at: stopped before they were through."""
        evaluations = {n: wave.members[n].standing.evaluations for n in self._due(wave)}
        return [n for n, found in evaluations.items() if not found or found[-1][0] != wave.step]

    def _evaluate(self, wave: Wave, numbers: Sequence[int], logs: Mapping[Job, Metrics]) -> None:
        """Score jobs on the rows that select, and keep those that are better than before."""
        selects_on_test = self.config.selection.on == "test"
        if self.config.selection.on == "last" or not numbers:
            return
        exams = []
        for number in numbers:
            data = wave.members[number].data
            exam = data.test if selects_on_test else data.selection
            assert exam is not None
            exams.append((number, exam))
        lost = []
        for (number, _), lines in zip(exams, self.score(wave.adapter, exams), strict=True):
            member = wave.members[number]
            if lines is None:
                lost.append(number)
                continue
            score = summary.mean_points(lines)
            logs[member.job].write({"step": wave.step, "score": score})
            if member.standing.take(wave.step, score):
                self._keep(wave, number, lines if selects_on_test else [])
        self._note_lost(wave, lost, what="a score")
        self._drop(wave, lost)

    def _keep(self, wave: Wave, number: int, lines: Sequence[Mapping[str, Any]]) -> Path:
        """Write a job's adapter as the best so far, with the scores it was chosen by."""
        member = wave.members[number]
        folder = member.job.folder(self.folder) / "best" / f"{wave.step:06d}"
        wave.keep(number, folder, backbone=self.backbone_facts)
        if lines:
            write_text(folder / summary.SCORES, to_json_lines(lines))
        return folder

    def score(
        self, adapter: Adapter, exams: Sequence[tuple[int, Exam]]
    ) -> list[list[dict[str, Any]] | None]:
        """Score exams under the slots they are given with; the lines of each, in order.

        None where the scores of a slot are no numbers.
        """
        rows: list[ChoiceRow] = []
        asked: list[tuple[int, Question]] = []
        for exam_number, (slot, exam) in enumerate(exams):
            for row, question in zip(exam.rows, exam.questions, strict=True):
                rows.append(replace(row, number=len(rows), task=slot))
                asked.append((exam_number, question))
        self.model.eval()
        found: dict[int, dict[str, Any]] = {}
        options = self.config.scoring
        for kind, run, todo in answerers(
            rows, self.model, adapter, self.tokenizer, options, self.engine
        ):
            for batch in scoring.fill_batches(todo, options.max_tokens):
                for row, value in self._answer(kind, run, batch):
                    found[row.number] = judge(asked[row.number][1], value)
        lines: list[list[dict[str, Any]]] = [[] for _ in exams]
        for number, (exam_number, _) in enumerate(asked):
            if number in found:
                lines[exam_number].append(found[number])
        whole = [len(exam.rows) for _, exam in exams]
        return [own if len(own) == n else None for own, n in zip(lines, whole, strict=True)]

    def _answer(
        self, kind: str, run: Callable[[Batch], list[Any]], batch: Batch
    ) -> list[tuple[ChoiceRow, Any]]:
        """Rows of a batch with their answers; without those of slots whose scores are no numbers.

        Such a slot spoils its batch: each of the others is asked again by itself.
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
        """Write the results of jobs that are through, and cut them out of the wave."""
        patience = self.config.selection.patience
        done = [
            number
            for number, member in enumerate(wave.members)
            if wave.step >= member.steps
            or (patience is not None and member.standing.worse >= patience)
        ]
        if not done:
            return
        folders = []
        for number in done:
            standing = wave.members[number].standing
            if self.config.selection.on == "last":
                standing.best_step = wave.step
                self._keep(wave, number, [])
            folder = wave.members[number].job.folder(self.folder)
            folders.append(folder / "best" / f"{standing.best_step:06d}")
        lost = []
        if self.config.selection.on != "test":
            lost = self._score_best(wave, done, folders)
        self._note_lost(wave, lost, what="a score")
        trained = wave.trained_numbers
        for number, best in zip(done, folders, strict=True):
            member = wave.members[number]
            if number in lost:
                continue
            own = {"steps": wave.step, "trained_numbers": trained, **facts(member.job)}
            self._write_result(wave, number, best, own)
            self.progress.skip(member.steps - wave.step)
        self._drop(wave, done)

    def _score_best(self, wave: Wave, numbers: Sequence[int], folders: Sequence[Path]) -> list[int]:
        """Score the best checkpoint of some jobs on their test rows, all of them together.

        Returns the jobs whose scores are no numbers.
        """
        best = wave.kept(numbers, folders)
        best.bind(self.linears)
        tests = [wave.members[number].data.test for number in numbers]
        exams = list(enumerate(tests))
        lost = []
        for number, folder, lines in zip(numbers, folders, self.score(best, exams), strict=True):
            if lines is None:
                lost.append(number)
            else:
                write_text(folder / summary.SCORES, to_json_lines(lines))
        wave.adapter.bind(self.linears)
        return lost

    def _write_result(self, wave: Wave, number: int, best: Path, facts: Mapping[str, Any]) -> None:
        """Move the best checkpoint into place, then write the result, then clean up."""
        self.writer.wait()  # it may be about to write what is cleaned up
        member = wave.members[number]
        folder, standing = member.job.folder(self.folder), member.standing
        wave.publish(number, best, folder, backbone=self.backbone_facts)
        lines = summary.read_scores(best / summary.SCORES)
        if len(lines) != len(member.data.test.rows):
            raise RunError(f"{best}: not the scores of all its rows; delete {folder} and run again")
        write_text(folder / summary.SCORES, to_json_lines(lines))
        write_result(
            member.job,
            self.folder,
            {
                "score": summary.mean_points(lines),
                "metric": lines[0]["metric"],
                "examples": len(lines),
                "best_step": standing.best_step,
                "evaluations": standing.evaluations,
                **facts,
            },
        )
        clean(member.job, self.folder)

    def close(self) -> None:
        """Keep the ranks that still have jobs company, until all are through. Collective."""
        with stopping.held():
            self.lockstep.finish()
        self.progress.close()

    # -- company ---------------------------------------------------------------------------------

    def _run_dummy(self, kind: str) -> None:
        """One pass of a kind with one row of a few tokens, through the same modules."""
        bound = [(linear, linear.is_off) for linear in self.linears.values()]
        for linear, _ in bound:
            linear.is_off = True
        ids = torch.full((1, scoring.PAD_MULTIPLE), self.model.config.eos_token_id or 1)
        ids = ids.to(self.engine.device)
        was_training = self.model.training
        try:
            self.model.train(kind == "train")
            if kind == "generate":
                with torch.no_grad():
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        num_beams=self.config.scoring.beams,
                        do_sample=False,
                        max_new_tokens=self.config.scoring.max_new_tokens,
                        use_cache=True,
                        synced_gpus=True,
                    )
                return
            with torch.set_grad_enabled(kind == "train"):
                output = self.model(input_ids=ids, decoder_input_ids=ids[:, :1], use_cache=False)
                if kind == "train":
                    output.logits.float().sum().backward()
                    self.engine.after_backward()
        finally:
            self.model.train(was_training)
            for linear, is_off in bound:
                linear.is_off = is_off


def _drop_older(folder: Path, best: int) -> None:
    """Remove the kept adapters of steps before the best one."""
    for old in folder.glob("*"):
        if old.name.isdecimal() and int(old.name) < best:
            shutil.rmtree(old)
