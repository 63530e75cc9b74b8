"""Runs whose blocks are compiled give what they give without; where that cannot be, none begins.

Graphs are run operation by operation here (torch's backend "eager"): the numbers are the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT
from small_runs import BARE, LORA, adapter_bytes, make_config, results, write_rows
from torch._dynamo.utils import counters

from mhr_scale.config import BackboneConfig, WavesConfig
from mhr_scale.config.finetune import FinetuneBackboneConfig
from mhr_scale.engine.opened import open_backbone
from mhr_scale.errors import BackboneError, ConfigError
from mhr_scale.families import compiled
from mhr_scale.verbs.adapt import adapt

COMPILED = replace(BARE, compile=True)
#: Graphs of rows laid flat take twice as long to make; `test_compiled_blocks` has some.
PADDED = WavesConfig(packing=False)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def test_a_wave_of_jobs_and_its_scores_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    rows, found = write_rows(tmp_path / "rows"), []
    for backbone in (BARE, COMPILED):
        folder = tmp_path / str(backbone.compile)
        adapt(make_config(folder, rows, {"LoRA": LORA}, backbone=backbone, waves=PADDED))
        found.append((adapter_bytes(folder), [each["score"] for each in results(folder).values()]))
        assert bool(counters["stats"]["unique_graphs"]) == backbone.compile
    assert len(found[0][0]) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "ds_config", "why"),
    [
        ({}, "ds_configs/zero3.json", "ds_configs/zero3.json shards the backbone, whose weights"),
        ({}, "ds_configs/zero3_offload.json", "ds_configs/zero3_offload.json shards the backbone"),
        ({"quantise": "int8"}, None, "the weights are int8, whose products were never compiled"),
    ],
)
def test_placements_that_cannot_are_refused_at_the_door(
    changes: dict[str, Any], ds_config: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    backbone: BackboneConfig = replace(COMPILED, **changes)
    with pytest.raises(BackboneError, match=f"backbone.compile: true, but {why}.*; set it to fal"):
        open_backbone(backbone, ds_config=ds_config, timeout_seconds=9.0, recipe={})


def test_finetune_compiles_nothing() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.compile: true, and finetune runs PEFT's"):
        FinetuneBackboneConfig(compile=True)
