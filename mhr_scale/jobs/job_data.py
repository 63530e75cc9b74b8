"""The token ids that a job trains and is scored on: a pure function of (task, seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mhr_scale.config import AdaptConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow
from mhr_scale.rows.encode import Encoder
from mhr_scale.run.runlog import log
from mhr_scale.scores.questions import Question, ask, encode
from mhr_scale.seeds import seed_from
from mhr_scale.tasks.suites import FewShotTask
from mhr_scale.tasks.task import Example, digest


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """Rows to score: their questions and token ids, in the same order."""

    questions: tuple[Question, ...]
    rows: tuple[EncodedRow, ...]


def round_up(length: int) -> int:
    """The next multiple of 8 tokens, of 16 above 64, of 32 above 128, ...: keeps shapes few."""
    step = max(8, 1 << ((length - 1).bit_length() - 3)) if length > 8 else 8
    return -(-length // step) * step


@dataclass
class JobData:
    """The rows of a task's seed, shared by the jobs of all variants."""

    few_shot: FewShotTask
    config: AdaptConfig
    test: ScoredSet
    selection: ScoredSet | None
    selects_on: str
    _encoder: Encoder
    _rows: dict[tuple[Any, ...], EncodedRow] = field(default_factory=dict)
    _epoch: tuple[int, tuple[EncodedRow, ...]] = (-1, ())

    @property
    def batch_size(self) -> int:
        """Examples per step: the protocol's, or all there are."""
        return min(self.config.protocol.batch_size, self.few_shot.n_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the remaining rows are dropped."""
        return self.few_shot.n_rows // self.batch_size

    @property
    def digest(self) -> str:
        """What tells these rows apart by content: those to train on, to select on and to score."""
        selection = self.selection.questions if self.selection else ()
        scored = [question.example for question in (*selection, *self.test.questions)]
        return digest([*self.few_shot.task.train, *self.few_shot.selection, *scored])

    def batch(self, step: int) -> Sequence[EncodedRow]:
        """The rows of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        start = place * self.batch_size
        return self._epoch[1][start : start + self.batch_size]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The lengths every batch is padded to: the longest input and targets of all, rounded up.

        They depend on nothing else: sums over wider rows round differently, and Adam and Adafactor
        amplify a rounding error wherever a gradient is close to zero. So, beside jobs of the same
        shape, a job computes the same bits as alone.
        """
        rows = [
            self._encode(example, choices)
            for example in self.few_shot.task.train
            for choices in self._answers(example)
        ]
        longest = max(len(r.input_ids) for r in rows), max(r.n_answer_tokens for r in rows)
        return round_up(longest[0]), round_up(longest[1])

    def _draw(self, epoch: int) -> tuple[EncodedRow, ...]:
        task, seed = self.few_shot.task.name, self.few_shot.seed
        examples = self.few_shot.draw(epoch)
        order = np.random.Generator(np.random.PCG64(seed_from("order", task, seed, epoch)))
        return tuple(
            self._row(examples[number], epoch) for number in order.permutation(len(examples))
        )

    def _answers(self, example: Example) -> list[tuple[str, ...]]:
        """The possible answers of a row: all choices together, or any of its references."""
        protocol = self.config.protocol
        if protocol.loss == "t_few" and is_ranked(example):
            return [tuple(dict.fromkeys(example.choices))]
        references = example.targets if protocol.references == "random" else example.targets[:1]
        return [(reference,) for reference in references]

    def _row(self, example: Example, epoch: int) -> EncodedRow:
        answers = self._answers(example)
        drawn = seed_from("reference", self.few_shot.seed, example.id, epoch) % len(answers)
        chosen, label = answers[drawn], 0
        if len(chosen) > 1:
            assert example.label is not None
            label = chosen.index(example.choices[example.label])
        return replace(self._encode(example, chosen), label=label)

    def _encode(self, example: Example, choices: tuple[str, ...]) -> EncodedRow:
        key = (example.history, example.input, choices)
        if key not in self._rows:
            (input_ids,) = self._encoder.inputs([example])
            self._rows[key] = EncodedRow(input_ids, self._encoder.answers(choices))
        return self._rows[key]


def is_ranked(example: Example) -> bool:
    """Whether a row has choices to tell apart; equal texts are one choice."""
    return len(set(example.choices)) > 1


def open_data(
    few_shot: FewShotTask, config: AdaptConfig, tokenizer: Any, family: Family
) -> JobData:
    """Check the rows of a task and seed before training, and tokenise those it is scored on."""
    task, protocol = few_shot.task, config.protocol
    if protocol.loss == "t_few":
        n_unranked = sum(not is_ranked(example) for example in task.train)
        if n_unranked:
            log.warning(
                "task %s: %d of %d training rows have no choices to rank; the likelihood of the "
                "target alone trains them",
                task.name,
                n_unranked,
                len(task.train),
            )
    selects_on, selection = _select(few_shot, str(config.selection.on))

    def make_set(examples: tuple[Example, ...]) -> ScoredSet:
        scored = replace(task, test=examples)
        questions = ask(scored, config.scoring)
        rows = encode([scored], questions, {task.name: 0}, tokenizer, family, config.scoring)
        return ScoredSet(tuple(questions), tuple(rows))

    return JobData(
        few_shot,
        config,
        test=make_set(task.test),
        selection=make_set(selection) if selection else None,
        selects_on=selects_on,
        _encoder=Encoder(task, tokenizer, protocol.lengths, family),
    )


def _select(few_shot: FewShotTask, on: str) -> tuple[str, tuple[Example, ...]]:
    """What a task's checkpoints are selected on, and its rows if they are not the reported ones."""
    task = few_shot.task
    if on == "held_out":
        if not task.validation:
            log.warning(
                "task %s: no validation row beside the reported ones, so the last step of every "
                "job is kept; give it a test file too, or select on shots",
                task.name,
            )
        on = "validation" if task.validation else "last"
    if on == "validation" and not task.validation:
        raise ConfigError(
            f"selection.on: validation, but task {task.name} has no validation row; select on "
            "shots, test or last"
        )
    rows = {"validation": task.validation, "shots": few_shot.selection}
    return on, rows.get(on, ())
