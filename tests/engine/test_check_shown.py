"""The comparison with stored logits tells how far it is, in bytes of the blocks that have run."""

import logging
from pathlib import Path

import pytest
import torch

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, ConvertConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.convert import convert


def test_each_block_is_told_and_all_bytes_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"folder={tmp_path / 'converted'}"]
    folder = convert(load(ConvertConfig, "launch/recipes/toy_convert.yaml", words))
    monkeypatch.setattr("mhr_scale.run.runlog.ByteProgress._is_due", lambda self, now: True)
    caplog.set_level(logging.INFO, logger="mhr_scale")
    config = BackboneConfig(name=str(folder))
    engine = Engine({}, timeout_seconds=60, device=torch.device("cpu"))
    placed = place(engine, config, read_blueprint(config), ())
    shown = [text for text in caplog.messages if text.startswith("compare stored logits")]
    blocks = placed.family.blocks(placed.model.config).values()
    assert len(shown) == sum(stack.count for stack in blocks)
    done, total = shown[-1].removeprefix("compare stored logits ").split("  ")[0].split(" of ")
    assert done == total
