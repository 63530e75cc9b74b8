"""Sequences that a user packed: a token reads the slot of the example it belongs to."""

import pytest
import torch
from small_causal import small_causal
from tiny import make_linear, make_t5, randomise, tensors_of
from torch import Tensor

from mhr_scale import AdapterConfig, Stream, attach
from mhr_scale.errors import AdapterError
from mhr_scale.families.sequences import Stream as DefinedStream

MHR = AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=4)
TASKS = ("copy", "sort")
COUNTS = (5, 9, 4, 6)
OWNERS = ("copy", "sort", "sort", "copy")


def make_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (count,), generator=generator) for count in COUNTS]


def packed(rows: list[Tensor], n_behind: int) -> dict[str, Tensor]:
    """One sequence, as transformers tells its rows apart: by positions that start anew."""
    ids = torch.cat([*rows, torch.zeros(n_behind, dtype=torch.long)])[None]
    ends = [len(row) for row in rows] + [n_behind] * bool(n_behind)
    positions = torch.cat([torch.arange(end) for end in ends])[None]
    labels = ids.masked_fill(positions == 0, -100)  # nothing predicts the first of a row
    labels[:, sum(COUNTS) :] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def test_the_name_is_public():
    assert Stream is DefinedStream


@pytest.mark.parametrize("n_behind", [0, 3])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_packed_sequence_trains_as_its_rows_one_by_one(kind, n_behind):
    model = small_causal("llama").double()
    settings = {"kind": kind, "rank": 2, "n_skills": 3, "n_splits": 4, "layout": "full"}
    adapter = randomise(attach(model, AdapterConfig(**settings), tasks=TASKS))
    rows = make_rows()
    total = 0.0
    for row, owner in zip(rows, OWNERS, strict=True):
        with adapter.slots([owner]) as slots:
            loss = model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1)
            slots.backward(loss)
        total += loss.item()
    expected = tensors_of(adapter, gradients=True)
    adapter.zero_grad()
    stream = Stream(COUNTS, n_tokens=sum(COUNTS) + n_behind)
    with adapter.slots(OWNERS, tokens=[stream]) as slots:
        loss = model(**packed(rows, n_behind), use_cache=False).loss * (sum(COUNTS) - len(rows))
        slots.backward(loss)
    assert loss.item() == pytest.approx(total, rel=1e-6)  # transformers' loss is in float32
    found = tensors_of(adapter, gradients=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([((5, 9), 14)], "tokens of 2 examples, 14 of 14, for 3 task ids"),
        ([((5, 9, 4), 17)], "tokens of 3 examples, 18 of 17, for 3 task ids"),
        ([((5, 9, 4), 18), ((1, 2), 3)], "tokens of 2 examples, 3 of 3, for 3 task ids"),
        ([((5, 9, 4), 18), ((9, 4, 5), 18)], r"sequences of \[18, 18\] tokens .* make one of them"),
    ],
)
def test_counts_that_are_not_those_of_the_examples_are_refused(streams, message):
    adapter = make_linear(MHR, n_in=8, n_out=8)
    with pytest.raises(AdapterError, match=message):
        adapter.slots(("copy", "sort", "copy"), tokens=[Stream(*stream) for stream in streams])


def test_two_sequences_of_one_pass_are_told_by_their_length():
    adapter = make_linear(MHR, n_in=8, n_out=8)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    streams = [Stream((3, 6), 9), Stream((2, 2), 4)]
    with torch.no_grad(), adapter.slots(("copy", "sort"), tokens=streams):
        long, short = adapter.linears[0](x), adapter.linears[0](x[:, 2:6])
    apart = []
    for owner, rows in (("copy", x[:, :4]), ("sort", x[:, 3:])):
        with torch.no_grad(), adapter.slots([owner]):
            apart.append(adapter.linears[0](rows))
    copy, sort = apart
    torch.testing.assert_close(long, torch.cat([copy[:, :3], sort], 1))
    torch.testing.assert_close(short, torch.cat([copy[:, 2:4], sort[:, 1:3]], 1))


def test_a_linear_that_sees_another_number_of_tokens_is_named():
    model = make_t5()
    adapter = attach(model, MHR, tasks=TASKS)
    ids = torch.arange(2, 9)[None]
    with (
        pytest.raises(
            AdapterError,
            match=r"encoder\.block\.0\..*\.q got 7 tokens under slots made "
            r"for 2 examples in a sequence of 6 or 4; give `tokens` for every sequence",
        ),
        adapter.slots(TASKS, tokens=[Stream((2, 4), 6), Stream((2, 2), 4)]),
    ):
        model(input_ids=ids, labels=ids)
