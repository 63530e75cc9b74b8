"""Sequences of rows laid flat: where their tokens stand, spread and gathered, and gradients."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor

from mhr_scale.families import flat, sequences
from mhr_scale.families.flat import Flat
from mhr_scale.families.sequences import SpreadStream

#: Rows with padding on the right, on the left, in between; one without a token; full ones.
MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    "left": [[0, 0, 1], [0, 1, 1], [1, 1, 1]],
    "between": [[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]],
    "an empty row": [[1, 1], [0, 0], [1, 0]],
    "full": [[1, 1, 1], [1, 1, 1]],
}
N_HEADS, WIDTH = 2, 3


@pytest.fixture(params=MASKS, ids=lambda name: name.replace(" ", "-"))
def mask(request) -> np.ndarray:
    return np.array(MASKS[request.param], dtype=bool)


@pytest.fixture(params=[0, 4], ids=["no-more", "four-behind"])
def stream(request, mask) -> SpreadStream:
    multiple = int(mask.sum()) + request.param if request.param else 1
    return SpreadStream.of(mask, multiple=multiple)


def heads_of(stream: SpreadStream) -> Tensor:
    """(1, H, N, D), each number another one."""
    numbers = torch.arange(N_HEADS * stream.n_tokens * WIDTH, dtype=torch.float64)
    return numbers.view(1, N_HEADS, stream.n_tokens, WIDTH) + 1.0


def test_tokens_are_counted_by_row(mask, stream):
    assert stream.counts == tuple(mask.sum(1))
    assert stream.n_tokens - sum(stream.counts) in (0, 4)
    assert stream.shape == mask.shape


def test_it_is_filled_up_to_a_multiple_and_never_to_the_length_of_another(mask):
    n = int(mask.sum())
    lengths = [
        SpreadStream.of(mask, multiple=4, other_than=other).n_tokens
        for other in (None, n, -(-n // 4) * 4)
    ]
    assert lengths[0] == lengths[1] - 4 * (n % 4 == 0) == lengths[2] - 4 == -(-n // 4) * 4


def test_an_array_is_taken_row_by_row_with_zeros_behind(mask, stream):
    numbers = np.arange(1, mask.size + 1).reshape(mask.shape)
    taken = sequences.take(numbers, mask, stream.n_tokens)
    assert taken.shape == (1, stream.n_tokens)
    n = int(mask.sum())
    assert taken[0, :n].tolist() == numbers[mask].tolist()
    assert not taken[0, n:].any()


def test_every_token_is_spread_to_its_place(mask, stream):
    heads = heads_of(stream)
    (spread,) = stream.spread(heads)
    assert spread.shape == (mask.shape[0], N_HEADS, mask.shape[1], WIDTH)
    found = spread.transpose(1, 2)[torch.from_numpy(mask)]  # (n, H, D)
    torch.testing.assert_close(found, heads[0].transpose(0, 1)[: int(mask.sum())])
    assert bool(spread.isfinite().all())  # padding has numbers of some token: masks hide them


def test_what_is_gathered_is_what_was_spread_with_zeros_behind(mask, stream):
    heads = heads_of(stream)
    gathered = stream.gather([part.transpose(1, 2) for part in stream.spread(heads)])
    assert gathered.shape == (1, stream.n_tokens, N_HEADS, WIDTH)
    n = int(mask.sum())
    assert torch.equal(gathered[:, :n], heads.transpose(1, 2)[:, :n])
    assert not gathered[:, n:].any()


def test_gradients_come_from_their_tokens_alone(mask, stream):
    heads = heads_of(stream).requires_grad_()
    places = torch.from_numpy(mask)
    weights = torch.linspace(-1, 2, mask.size * N_HEADS * WIDTH, dtype=torch.float64)
    weights = weights.view(*mask.shape, N_HEADS, WIDTH) * places[..., None, None]

    def spread(heads: Tensor) -> Tensor:
        (spread,) = stream.spread(heads)
        return (spread.transpose(1, 2) * weights).sum()

    (gradient,) = torch.autograd.grad(spread(heads), heads)
    n = int(mask.sum())
    assert torch.equal(gradient[0, :, :n].transpose(0, 1), weights[places])
    assert not gradient[0, :, n:].any()
    rectangle = torch.randn(*mask.shape, N_HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda heads: stream.gather([heads]), (rectangle,))


def test_spread_refuses_second_derivatives():
    stream = SpreadStream.of(np.array(MASKS["right"], dtype=bool))
    heads = heads_of(stream).requires_grad_()
    (first,) = torch.autograd.grad(stream.spread(heads)[0].square().sum(), heads, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# -- rows of like lengths -------------------------------------------------------------------------


def test_rows_are_grouped_with_those_of_three_quarters_of_their_length_or_more():
    assert sequences.group_alike([8, 3, 6, 100, 76, 5, 8]) == [[3, 4], [0, 2, 6], [5], [1]]
    assert sequences.group_alike([4, 4]) == [[0, 1]]


GROUPS = [[1], [0, 2]]


@pytest.fixture(params=[False, True], ids=["no-more", "behind"])
def parted(request) -> tuple[np.ndarray, SpreadStream]:
    """Three rows of 20 columns, of which the first and the last have few tokens, in the middle."""
    mask = np.zeros((3, 20), dtype=bool)
    mask[0, 9:12], mask[1], mask[2, 10:13] = True, True, True
    return mask, SpreadStream.of(mask, multiple=64 if request.param else 1, groups=GROUPS)


def test_each_group_has_a_rectangle_of_its_own_columns(parted):
    mask, stream = parted
    heads = heads_of(stream)
    parts = stream.spread(heads)
    assert [part.shape for part in parts] == [(1, 2, 20, 3), (2, 2, 8, 3)]
    start = np.cumsum([0, *stream.counts])
    for part, rows in zip(parts, GROUPS, strict=True):
        first, stop = (0, 20) if rows == [1] else (9, 17)
        for of_row, row in zip(part.transpose(1, 2), rows, strict=True):
            own = torch.from_numpy(mask[row, first:stop])
            expected = heads[0, :, start[row] : start[row + 1]].transpose(0, 1)
            torch.testing.assert_close(of_row[own], expected)
    gathered = stream.gather([part.transpose(1, 2) for part in parts])
    n = int(mask.sum())
    assert torch.equal(gathered[:, :n], heads.transpose(1, 2)[:, :n])
    assert not gathered[:, n:].any()


def test_gradients_of_all_rectangles_come_from_their_tokens(parted):
    _, stream = parted
    heads = torch.randn(1, 2, stream.n_tokens, 3, dtype=torch.float64, requires_grad=True)

    def through(heads: Tensor) -> Tensor:
        parts = [part.transpose(1, 2) for part in stream.spread(heads)]
        return stream.gather([part * (n + 2.0) for n, part in enumerate(parts)])

    assert torch.autograd.gradcheck(through, (heads,))


def test_masks_are_cut_to_the_rectangles_once(parted):
    _, stream = parted
    used = Flat((stream,))
    whole = torch.arange(3 * 20 * 20.0).view(3, 1, 20, 20)
    pieces = used.masks_of(whole, stream, stream)
    assert torch.equal(pieces[0], whole[[1]])
    assert torch.equal(pieces[1], whole[[0, 2]][:, :, 9:17, 9:17])
    again = used.masks_of(whole.detach(), stream, stream)  # as recomputation hands it on
    assert all(one is other for one, other in zip(pieces, again, strict=True))
    of_keys = torch.arange(3 * 20.0).view(3, 1, 1, 20)
    assert torch.equal(used.masks_of(of_keys, stream, stream)[1], of_keys[[0, 2], :, :, 9:17])
    assert used.masks_of(None, stream, stream) == [None, None]


# -- what is in use -------------------------------------------------------------------------------


SEEN = []


def attention(module, query, key, value, *args, **kwargs):
    """Keep the shapes of what it sees; q as (B, L, H, D)."""
    SEEN.append((query.shape, key.shape, value.shape, *args, kwargs))
    return query.transpose(1, 2), None


def test_attention_sees_rows_apart_inside_the_block_and_as_they_come_outside():
    mask = np.array(MASKS["left"], dtype=bool)
    of_q, of_k = SpreadStream.of(mask), SpreadStream.of(mask[:, :2], multiple=9)
    q, k = heads_of(of_q), heads_of(of_k)
    attend = flat.apart(attention)
    assert flat.in_use() is None
    with Flat((of_q, of_k)) as used:
        assert flat.in_use() is used
        found, _ = attend(None, q, k, k, None, scaling=2.0)
    spread, narrow = (3, N_HEADS, 3, WIDTH), (3, N_HEADS, 2, WIDTH)
    assert SEEN.pop() == (spread, narrow, narrow, None, {"scaling": 2.0})
    assert torch.equal(found, q.transpose(1, 2))
    assert flat.in_use() is None
    attend(None, q, k, k, None)
    assert SEEN.pop() == (q.shape, k.shape, k.shape, None, {})


def test_the_innermost_block_is_in_use_and_ends_with_an_error_too():
    one, two = (Flat((SpreadStream.of(np.ones((1, n), dtype=bool)),)) for n in (2, 3))
    with one:
        with suppress(ValueError), two:
            assert flat.in_use() is two
            raise ValueError
        assert flat.in_use() is one
    assert flat.in_use() is None


def test_sequences_of_one_length_cannot_be_told_apart():
    stream = SpreadStream.of(np.ones((1, 3), dtype=bool))
    with pytest.raises(AssertionError):
        Flat((stream, stream))
