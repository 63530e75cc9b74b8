"""Validation, ranking and T-Few's losses of packed rows: the numbers of padded ones."""

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from adapters.tiny import make_t5, randomise, tensors_of
from placed import place_model
from small_causal import small_causal
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.config import BackboneConfig, ProtocolConfig
from mhr_scale.engine.opened import PlacedBackbone
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import find_family
from mhr_scale.jobs.wave import TOKEN_MULTIPLE
from mhr_scale.passes import few_shot_loss
from mhr_scale.passes.filled import filled
from mhr_scale.passes.losses import token_losses
from mhr_scale.passes.scoring import rank_choices
from mhr_scale.passes.validation import reduce_losses

MODELS: dict[str, Any] = {"t5": make_t5, "llama": lambda: small_causal("llama")}
TASKS = ("a", "b", "c", "without rows")
MHR = AdapterConfig(n_skills=3, n_splits=4, rank=2)


@pytest.fixture(params=MODELS)
def placed(request: pytest.FixtureRequest) -> PlacedBackbone:
    model = MODELS[request.param]().requires_grad_(False)
    find_family(model.config).fuse(model, BackboneConfig(name="x"))
    return place_model(model.eval(), find_sites(model, MHR.layout))


@pytest.fixture
def adapter(placed: PlacedBackbone) -> Adapter:
    sites = find_sites(MODELS[placed.model.config.model_type](), MHR.layout)
    adapter = randomise(Adapter(MHR, sites, task_names=TASKS))
    adapter.bind(placed.adapted)
    return adapter


def make_rows(*, most_choices: int) -> list[EncodedRow]:
    draw = np.random.default_rng(1)
    return [
        EncodedRow(
            draw.integers(5, 60, draw.integers(2, 20)),
            tuple(draw.integers(5, 60, draw.integers(1, 7)) for _ in range(1 + n % most_choices)),
            label=n % most_choices,
            task=n % 3,
            number=n,
        )
        for n in range(11)
    ]


def test_validation_losses_are_equal_though_batches_have_other_rows(
    placed: PlacedBackbone, adapter: Adapter
) -> None:
    rows = make_rows(most_choices=1)
    padded, packed = (
        reduce_losses(placed, adapter, rows, max_rows=3, pad_multiple=8, is_flat=is_flat)
        for is_flat in (False, True)
    )
    assert packed["validation_loss"] == pytest.approx(padded["validation_loss"], rel=1e-6)
    assert list(packed["validation_loss_by_task"]) == ["a", "b", "c"]
    assert packed["validation_loss_by_task"] == pytest.approx(
        padded["validation_loss_by_task"], rel=1e-6
    )


def test_scores_of_choices_are_equal(placed: PlacedBackbone, adapter: Adapter) -> None:
    rows = make_rows(most_choices=4)

    def scores(adapter: Adapter | None, *, is_flat: bool) -> list[float]:
        ranked = rank_choices(placed, adapter, rows, length_norm=1.0, is_flat=is_flat)
        return [score for of_row in ranked for score in of_row]

    padded = scores(adapter, is_flat=False)
    assert scores(adapter, is_flat=True) == pytest.approx(padded, rel=2e-6)
    with adapter.off():
        bare = scores(None, is_flat=False)
        assert scores(None, is_flat=True) == pytest.approx(bare, rel=2e-6)
    assert padded != pytest.approx(bare, rel=1e-3)


def test_t_few_s_losses_and_their_gradients_are_equal(
    placed: PlacedBackbone, adapter: Adapter
) -> None:
    rows = make_rows(most_choices=3)
    counts = few_shot_loss.count(rows, ProtocolConfig(loss="t_few"))
    found = []
    for is_flat in (False, True):
        packed = placed.pack(rows, is_flat=is_flat, token_multiple=300)
        assert (packed.flat is not None) == is_flat
        adapter.zero_grad()
        with filled(adapter, packed) as slots:
            parts = few_shot_loss.forward(
                ProtocolConfig(loss="t_few"),
                placed,
                packed,
                lambda name, loss: loss.sum.sum() / counts[name],
            )
            slots.backward(parts["loss"])
        found.append(({n: p.item() for n, p in parts.items()}, tensors_of(adapter, gradients=True)))
    (padded, expected), (flat, gradients) = found
    assert set(padded) == {"loss", "lm", "mc", "ul"}
    assert flat == pytest.approx(padded, rel=1e-6, abs=1e-7)  # ul of a sure token is near 0
    for name, gradient in expected.items():
        assert torch.allclose(
            gradients[name], gradient, rtol=0.0, atol=1e-5 * float(gradient.abs().max())
        )


def test_jobs_have_the_bits_that_they_have_alone(placed: PlacedBackbone, adapter: Adapter) -> None:
    config = AdapterConfig(n_skills=3, n_splits=4, rank=2, private=True)
    names, sites = ("one", "two", "three"), adapter.sites
    wave = randomise(Adapter(config, sites, task_names=names, is_wave=True))
    draw = np.random.default_rng(2)

    def run(adapter: Adapter, rows: list[EncodedRow]) -> tuple[Tensor, dict[str, Tensor]]:
        adapter.bind(placed.adapted)
        adapter.zero_grad()
        packed = placed.pack(rows, is_flat=True, at_least=(24, 16), token_multiple=TOKEN_MULTIPLE)
        with filled(adapter, packed) as slots:
            losses = token_losses(placed.predictions(packed), packed.labels_BD, packed.sources)
            slots.backward(losses.sum())
        return losses.detach(), tensors_of(adapter, gradients=True)

    def make_job(job: int) -> list[EncodedRow]:
        lengths = draw.integers((2, 1), (20, 8), (3, 2))
        return [
            EncodedRow(draw.integers(5, 60, n), (draw.integers(5, 60, m),), task=job)
            for n, m in lengths
        ]

    for _ in range(4):
        jobs = [make_job(job) for job in range(len(names))]
        losses, gradients = run(wave, list(chain(*jobs)))
        for job, rows in enumerate(jobs):
            single = Adapter(config, sites, task_names=names[job : job + 1], is_wave=True)
            for name, tensor in single.named_parameters():
                tensor.data.copy_(take(wave.get_parameter(name).data, like=tensor, job=job))
            alone, own = run(single, [replace(row, task=0) for row in rows])
            assert torch.equal(losses[3 * job : 3 * job + 3], alone)
            for name, gradient in own.items():
                assert torch.equal(take(gradients[name], like=gradient, job=job), gradient), name


def take(tensor: Tensor, *, like: Tensor, job: int) -> Tensor:
    """What is one job's of a tensor of three."""
    axis = next(
        n for n, pair in enumerate(zip(tensor.shape, like.shape, strict=True)) if pair == (3, 1)
    )
    return tensor.narrow(axis, job, 1)
