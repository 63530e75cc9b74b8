"""Small backbones, converted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_t5 import small_t5, tensors_of, write_folder

from mhr_scale.backbone.manifest import MANIFEST
from mhr_scale.config import ConvertConfig, OriginConfig
from mhr_scale.errors import UserError
from mhr_scale.verbs.convert import convert

#: Kinds of files, and how many.
SOURCES = [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)]
BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
SHARED = "shared.weight"


def run_convert(source: Path | str, folder: Path, **settings: Any) -> Path:
    config = ConvertConfig(backbone=OriginConfig(name=str(source)), folder=str(folder))
    return convert(replace(config, **settings))


def refused(source: Path | str, folder: Path, **settings: Any) -> str:
    """What a refused conversion says; it leaves nothing behind."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run_convert(source, folder, **settings)
    assert sorted(folder.parent.iterdir()) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def convert_small(place: Path) -> Path:
    """A folder converted from three `.bin` shards, in several files."""
    tensors = {**tensors_of(small_t5()), BIAS: torch.zeros(32, 2)}
    source = write_folder(place / "source", tensors, shards=3)
    return run_convert(source, place / "out", max_shard_bytes=8_000, dtype="float32")
