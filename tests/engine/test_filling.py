"""Every rank reads its own range of every tensor, once, and nothing else."""

import logging
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_t5 import CARD, small_t5, tensors_of
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.filling import fill, shards_of, share
from mhr_scale.errors import EngineError

CPU = torch.device("cpu")
FIELDS = {name: value for name, value in CARD.items() if name != "model_type"}
BLUEPRINT = read_blueprint(BackboneConfig(config=FIELDS))
TENSORS = tensors_of(small_t5(), aliases=False)
ODD = 3  # elements of padding that the last ranks hold


class CountingSource:
    """Tensors in memory that count which of their elements are read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.reads: list[tuple[str, int, int]] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def file(self, name: str) -> Path | None:
        return None

    def view(self, name: str) -> Tensor | None:
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.tensors[name].numel()
        self.reads.append((name, start, stop))
        return self.tensors[name].flatten()[start:stop]

    def counts(self, name: str) -> Counter[int]:
        """How often each element of a tensor was read."""
        found: Counter[int] = Counter()
        for read, start, stop in self.reads:
            found.update(range(start, stop) if read == name else ())
        return found


def fill_from(source: CountingSource, model: nn.Module, *, rank: int | None) -> None:
    """Fill the small model."""
    fill(model, replace(BLUEPRINT, source=source), kind="none", rank=rank, device=CPU)


def sharded(n_ranks: int) -> nn.Module:
    """A model whose parameters look as under ZeRO-3; each rank's shard lies in the same place."""
    with torch.device("meta"):
        model = make_model(BLUEPRINT)
    for parameter in model.parameters():
        held = -(-parameter.numel() // n_ranks) + (ODD if n_ranks > 1 else 0)
        parameter.ds_tensor = torch.full((held,), 7.0)  # type: ignore[attr-defined]
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    return model


@pytest.fixture(scope="module", params=[1, 2, 3, 5, 8])
def filled(request: pytest.FixtureRequest) -> tuple[list[CountingSource], list[nn.Module]]:
    """What each of some ranks has read, and what it holds."""
    sources = [CountingSource(TENSORS) for _ in range(request.param)]
    models = [sharded(request.param) for _ in sources]
    for rank, (model, source) in enumerate(zip(models, sources, strict=True)):
        fill_from(source, model, rank=rank)
    return sources, models


def test_all_ranks_together_read_every_element_once(filled: Any) -> None:
    sources, _ = filled
    for name, tensor in TENSORS.items():
        read = sum((source.counts(name) for source in sources), Counter())
        assert read == Counter(range(tensor.numel())), name


def test_no_rank_reads_more_than_it_holds(filled: Any) -> None:
    for source, model in zip(*filled, strict=True):
        held = {name: p.ds_tensor.numel() for name, p in model.named_parameters()}
        assert all(stop - start <= held[name] for name, start, stop in source.reads)


def test_no_rank_reads_a_tensor_twice(filled: Any) -> None:
    for source in filled[0]:
        names = [name for name, _, _ in source.reads]
        assert len(names) == len(set(names))


def test_the_shards_of_all_ranks_are_the_whole_and_then_padding(filled: Any) -> None:
    _, models = filled
    for name, tensor in TENSORS.items():
        parts = [dict(model.named_parameters())[name].ds_tensor for model in models]
        flat = torch.cat(parts)
        assert torch.equal(flat[: tensor.numel()], tensor.flatten()), name
        assert not flat[tensor.numel() :].any()


@given(st.integers(0, 500), st.integers(1, 20), st.integers(0, 5))
def test_shares_lie_side_by_side(whole: int, n_ranks: int, padding: int) -> None:
    n_held = -(-whole // n_ranks) + padding
    shares = [share(rank, n_held, whole=whole) for rank in range(n_ranks)]
    assert shares[0][0] == 0
    assert shares[-1][1] == whole
    assert all(before[1] == after[0] for before, after in pairwise(shares))


def test_a_replicated_backbone_reads_every_tensor_once() -> None:
    source, model = CountingSource(TENSORS), small_t5()
    for parameter in model.parameters():
        parameter.data.zero_()
    fill_from(source, model, rank=None)
    assert sorted(source.reads) == sorted((name, 0, t.numel()) for name, t in TENSORS.items())
    assert torch.equal(model.lm_head.weight, TENSORS["lm_head.weight"])


def test_the_second_shards_of_a_node_are_filled_too() -> None:
    """DeepSpeed makes them from weights that nobody has read yet, and keeps them for ever."""
    model, source = sharded(4), CountingSource(TENSORS)
    for parameter in model.parameters():
        second = torch.full((-(-parameter.numel() // 2),), 7.0)
        parameter.ds_secondary_tensor = second  # type: ignore[attr-defined]
        parameter.ds_secondary_tensor_group_size = 2  # type: ignore[attr-defined]
    fill_from(source, model, rank=3)
    for name, parameter in model.named_parameters():
        second, flat = parameter.ds_secondary_tensor, TENSORS[name].flatten()  # type: ignore[attr-defined]
        rest = flat[second.numel() :]
        assert torch.equal(second[: rest.numel()], rest)


def test_quantised_shards_are_refused() -> None:
    parameter: Any = nn.Parameter(torch.zeros(4))
    parameter.ds_tensor = torch.zeros(2)
    parameter.ds_tensor.ds_quant_scale = torch.ones(1)
    with pytest.raises(EngineError, match=r"zero_quantized_nontrainable_weights: .* set it to fal"):
        shards_of(parameter, 0)


def test_reading_shows_its_bytes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhr_scale.run.runlog.ByteProgress._is_due", lambda self, now: True)
    caplog.set_level(logging.INFO, logger="mhr_scale")
    fill_from(CountingSource(TENSORS), small_t5(), rank=None)
    *shown, told = caplog.messages
    assert shown[-1].startswith("read backbone 81.2 kB of 81.2 kB  ")
    assert len(shown) == len(TENSORS)
    assert told == "backbone: 81.2 kB of weights of this process's own"
