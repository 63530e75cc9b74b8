"""What a step reads at its end: counts that crossed ranks in float32, exact, and divergence."""

import pytest
import torch
from device_steps import Training

from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
)
from mhr_scale.errors import DivergenceError
from mhr_scale.families.packed import Packed
from mhr_scale.planning.steps import Shape
from mhr_scale.training import optim
from mhr_scale.training.trainer import StepSums, Trainer

T5 = {
    "vocab_size": 32,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
#: The first whole number that float32 does not have, and more.
TOKENS, POSITIONS = 2**24 + 1, 2**30 + 3


@pytest.fixture
def steps() -> Training:
    config = PretrainConfig(
        backbone=BackboneConfig(config=T5, dtype="float32"),
        adapter=AdapterConfig(n_skills=2, rank=2),
        tasks=ToyTasks(suite="toy"),
        optim=OptimConfig(),
        schedule=ScheduleConfig(steps=10),
        run=RunConfig(folder="unused"),
    )
    shape = Shape(rows=3, width=8, depth=4, n_tasks=2)
    return Training(config, [shape, shape], torch.device("cpu"))


def read(trainer: Trainer, sums: StepSums) -> dict[str, float]:
    facts = trainer.reduce_gradients(sums)
    return trainer._read(facts, optim.gradient_norm(trainer.adapter.parameters()), sums)


def test_of_three_ranks_with_more_than_float32_can_count(
    steps: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = steps.trainer
    alone = read(trainer, trainer.accumulate(steps.micro_batches))
    trainer.optimizer.zero_grad()
    sums = trainer.accumulate(steps.micro_batches)
    sums.tokens, sums.positions, sums.padding = TOKENS, POSITIONS, 0
    sums.loss_tokens *= 2**20
    monkeypatch.setattr(trainer.engine, "world_size", 3)
    seen = []

    def reduce_sum(flat: torch.Tensor) -> torch.Tensor:
        seen.append(flat.dtype)
        return flat.mul_(3.0)

    monkeypatch.setattr(trainer.engine, "reduce_sum", reduce_sum)
    found = read(trainer, sums)
    assert seen == [torch.float32]
    assert found["tokens"] == 3 * TOKENS
    assert found["examples"] == 3 * alone["examples"]
    assert found["loss"] == pytest.approx(alone["loss"] / 2**20, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(alone["grad_norm"] / 2**20, rel=1e-5)


def test_gradients_are_divided_by_the_very_count(steps: Training) -> None:
    trainer = steps.trainer
    sums = trainer.accumulate(steps.micro_batches)
    parameters = list(trainer.adapter.inventory.parameters())
    expected = [p.grad / sums.loss_tokens for p in parameters if p.grad is not None]
    trainer.reduce_gradients(sums)
    for parameter, quotient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, quotient)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [("A", "loss is not finite in 0, 1;"), ("gradient", "the gradient is not finite though")],
)
def test_a_step_that_diverged_ends_the_run_after_its_update(
    steps: Training, monkeypatch: pytest.MonkeyPatch, spoilt: str, message: str
) -> None:
    trainer = steps.trainer
    steps.step()
    inventory = next(steps.adapter.inventory.parameters())
    if spoilt == "A":
        inventory.data.fill_(float("nan"))
    else:
        accumulate = trainer.accumulate

        def spoil(micro_batches: list[Packed]) -> StepSums:
            sums = accumulate(micro_batches)
            assert inventory.grad is not None
            inventory.grad.view(-1)[0] = float("inf")
            return sums

        monkeypatch.setattr(trainer, "accumulate", spoil)
    with pytest.raises(DivergenceError, match=f"step 2: {message}.*nothing is saved yet"):
        steps.step()
    assert trainer.step == 1
