"""T-Few's losses against the reference, float64 to 1e-8."""

from types import SimpleNamespace

import pytest
import torch
from golden_losses import find

from mhr_scale.passes.losses import TFewLosses


@pytest.fixture
def found(losses: SimpleNamespace) -> TFewLosses:
    return find(losses)


@pytest.mark.parametrize("name", ["lm", "mc", "ul"])
def test_loss_equals_the_reference(found: TFewLosses, losses: SimpleNamespace, name: str) -> None:
    loss = getattr(found, name)
    mean = loss.sum.sum() / loss.count.sum()
    assert mean.item() == pytest.approx(losses.tensors[name].item(), rel=1e-8)


def test_scores_equal_the_reference(found: TFewLosses, losses: SimpleNamespace) -> None:
    torch.testing.assert_close(found.scores_BC, losses.tensors["scores"], rtol=1e-8, atol=1e-8)


def test_smallest_score_is_the_prediction(found: TFewLosses, losses: SimpleNamespace) -> None:
    assert torch.equal(found.scores_BC.argmin(1), losses.tensors["prediction"])
