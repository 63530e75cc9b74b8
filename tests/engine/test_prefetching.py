"""Mapped weights are asked for before they are used, in the order of a pass, and never twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_t5 import small_t5, tensors_of, write_folder
from torch import Tensor

from mhr_scale.backbone import mapped_file
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.mapped_file import MappedFile, is_mapped, read_ahead, release
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import prefetching
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.prefetching import choose_dropped

#: Two blocks a stack, then the head.
PARTS = [
    "encoder.block.0",
    "encoder.block.1",
    "decoder.block.0",
    "decoder.block.1",
    "lm_head",
]


class Recorder:
    """A placed model whose parts tell when they run, and what was asked for before."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        config = BackboneConfig(name=str(folder), dtype="float32", **settings)
        self.asked: list[str] = []
        self.missing: list[str] = []
        monkeypatch.setattr(prefetching, "read_ahead", self._ask)
        model = Engine({}, timeout_seconds=60).build(config, read_blueprint(config))
        self.model: Any = model
        self.owners = {
            weight.data_ptr(): part
            for part in PARTS
            for weight in model.get_submodule(part).parameters()
        }
        self.since_turn: set[str] = set()
        for part in PARTS:
            model.get_submodule(part).register_forward_hook(self._ran(part))

    def _ask(self, weights: list[Tensor]) -> None:
        if not weights:
            return
        (part,) = {self.owners[weight.data_ptr()] for weight in weights}
        if not self.asked or self.asked[-1] != part:
            self.asked.append(part)
        self.since_turn.add(part)

    def _ran(self, part: str) -> Any:
        def ran(module: Any, inputs: Any, output: Any) -> None:
            if part not in self.since_turn:
                self.missing.append(part)

        return ran

    def run(self, *, needs_gradient: bool) -> Any:
        """One pass; with a gradient at the first block's input, where backward has to go."""
        x = torch.ones(1, 3, dtype=torch.int64)
        hook = self.model.encoder.embed_tokens.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(needs_gradient)
        )
        output = self.model(input_ids=x, decoder_input_ids=x, use_cache=False).logits
        hook.remove()
        return output.sum()


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "LEAST", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "backbone", tensors_of(small_t5(), aliases=False), kind="safetensors"
    )


def test_a_pass_forward_asks_for_each_part_once_before_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(folder, monkeypatch)
    with torch.no_grad():
        recorder.run(needs_gradient=False)
    assert recorder.asked == [*PARTS, PARTS[0]]  # and then for the next pass
    assert recorder.missing == []
    with torch.no_grad():
        recorder.run(needs_gradient=False)
    assert recorder.asked == [*PARTS, *PARTS, PARTS[0]]


@pytest.mark.parametrize("recompute", ["none", "reentrant", "non_reentrant"])
def test_a_pass_backward_asks_in_the_opposite_order(
    recompute: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(folder, monkeypatch, recompute=recompute)
    recorder.model.train()
    loss = recorder.run(needs_gradient=True)
    assert recorder.asked == PARTS
    recorder.asked = []
    loss.backward()
    assert recorder.asked == PARTS[-2::-1]


def test_small_models_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    recorder = Recorder(folder, monkeypatch)
    recorder.run(needs_gradient=True).backward()
    assert recorder.asked == []


def test_copied_weights_are_not_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(folder, monkeypatch, mapped=False)
    recorder.run(needs_gradient=True).backward()
    assert recorder.asked == []


def test_reading_ahead_and_releasing_change_nothing(tmp_path: Path) -> None:
    values = torch.randn(50_000)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    view = MappedFile(tmp_path / "file").tensor(0, torch.float32, (50_000,))
    parts = [view[:0], view[7:4001], view[4001:]]
    assert all(is_mapped(part) for part in parts)
    for _ in range(2):
        assert torch.equal(view, values)
        for part in parts:
            release(part)
        assert torch.equal(view, values)
        read_ahead(parts)
        read_ahead([])
    assert not is_mapped(torch.ones(3))
    assert not is_mapped(torch.empty(2, device="meta"))


def test_a_file_that_is_mapped_no_more_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    view = MappedFile(tmp_path / "file").tensor(0, torch.float32, (2048,))
    before = len(mapped_file._FILES)
    del view
    assert len(mapped_file._FILES) == before - 1


def test_parts_that_do_not_stay_are_spread_evenly() -> None:
    sizes = [10] * 16 + [1]
    assert choose_dropped(sizes, 161) == frozenset()
    assert choose_dropped(sizes, 152) == {7}
    assert choose_dropped(sizes, 150) == {3, 11}
    assert choose_dropped(sizes, 121) == {1, 5, 9, 13}
    assert choose_dropped(sizes, -5) == set(range(17))


@pytest.mark.parametrize("n_parts", [1, 2, 7, 48])
def test_what_stays_has_room(n_parts: int) -> None:
    generator = torch.Generator().manual_seed(n_parts)
    sizes = torch.randint(1, 1000, (n_parts,), generator=generator).tolist()
    for share in range(20):
        room = sum(sizes) * share / 20
        kept = sum(size for n, size in enumerate(sizes) if n not in choose_dropped(sizes, room))
        assert kept <= room + max(sizes) / 2


def test_where_memory_is_short_blocks_are_dropped_once_they_are_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(folder, monkeypatch)
    dropped: list[str] = []
    monkeypatch.setattr(
        prefetching,
        "release",
        lambda view: dropped.append(recorder.owners[view.data_ptr()]),
    )
    recorder.run(needs_gradient=True).backward()
    assert dropped == []
    monkeypatch.setattr(prefetching, "room_for_weights", lambda: 0.0)
    recorder.run(needs_gradient=True).backward()
    assert set(dropped[: dropped.index(PARTS[0])]) == set(PARTS[2:])  # at once, but for two in use
    after_turn = dropped[len(dropped) - dropped[::-1].index(PARTS[-1]) - 1 :]
    assert list(dict.fromkeys(after_turn)) == PARTS[:0:-1]


def test_short_of_memory_a_pass_gives_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = BackboneConfig(name=str(folder), dtype="float32")
    model: Any = Engine({}, timeout_seconds=60).build(config, read_blueprint(config))
    ids = torch.arange(2, 12)[None]
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    monkeypatch.setattr(prefetching, "room_for_weights", lambda: 0.0)
    for _ in range(2):
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, before)
