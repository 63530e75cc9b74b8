"""Runs over weights that are mapped, copied, or read again all the time: the same bits."""

from pathlib import Path

import pytest
from toy_pretrains import train

from mhr_scale.engine import prefetching

#: With a gradient for every block, recomputed in backward, as a large backbone is trained.
SETTINGS = ("backbone.recompute=reentrant", "schedule.steps=2")


def trained(folder: Path, *overrides: str) -> bytes:
    return (train(folder, *SETTINGS, *overrides) / "adapter.safetensors").read_bytes()


def test_mapped_copied_and_short_of_memory_give_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = trained(tmp_path / "mapped")
    assert trained(tmp_path / "copied", "backbone.mapped=false") == mapped
    monkeypatch.setattr(prefetching, "LEAST", 0)
    monkeypatch.setattr(prefetching, "room_for_weights", lambda: 0.0)
    assert trained(tmp_path / "short") == mapped


def test_a_run_goes_on_with_copied_weights_where_it_began_with_mapped_ones(tmp_path: Path) -> None:
    constant = ("schedule.decay=constant", "schedule.warmup_fraction=0.0")
    train(tmp_path / "parts", *SETTINGS, *constant)
    longer = (*constant, "schedule.steps=4")
    parts = trained(tmp_path / "parts", *longer, "backbone.mapped=false")
    assert parts == trained(tmp_path / "whole", *longer)
