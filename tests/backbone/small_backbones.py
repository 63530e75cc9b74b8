"""Backbones of every format in which checkpoints come, and what they compute."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from small_t5 import HEAD, SIZES, tensors_of
from transformers import T5Config

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.weights import RandomSource
from mhr_scale.errors import BackboneError
from mhr_scale.families.t5 import GATED

KINDS = ("safetensors", "safetensors shards", "bin", "bin shards", "bin in the old format")


def stored(model):
    """State of a model as checkpoints hold it: each tied tensor once."""
    tensors = tensors_of(model, aliases=False)
    if model.lm_head.weight is model.shared.weight:
        del tensors[HEAD]
    return tensors


def halves(tensors):
    names = sorted(tensors)
    middle = len(names) // 2
    return [{name: tensors[name] for name in part} for part in (names[:middle], names[middle:])]


def write_weights(folder, tensors, kind="safetensors"):
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "safetensors shards":
        for number, half in enumerate(halves(tensors), 1):
            save_file(half, folder / f"model-0000{number}-of-00002.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "bin shards":
        for number, half in enumerate(halves(tensors), 1):
            torch.save(half, folder / f"pytorch_model-0000{number}-of-00002.bin")
    elif kind == "bin in the old format":
        file = folder / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=False)


def random_source(shapes, *, seed=0, **changes):
    config = T5Config(**{**SIZES, **changes})
    return RandomSource(shapes, seed, partial(GATED.random_weight, config))


def logits(model):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 300, (2, 9), generator=generator)
    labels = torch.randint(3, 300, (2, 5), generator=generator)
    with torch.no_grad():
        return model(input_ids=input_ids, labels=labels).logits


def message_of(config):
    with pytest.raises(BackboneError) as caught:
        read_blueprint(config)
    return one_line(caught)


def one_line(caught):
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
