"""The language-model loss against torch's cross-entropy; T-Few's against one choice at a time."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mhr_scale.families.packed import IGNORE
from mhr_scale.passes import losses
from mhr_scale.passes import losses as loss_functions
from mhr_scale.passes.losses import language_model

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_in_chunks_are_those_of_all_logits_at_once(monkeypatch, dtype, smoothing):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 7, 50, generator=generator).mul_(3).to(dtype).requires_grad_()
    labels = torch.randint(50, (3, 7), generator=generator)
    labels[1, 2:] = IGNORE
    weights = torch.rand(3, 7, generator=generator)
    found = []
    for size in (1, 100, 2**22):
        monkeypatch.setattr(losses, "CHUNK", size)
        tokens = losses.token_losses(logits, labels, label_smoothing=smoothing)
        found.append((tokens, *torch.autograd.grad((tokens * weights).sum(), logits)))
    for other in found[1:]:
        assert all(one.equal(two) for one, two in zip(found[0], other, strict=True))
    whole = logits.detach().double().requires_grad_()
    expected = oracle(whole.flatten(0, 1), labels.flatten(), smoothing, "none")
    (gradient,) = torch.autograd.grad((expected * weights.flatten()).sum(), whole)
    torch.testing.assert_close(found[0][0].flatten().double(), expected, rtol=1e-6, atol=1e-6)
    rounding = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {}
    torch.testing.assert_close(found[0][1], gradient.to(dtype), **rounding)


def test_logits_are_kept_as_they_are_and_nothing_beside_them():
    logits = torch.randn(3, 7, 50).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.token_losses(logits, torch.zeros(3, 7, dtype=torch.long))
    assert [(t.shape, t.dtype) for t in kept] == [
        ((21, 50), torch.bfloat16),
        ((21,), torch.long),
    ]


# --- T-Few's losses over packed choices

#: Lengths of the choices of each row, and which of them is right.
CHOICES = ((2, 3), (1, 4, 2), (3,), (5, 1, 1, 2))
LABELS = torch.tensor([1, 0, 0, 2])
MOST = max(map(len, CHOICES))
tfew = partial(loss_functions.tfew, n_choices=MOST)


def pack(dtype=torch.float64):
    """Logits, targets and blocks of rows whose choices stand side by side, padded at the end."""
    generator = torch.Generator().manual_seed(2)
    depth = max(sum(lengths) for lengths in CHOICES)
    logits = 3.0 * torch.randn(len(CHOICES), depth, VOCABULARY, generator=generator, dtype=dtype)
    targets = torch.full((len(CHOICES), depth), IGNORE)
    blocks = torch.full((len(CHOICES), depth), -1)
    for row, lengths in enumerate(CHOICES):
        width = sum(lengths)
        targets[row, :width] = torch.randint(0, VOCABULARY, (width,), generator=generator)
        blocks[row, :width] = torch.repeat_interleave(torch.tensor(lengths))
    return logits, targets, blocks


def unpacked(logits, targets, blocks, length_norm):
    """The losses of each row from its choices one at a time, in Python numbers."""
    log_p = logits.log_softmax(-1)
    rows = []
    for row, lengths in enumerate(CHOICES):
        tokens = [
            [log_p[row, at, targets[row, at]].item() for at in (blocks[row] == c).nonzero()[:, 0]]
            for c in range(len(lengths))
        ]
        scores = [-sum(choice) / len(choice) ** length_norm for choice in tokens]
        right = LABELS[row].item()
        wrong = [value for c, choice in enumerate(tokens) if c != right for value in choice]
        rows.append(
            {
                "scores": scores,
                "lm": (-sum(tokens[right]), len(tokens[right])),
                "mc": (scores[right] + math.log(sum(math.exp(-score) for score in scores)), 1),
                "ul": (-sum(math.log(1 - math.exp(v) + 0.01) for v in wrong), len(wrong)),
            }
        )
    return rows


@pytest.mark.parametrize("length_norm", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["lm", "mc", "ul"])
def test_a_row_s_losses_are_those_of_its_choices_one_at_a_time(name, length_norm):
    packed = pack()
    loss = getattr(tfew(*packed, LABELS, length_norm=length_norm), name)
    sums, counts = zip(*(row[name] for row in unpacked(*packed, length_norm)), strict=True)
    assert loss.sum.tolist() == pytest.approx(sums, rel=1e-12)
    assert loss.count.tolist() == list(counts)


@pytest.mark.parametrize("length_norm", [0.0, 0.7, 1.0])
def test_scores_are_those_of_the_choices_and_infinite_where_there_is_none(length_norm):
    packed = pack()
    scores = tfew(*packed, LABELS, length_norm=length_norm).scores_BC
    assert scores.shape == (4, 4)
    for found, row in zip(scores.tolist(), unpacked(*packed, length_norm), strict=True):
        n_choices = len(row["scores"])
        assert found[:n_choices] == pytest.approx(row["scores"], rel=1e-12)
        assert found[n_choices:] == [math.inf] * (4 - n_choices)


def total(losses):
    return sum(loss.sum.sum() / loss.count.sum() for loss in (losses.lm, losses.mc, losses.ul))


def test_tfew_s_gradient_is_that_of_finite_differences():
    logits, targets, blocks = pack()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total(tfew(x, targets, blocks, LABELS)), logits)


def test_padded_positions_change_nothing_and_get_no_gradient():
    logits, targets, blocks = pack()
    clean = total(tfew(logits, targets, blocks, LABELS))
    logits[blocks < 0] = 100.0
    targets[blocks < 0] = 3
    logits.requires_grad_()
    loss = total(tfew(logits, targets, blocks, LABELS))
    loss.backward()
    assert loss.item() == clean.item()
    assert not logits.grad[blocks < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("certain", [30.0, 1e4])
def test_certain_tokens_have_finite_losses_and_gradients(certain, dtype):
    """The probability of every target is 1 to rounding, of the wrong choices' tokens too."""
    logits, targets, blocks = pack(torch.float32)
    logits.scatter_(2, targets.clamp(min=0)[..., None], certain)
    logits = logits.to(dtype).requires_grad_()
    losses = tfew(logits, targets, blocks, LABELS)
    total(losses).backward()
    assert logits.grad.isfinite().all()
    per_token = losses.ul.sum.sum() / losses.ul.count.sum()
    assert per_token.item() == pytest.approx(-math.log(0.01), rel=1e-3)


def test_impossible_tokens_have_finite_gradients():
    logits, targets, blocks = pack(torch.float32)
    logits.scatter_(2, targets.clamp(min=0)[..., None], -1e4)
    logits.requires_grad_()
    losses = tfew(logits, targets, blocks, LABELS)
    total(losses).backward()
    assert logits.grad.isfinite().all()
    per_token = losses.ul.sum.sum() / losses.ul.count.sum()
    assert per_token.item() == pytest.approx(-math.log(1.01), rel=1e-3)


def test_a_row_that_is_no_number_leaves_the_others_bit_for_bit():
    logits, targets, blocks = pack(torch.float32)
    clean = logits.clone().requires_grad_()
    expected = tfew(clean, targets, blocks, LABELS)
    total(expected).backward()
    broken = logits.clone()
    broken[1, 0, 0] = math.nan
    broken.requires_grad_()
    found = tfew(broken, targets, blocks, LABELS)
    total(found).backward()
    others = [0, 2, 3]
    assert torch.equal(found.scores_BC[others], expected.scores_BC[others])
    for name in ("lm", "mc", "ul"):
        sums, wanted = getattr(found, name).sum, getattr(expected, name).sum
        assert torch.equal(sums[others], wanted[others])
        assert name == "ul" or sums[1].isnan()
    assert torch.equal(broken.grad[others], clean.grad[others])


def test_bfloat16_logits_are_scored_in_float32_and_float64_ones_in_float64():
    logits, targets, blocks = pack()
    low = logits.bfloat16()
    found = tfew(low, targets, blocks, LABELS)
    expected = tfew(low.float(), targets, blocks, LABELS)
    assert torch.equal(found.scores_BC, expected.scores_BC)
    assert found.mc.sum.dtype == torch.float32
    assert tfew(logits, targets, blocks, LABELS).ul.sum.dtype == torch.float64


def test_room_for_more_choices_than_there_are_changes_nothing():
    packed = pack()
    found, more = (tfew(*packed, LABELS, n_choices=n) for n in (MOST, MOST + 2))
    assert torch.equal(more.scores_BC[:, :MOST], found.scores_BC)
    assert more.scores_BC[:, MOST:].isinf().all()
    torch.testing.assert_close(more.mc.sum, found.mc.sum)


def test_choices_may_stand_in_any_order_and_apart():
    logits, targets, blocks = pack()
    order = torch.randperm(blocks.shape[1], generator=torch.Generator().manual_seed(3))
    moved = tfew(logits[:, order], targets[:, order], blocks[:, order], LABELS)
    torch.testing.assert_close(moved.scores_BC, tfew(logits, targets, blocks, LABELS).scores_BC)


def test_the_only_choice_of_a_row_is_right_for_certain():
    losses = tfew(*pack(), LABELS)
    assert losses.mc.sum[2].item() == 0.0
    assert (losses.ul.sum[2].item(), losses.ul.count[2].item()) == (0.0, 0)
