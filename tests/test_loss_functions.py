"""The language-model loss against torch's cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from mhr_scale.losses import IGNORE, Loss, language_model

N_ROWS, N_TOKENS, VOCABULARY = 3, 5, 11


@pytest.fixture(params=[0.0, 0.1], ids=["plain", "smoothed"])
def smoothing(request):
    return request.param


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3.0 * torch.randn(N_ROWS, N_TOKENS, VOCABULARY, generator=generator)


@pytest.fixture
def labels():
    """Rows of 5, 3 and 1 target tokens."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCABULARY, (N_ROWS, N_TOKENS), generator=generator)
    labels[1, 3:] = IGNORE
    labels[2, 1:] = IGNORE
    return labels


def oracle(logits, labels, smoothing, reduction):
    return F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
        reduction=reduction,
    )


def test_the_sum_of_a_row_is_its_cross_entropy(logits, labels, smoothing):
    loss = language_model(logits, labels, label_smoothing=smoothing)
    expected = [oracle(*row, smoothing, "sum") for row in zip(logits, labels, strict=True)]
    torch.testing.assert_close(loss.sum, torch.stack(expected))


def test_the_count_of_a_row_is_that_of_its_target_tokens(logits, labels, smoothing):
    loss = language_model(logits, labels, label_smoothing=smoothing)
    assert loss.count.tolist() == [5, 3, 1]


def test_sums_over_counts_are_torch_s_mean_over_tokens(logits, labels, smoothing):
    loss = language_model(logits, labels, label_smoothing=smoothing)
    mean = loss.sum.sum() / loss.count.sum()
    torch.testing.assert_close(mean, oracle(logits, labels, smoothing, "mean"))


def test_the_gradient_is_that_of_the_cross_entropy(logits, labels, smoothing):
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    language_model(ours, labels, label_smoothing=smoothing).sum.sum().backward()
    oracle(theirs, labels, smoothing, "sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_ignored_positions_get_no_gradient(logits, labels, smoothing):
    logits.requires_grad_()
    language_model(logits, labels, label_smoothing=smoothing).sum.sum().backward()
    assert not logits.grad[labels == IGNORE].any()


def test_a_row_without_targets_counts_nothing(logits, labels, smoothing):
    labels[1] = IGNORE
    loss = language_model(logits, labels, label_smoothing=smoothing)
    assert (loss.sum[1].item(), loss.count[1].item()) == (0.0, 0)


def test_smoothing_mixes_the_target_with_the_mean_over_the_vocabulary(logits, labels):
    log_p = logits.log_softmax(-1)
    target = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    tokens = 0.9 * target - 0.1 * log_p.mean(-1)
    expected = (tokens * (labels != IGNORE)).sum(1)
    found = language_model(logits, labels, label_smoothing=0.1).sum
    torch.testing.assert_close(found, expected)


def test_bfloat16_logits_are_summed_in_float32(logits, labels):
    low = logits.bfloat16()
    loss = language_model(low, labels)
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, language_model(low.float(), labels).sum)


def test_a_mean_is_sum_over_count():
    assert Loss(torch.tensor(6.0), torch.tensor(4)).mean.item() == 1.5
