"""Mapped weights are asked for before they are used, in the order of a pass, and never twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_t5 import small_t5, tensors_of, write_folder
from torch import Tensor

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.mapped_file import MappedFile, read_ahead
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import prefetching
from mhr_scale.engine.engine import Engine

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

    def _ask(self, weight: Tensor) -> None:
        part = self.owners[weight.data_ptr()]
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


def test_copied_weights_are_not_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(folder, monkeypatch, mapped=False)
    recorder.run(needs_gradient=True).backward()
    assert recorder.asked == []


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    values = torch.randn(5000)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    view = MappedFile(tmp_path / "file").tensor(0, torch.float32, (5000,))
    for tensor in (view, view[:0], view[7:4001], torch.ones(3), torch.empty(2, device="meta")):
        read_ahead(tensor)
    assert torch.equal(view, values)
