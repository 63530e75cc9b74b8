"""The losses of a wave's jobs, computed again from the definitions, one row after the other."""

import math
from dataclasses import replace

import pytest
import torch
from adapters.tiny import attach_copy, make_t5
from jobs.small_jobs import (
    MHR,
    SMALL,
    Bench,
    Case,
    make_case,
    make_config,
    make_few_shot,
    make_source,
    make_task,
    tokenizer,
)
from torch.nn import functional as F

from mhr_scale.config import VariantConfig
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.t5 import GATED
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.job_data import open_data
from mhr_scale.jobs.wave import Member

#: The first step of a constant schedule changes the adapter only after the losses are measured.
PROTOCOL = {"warmup_fraction": 0.0, "decay": "constant"}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


class Alone:
    """A model of its own with the adapter of one job, for one row at a time."""

    def __init__(self, case: Case, number: int) -> None:
        self.model = make_t5(**SMALL).train()
        self.adapter = attach_copy(self.model, case.open().take(number))

    @torch.no_grad()
    def logits(self, row: EncodedRow, choice: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of one choice behind its input, nothing padded."""
        labels = torch.tensor(row.answers[choice], dtype=torch.long)[None]
        with self.adapter.slots([0]):
            output = self.model(input_ids=torch.tensor(row.input_ids)[None], labels=labels)
        return output.logits[0], labels[0]

    @torch.no_grad()
    def loss_of_transformers(self, rows: list[EncodedRow]) -> float:
        """The loss that the model computes itself for a batch with labels."""
        inputs, labels = (
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(part, dtype=torch.long) for part in parts], True, pad
            )
            for parts, pad in (
                ([row.input_ids for row in rows], 0),
                ([row.answers[0] for row in rows], -100),
            )
        )
        with self.adapter.slots([0] * len(rows)):
            loss = self.model(input_ids=inputs, attention_mask=inputs != 0, labels=labels).loss
        return loss.item()


def first_step(bench: Bench, case: Case) -> list[dict[str, float]]:
    values = bench.step(case.open())
    return [values.of(number) for number in range(len(case.members))]


@pytest.mark.parametrize("variant", ["full", "average"])
def test_a_language_model_loss_is_that_of_transformers(bench, variant):
    case = make_case(VariantConfig(adapter="x", kind=variant), make_source(), **PROTOCOL)
    for number, found in enumerate(first_step(bench, case)):
        rows = list(case.members[number].data.batch(0))
        expected = Alone(case, number).loss_of_transformers(rows)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalise", ["tokens", "examples"])
def test_smoothing_and_normalising_are_those_of_the_definition(bench, smoothing, normalise):
    case = make_case(
        VariantConfig(adapter="x"),
        make_source(),
        label_smoothing=smoothing,
        normalise=normalise,
        **PROTOCOL,
    )
    for number, found in enumerate(first_step(bench, case)):
        alone, total, tokens = Alone(case, number), 0.0, 0
        rows = case.members[number].data.batch(0)
        for row in rows:
            logits, labels = alone.logits(row)
            log_p = logits.double().log_softmax(-1)
            right = -log_p.gather(-1, labels[:, None]).sum().item()
            spread = -log_p.mean(-1).sum().item()
            total += (1.0 - smoothing) * right + smoothing * spread
            tokens += len(labels)
        count = tokens if normalise == "tokens" else len(rows)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("length_norm", [1.0, 0.0])
def test_t_few_losses_are_those_of_a_loop_over_choices(bench, length_norm):
    case = make_case(
        VariantConfig(adapter="x"),
        make_source(replace(MHR, policy="straight_through")),
        loss="t_few",
        mc_weight=0.25,
        ul_weight=3.0,
        length_norm=length_norm,
        **PROTOCOL,
    )
    for number, found in enumerate(first_step(bench, case)):
        alone = Alone(case, number)
        right, wrong, ranked = [], [], []
        rows = case.members[number].data.batch(0)
        for row in rows:
            scores = []
            for choice in range(len(row.answers)):
                logits, labels = alone.logits(row, choice)
                nll = F.cross_entropy(logits.double(), labels, reduction="none").tolist()
                scores.append(sum(nll) / len(nll) ** length_norm)
                if choice == row.label:
                    right += nll
                else:
                    wrong += [-math.log(1.0 - math.exp(-value) + 0.01) for value in nll]
            weights = [math.exp(-score) for score in scores]
            ranked.append(-math.log(weights[row.label] / sum(weights)))
        lm, mc, ul = (sum(part) / len(part) for part in (right, ranked, wrong))
        assert found["lm"] == pytest.approx(lm, rel=1e-5)
        assert found["mc"] == pytest.approx(mc, rel=1e-4, abs=1e-5)
        assert found["ul"] == pytest.approx(ul, rel=1e-4, abs=1e-5)
        assert found["loss"] == pytest.approx(lm + 0.25 * mc + 3.0 * ul, rel=1e-5)


def test_rows_may_have_other_numbers_of_choices(bench):
    """A job whose rows have two choices or three beside one whose rows all have three."""
    config = make_config(loss="t_few", **PROTOCOL)
    members = []
    for name in ("mixed", "even"):
        task = make_task(name)
        if name == "mixed":
            two = [
                replace(row, choices=(row.targets[0], row.input), label=0)
                for row in task.train[::2]
            ]
            task = replace(task, train=(*two, *task.train[1::2]))
        data = open_data(make_few_shot(task), config, tokenizer(), GATED)
        members.append(Member(Job(task=name, seed=0, variant="v"), data, 15))
    case = Case(config, make_source(), members)
    assert {len(row.answers) for row in members[0].data.batch(0)} == {2, 3}
    together = first_step(bench, case)
    for number in range(2):
        alone = bench.step(case.open([number])).of(0)
        assert together[number] == pytest.approx(alone, rel=1e-5)


def test_t_few_loss_of_a_task_without_choices_is_the_likelihood_of_its_targets(bench):
    plain = make_task("plain")
    train = tuple(replace(row, choices=(), label=None) for row in plain.train)
    plain = replace(plain, train=train)
    values = {}
    for loss in ("t_few", "language_model"):
        config = make_config(loss=loss, **PROTOCOL)
        members = [
            Member(
                Job(task=task.name, seed=0, variant="v"),
                open_data(make_few_shot(task), config, tokenizer(), GATED),
                15,
            )
            for task in (plain, make_task("ranked"))
        ]
        values[loss] = first_step(bench, Case(config, make_source(), members))
    found, expected = values["t_few"][0], values["language_model"][0]
    assert (found["mc"], found["ul"]) == (0.0, 0.0)
    assert found["loss"] == found["lm"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert values["t_few"][1]["ul"] != 0.0


def test_the_norm_of_a_job_s_gradient_is_its_own_before_clipping(bench):
    case = make_case(VariantConfig(adapter="x"), make_source(), **PROTOCOL)
    for number, found in enumerate(first_step(bench, case)):
        wave = case.open()
        alone = Alone(case, number)
        rows = wave.members[number].data.batch(0)
        alone.adapter.zero_grad()
        for row in rows:
            labels = torch.tensor(row.answers[0], dtype=torch.long)[None]
            with alone.adapter.slots([0]) as slots:
                loss = alone.model(input_ids=torch.tensor(row.input_ids)[None], labels=labels).loss
                count = sum(len(row.answers[0]) for row in rows)
                slots.backward(loss * labels.numel() / count)
        squares = sum(p.grad.double().square().sum().item() for p in alone.adapter.parameters())
        assert found["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)
        assert found["grad_norm"] > 1.0
