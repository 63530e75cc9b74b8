"""Rows that find their slots by ranges, or under a mask: token by token, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhr_scale.adapters import row_map
from mhr_scale.adapters.by_slot import EVEN, BySlot, Even, Masked, Spans
from mhr_scale.adapters.products import Cut, products, scale, update
from mhr_scale.adapters.row_map import RowMap
from mhr_scale.families.sequences import Stream

OPEN = Cut(is_open=True)
N_IN, N_OUT = 6, 5


@dataclass(frozen=True)
class Tokens:
    """The slot of each row of a sequence, its tokens, and tokens behind all of them."""

    slots: tuple[int, ...]
    counts: tuple[int, ...]
    n_slots: int
    n_behind: int = 0

    @property
    def n_tokens(self) -> int:
        return sum(self.counts) + self.n_behind

    @property
    def slot_of_token(self) -> list[int | None]:
        owned = [s for s, n in zip(self.slots, self.counts, strict=True) for _ in range(n)]
        return [*owned, *[None] * self.n_behind]

    def map(self, **options: bool) -> RowMap:
        streams = (Stream(self.counts, self.n_tokens),)
        return RowMap(slot_of_row=self.slots, n_slots=self.n_slots, streams=streams, **options)


TOKENS = {
    "even": Tokens((0, 1, 2), (4, 4, 4), 3),
    "ragged": Tokens((0, 1, 2), (3, 7, 1), 3),
    "two rows of a slot": Tokens((0, 0, 1), (3, 2, 4), 2),
    "a slot in two places": Tokens((0, 1, 0, 2, 1), (3, 2, 4, 1, 5), 3),
    "a row without tokens": Tokens((0, 1, 0), (3, 0, 2), 2),
    "a slot without tokens": Tokens((0, 1, 2), (3, 0, 4), 3),
    "tokens behind": Tokens((1, 0), (3, 4), 2, n_behind=5),
    "one slot, tokens behind": Tokens((0, 0), (3, 4), 1, n_behind=2),
}
#: Which of the linears that share x are adapted.
SIBLINGS = {"alone": (True,), "one without": (True, False, True)}


@pytest.fixture(params=TOKENS, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def tokens(request) -> Tokens:
    return TOKENS[request.param]


@pytest.fixture(params=SIBLINGS, ids=lambda name: name.replace(" ", "-"))
def has_pair(request) -> tuple[bool, ...]:
    return SIBLINGS[request.param]


def ways_of(tokens: Tokens, x: Tensor) -> dict[str, BySlot]:
    """Every way these tokens can take."""
    spans = Spans(tokens.map()._spans(tokens.n_tokens), tokens.n_tokens)
    ways: dict[str, BySlot] = {"spans": spans}
    if tokens.n_slots > 1:
        slots = torch.tensor([-1 if slot is None else slot for slot in tokens.slot_of_token])
        mask = (slots[:, None, None] == torch.arange(tokens.n_slots)[:, None]).to(x)
        ways["masked"] = Masked(spans.spans, tokens.n_tokens, mask)
    if tokens.map().by_slot(x) is EVEN:
        ways["even"] = EVEN
    return ways


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def make(
    tokens: Tokens, rank: int, has_pair: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """x (1, N, I), A, the Bs and the frozen weights."""
    torch.manual_seed(0)
    lead = (tokens.n_slots,) if tokens.n_slots > 1 else ()
    a_UIX = draw(*lead, N_IN, rank * sum(has_pair))
    pairs = [draw(*lead, rank, N_OUT) if has else None for has in has_pair]
    weights = [draw(N_OUT, N_IN).detach() for _ in has_pair]
    return draw(1, tokens.n_tokens, N_IN), a_UIX, pairs, weights


def plain(
    tokens: Tokens, x: Tensor, a_UIX: Tensor, pairs: Sequence[Tensor | None], weights: list[Tensor]
) -> list[Tensor]:
    """One token after the other; one without a slot has the frozen products alone."""
    sides = [side if side is None or side.dim() == 3 else side[None] for side in (a_UIX, *pairs)]
    rank = next(b.shape[-2] for b in pairs if b is not None)
    found: list[list[Tensor]] = [[] for _ in weights]
    for token, slot in zip(x[0], tokens.slot_of_token, strict=True):
        at = 0
        for of_linear, weight, b in zip(found, weights, sides[1:], strict=True):
            y = weight @ token
            if b is not None:
                if slot is not None:
                    y = y + (token @ sides[0][slot][:, at : at + rank]) @ b[slot]
                at += rank
            of_linear.append(y)
    return [torch.stack(of_linear)[None] for of_linear in found]


def with_gradients(ys: Sequence[Tensor], leaves: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs, and the gradients of what they are made from."""
    loss = sum((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in ys)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [*(y.detach() for y in ys), *torch.autograd.grad(loss, wanted)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(found), list(expected), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 4])
def test_products_and_gradients_are_those_of_each_token(tokens, has_pair, rank):
    x, a_UIX, pairs, weights = make(tokens, rank, has_pair)
    leaves = x, a_UIX, *pairs
    expected = with_gradients(plain(tokens, x, a_UIX, pairs, weights), leaves)
    for by in ways_of(tokens, x).values():
        ys = products(x, a_UIX, pairs, [(weight, None) for weight in weights], by=by, cut=OPEN)
        close(with_gradients(ys, leaves), expected)
        made = [F.linear(x, weight) for weight in weights]
        close(with_gradients(update(x, a_UIX, pairs, made, by=by, cut=OPEN), leaves), expected)


def test_an_output_that_nobody_uses_has_no_part_in_the_gradients(tokens):
    x, a_UIX, pairs, weights = make(tokens, 2, (True, True))
    leaves = x, a_UIX, pairs[0]
    expected = with_gradients(plain(tokens, x, a_UIX, pairs, weights)[:1], leaves)
    for by in ways_of(tokens, x).values():
        ys = products(x, a_UIX, pairs, [(weight, None) for weight in weights], by=by, cut=OPEN)
        close(with_gradients(ys[:1], leaves), expected)


def test_scaling_is_that_of_each_token(tokens):
    torch.manual_seed(0)
    y = draw(1, tokens.n_tokens, N_OUT)
    l_UO = draw(*((tokens.n_slots,) if tokens.n_slots > 1 else ()), N_OUT)
    vectors = l_UO.view(-1, N_OUT)
    plainly = torch.stack(
        [
            token if slot is None else token * vectors[slot]
            for token, slot in zip(y[0], tokens.slot_of_token, strict=True)
        ]
    )[None]
    expected = with_gradients([plainly], (y, l_UO))
    ways = ways_of(tokens, y)
    for by in ways.values():
        close(with_gradients([scale(y, l_UO, by=by, cut=OPEN)], (y, l_UO)), expected)
    small, of_slots = y.detach().bfloat16(), l_UO.detach().float()
    for by in ways.values():  # rounded once, from the product in float32
        scaled = scale(small, of_slots, by=by, cut=OPEN)
        assert scaled.dtype == torch.bfloat16
        owned = [n for n, slot in enumerate(tokens.slot_of_token) if slot is not None]
        slots = [slot for slot in tokens.slot_of_token if slot is not None]
        rounded = (small[0, owned] * of_slots.view(-1, N_OUT)[slots]).bfloat16()
        assert torch.equal(scaled[0, owned], rounded)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("n_siblings", [1, 2, 3])
@pytest.mark.parametrize("counts", [(15, 34, 23), (24, 24, 24)], ids=["ragged", "even"])
def test_spans_give_a_slot_the_bits_that_it_has_alone(counts, n_siblings, rank):
    if rank == 1 and len(set(counts)) == 1:
        pytest.skip("waves have ranks of two or more: a batched product of one column rounds apart")
    torch.manual_seed(0)
    n_in, n_out = 64, 48
    n_tokens = sum(counts)
    x, g = torch.randn(1, n_tokens, n_in), torch.randn(1, n_tokens, n_out)
    a_UIX = torch.randn(3, n_in, rank * n_siblings)
    pairs = [torch.randn(3, rank, n_out) for _ in range(n_siblings)]
    frozen = [(torch.randn(n_out, n_in), None) for _ in range(n_siblings)]

    def run(x, g, a, pairs, slots, counts):
        rows = RowMap(
            slot_of_row=slots,
            n_slots=len(slots),
            streams=(Stream(counts, x.shape[1]),),
            is_exact=True,
        )
        x, a, *pairs = (tensor.clone().requires_grad_() for tensor in (x, a, *pairs))
        by = rows.by_slot(x, n_columns=rank)
        ys = products(x, a, pairs, frozen, by=by, cut=OPEN)
        found = torch.autograd.grad(ys, (x, a, *pairs), [g] * n_siblings)
        return [*(y.detach() for y in ys), *found]

    together = run(x, g, a_UIX, pairs, (0, 1, 2), counts)
    start = 0
    for slot, count in enumerate(counts):
        own = slice(start, start + count)
        sides = a_UIX[slot], [b[slot] for b in pairs]
        alone = run(x[:, own], g[:, own], *sides, (0,), (count,))
        for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
            part = found[:, own] if number <= n_siblings else found[slot]  # by token, or by slot
            assert torch.equal(part, expected), number
        start += count


# -- which way -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "is_exact", "way"),
    [(4, False, Even), (8, False, Even), (4, True, Spans), (8, True, Even)],
)
def test_equally_many_tokens_of_each_slot_need_no_ranges(length, is_exact, way):
    tokens = Tokens((0, 1, 2), (length,) * 3, 3)
    assert type(tokens.map(is_exact=is_exact).by_slot(x_of(tokens))) is way
    unordered = Tokens((0, 2, 1), (length,) * 3, 3)
    assert type(unordered.map(is_exact=is_exact).by_slot(x_of(tokens))) is Spans


def x_of(tokens: Tokens, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, tokens.n_tokens, N_IN, dtype=dtype)


def test_one_product_of_all_slots_is_taken_up_to_a_number_of_columns(monkeypatch):
    tokens = TOKENS["a slot in two places"]
    x, n_spans = x_of(tokens), 5
    # numbers of x times the hidden columns of all three slots, for each span
    monkeypatch.setitem(row_map.MOST_MASKED, x.dtype, x.numel() * 3 * 4 / n_spans)
    assert type(tokens.map().by_slot(x, n_columns=4)) is Masked
    assert type(tokens.map().by_slot(x, n_columns=5)) is Spans
    assert type(tokens.map().by_slot(x)) is Spans
    assert type(tokens.map(is_exact=True).by_slot(x, n_columns=4)) is Spans


def test_an_accelerator_has_a_bound_of_its_own(monkeypatch):
    tokens = TOKENS["ragged"]
    x = x_of(tokens).to("meta")
    assert type(tokens.map().by_slot(x, n_columns=4)) is Masked
    monkeypatch.setattr(row_map, "MOST_MASKED_ON_GPU", 0)
    assert type(tokens.map().by_slot(x, n_columns=4)) is Spans


def test_one_slot_needs_no_mask_and_rows_apart_no_ranges():
    assert type(TOKENS["one slot, tokens behind"].map().by_slot(torch.zeros(1, 9, 2))) is Spans
    padded = RowMap(slot_of_row=(0, 1), n_slots=2)
    assert padded.by_slot(torch.zeros(2, 3, N_IN), n_columns=4) is EVEN


def test_ranges_and_masks_are_made_once_a_step():
    rows = TOKENS["ragged"].map()
    ways = [
        rows.by_slot(x_of(TOKENS["ragged"], dtype), n_columns=2)
        for dtype in (torch.float32, torch.bfloat16, torch.float32)
    ]
    assert ways[0] is ways[2]
    assert [way.mask_MU1.dtype for way in ways[:2]] == [torch.float32, torch.bfloat16]
    assert ways[0].spans is ways[1].spans


def test_neighbours_of_one_slot_are_one_range():
    by = TOKENS["two rows of a slot"].map(is_exact=True).by_slot(torch.zeros(1, 9, 2))
    assert [(span.slot, span.start, span.stop) for span in by.spans] == [(0, 0, 5), (1, 5, 9)]


def test_each_sequence_of_a_pass_has_its_own_ranges():
    streams = Stream((3, 4), 7), Stream((2, 1), 5)
    rows = RowMap(slot_of_row=(0, 1), n_slots=2, streams=streams)
    for stream in streams:
        by = rows.by_slot(torch.zeros(1, stream.n_tokens, N_IN))
        assert by.n_rows == stream.n_tokens
        assert [span.stop - span.start for span in by.spans] == list(stream.counts)
        assert by.is_covering == (stream.n_tokens == 7)
