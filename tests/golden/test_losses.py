"""T-Few's losses against the reference, float64 to 1e-8."""

from types import SimpleNamespace

import pytest
import torch

from mhr_scale.families.packed import IGNORE
from mhr_scale.passes.losses import TFewLosses, tfew


@pytest.fixture
def found(losses: SimpleNamespace) -> TFewLosses:
    """The losses of the same choices side by side: (B, C, L) as (B, C * L), padding in between."""
    choices_BCL = losses.tensors["choices"]
    blocks_C1 = torch.arange(choices_BCL.shape[1]).unsqueeze(-1)
    is_padding_BCL = choices_BCL == losses.meta["pad_id"]
    return tfew(
        losses.tensors["logits"].flatten(1, 2),
        choices_BCL.masked_fill(is_padding_BCL, IGNORE).flatten(1),
        torch.where(is_padding_BCL, -1, blocks_C1).flatten(1),
        losses.tensors["labels"],
        n_choices=choices_BCL.shape[1],
        length_norm=losses.meta["length_norm"],
    )


@pytest.mark.parametrize("name", ["lm", "mc", "ul"])
def test_loss_equals_the_reference(found: TFewLosses, losses: SimpleNamespace, name: str) -> None:
    loss = getattr(found, name)
    mean = loss.sum.sum() / loss.count.sum()
    assert mean.item() == pytest.approx(losses.tensors[name].item(), rel=1e-8)


def test_scores_equal_the_reference(found: TFewLosses, losses: SimpleNamespace) -> None:
    torch.testing.assert_close(found.scores_BC, losses.tensors["scores"], rtol=1e-8, atol=1e-8)


def test_smallest_score_is_the_prediction(found: TFewLosses, losses: SimpleNamespace) -> None:
    assert torch.equal(found.scores_BC.argmin(1), losses.tensors["prediction"])
