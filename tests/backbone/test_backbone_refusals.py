"""Damaged and foreign backbone folders are refused with the file and the tensor."""

import json
import pickle

import pytest
import torch
from small_backbones import message_of, one_line, stored
from small_t5 import CARD, WO
from torch import nn

from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError


def add_prefix(tensors, prefix):
    for name in list(tensors):
        tensors[f"{prefix}{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("bin", lambda tensors: tensors.pop(WO), [f"missing {WO}"]),
        ("safetensors", lambda tensors: tensors.pop("shared.weight"), ["missing shared.weight"]),
        ("bin", lambda tensors: tensors.update(extra=torch.zeros(1)), ["unknown extra"]),
        (
            "safetensors",
            lambda tensors: tensors.update({WO: torch.zeros(24, 16)}),
            [f"{WO} is [24, 16]", "[16, 24]"],
        ),
        (
            "bin",
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(380, 16)}),
            ["lm_head.weight is [380, 16]", "[384, 16]"],
        ),
        ("safetensors", lambda tensors: tensors.clear(), ["no tensor"]),
        (
            "bin",
            lambda tensors: add_prefix(tensors, "module."),
            ["names begin with 'module.'", "save the tensors without 'module.'"],
        ),
    ],
    ids=["missing", "no embedding", "unknown", "shape", "head shape", "nothing", "prefix"],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    make, build, original, kind, change, expected
):
    tensors = stored(original)
    change(tensors)
    folder = make(tensors, kind=kind)
    with pytest.raises(BackboneError) as caught:
        build(name=str(folder))
    message = one_line(caught)
    assert all(words in message for words in (str(folder), *expected)), message


def test_a_long_list_of_faults_is_cut(make, build, original):
    tensors = {name: torch.zeros(1) for name in stored(original)}
    folder = make(tensors)
    with pytest.raises(BackboneError) as caught:
        build(name=str(folder))
    message = one_line(caught)
    assert f"{len(tensors)} fault(s): " in message
    assert message.count("the model wants") == 5


def cut(n_bytes):
    return lambda file: file.write_bytes(file.read_bytes()[:-n_bytes])


def content(data):
    return lambda file: file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [cut(100), lambda file: file.write_bytes(file.read_bytes()[:50]), content(b"")],
    ids=["end cut off", "header cut off", "empty"],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_file_of_weights_is_named(make, original, kind, damage):
    folder = make(stored(original), kind=kind)
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    damage(file)
    assert message_of(BackboneConfig(name=str(folder))).startswith(f"{file}: not a ")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        pickle.dumps(len, protocol=2),
    ],
    ids=["pointer to a large file", "pickled code"],
)
def test_a_file_that_is_no_checkpoint_is_named(make, name, data):
    folder = make({}, kind="none")
    (folder / name).write_bytes(data)
    assert message_of(BackboneConfig(name=str(folder))).startswith(f"{folder / name}: not a ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
        ({"state_dict": {"a": torch.zeros(1)}}, "'state_dict' is a dict, no tensor"),
        ({"a": nn.Linear(1, 1)}, "tensors alone"),
        ({"a": None}, "'a' is a NoneType, no tensor"),
        ({"a": torch.zeros(1), 3: torch.zeros(1)}, "the key '3' is no name of a tensor"),
        ({("a", "b"): torch.zeros(1)}, "is no name of a tensor"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a sparse_coo tensor"),
        ({"a": torch.eye(2).to_sparse_csr()}, "'a' is a sparse_csr tensor"),
        ({"a": torch.zeros(2, device="meta")}, "'a' is a meta tensor"),
    ],
)
def test_a_bin_file_of_something_else_is_named(make, content, expected):
    folder = make(content, kind="bin")
    file = folder / "pytorch_model.bin"
    message = message_of(BackboneConfig(name=str(folder)))
    assert message.startswith(f"{file}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{\n"d_model": ', "config.json:2: "),
        (b"\xff\xfe", "config.json: not UTF-8"),
        ("[]", "config.json: "),
        (
            '{"model_type": "vit"}',
            ": a backbone of type 'vit'; use one of type t5, mt5, umt5, llama",
        ),
        (
            '{"model_type": "bert"}',
            ": backbones of type 'bert' (BertLMHeadModel) cannot be adapted",
        ),
        ('{"model_type": "mamba"}', ": a mamba has no num_attention_heads; use a backbone whose"),
        ('{"model_type": "bloom"}', ": bloom tells positions by ALiBi"),
        ('{"model_type": "bart"}', ": a bart is an encoder-decoder of no family known here"),
        (
            {**CARD, "auto_map": {"AutoModelForSeq2SeqLM": "modeling.Own"}},
            "config.json: auto_map asks for code of its own",
        ),
        ({**CARD, "tie_word_embeddings": "false"}, "tie_word_embeddings 'false' is neither true"),
        ({**CARD, "tie_word_embeddings": 0}, "tie_word_embeddings 0 is neither true nor false"),
        ({**CARD, "is_encoder_decoder": False}, "config.json: is_encoder_decoder is false"),
        (
            {**CARD, "eos_token_id": [1, 2]},
            "config.json: eos_token_id [1, 2] is a list, and a T5 has one",
        ),
        ({**CARD, "num_layers": "two"}, "'num_layers'"),
        ({**CARD, "num_heads": 0}, "config.json: num_heads 0 "),
        ({**CARD, "feed_forward_proj": "x"}, "config.json: feed_forward_proj: no activation 'x'"),
        ({**CARD, "feed_forward_proj": "a-b-c"}, "config.json: "),
    ],
)
def test_a_configuration_that_cannot_be_used_names_its_file(folder, data, expected):
    text = json.dumps(data) if isinstance(data, dict) else data
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message_of(BackboneConfig(name=str(folder)))
    assert message.startswith(str(folder))
    assert expected in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_floats_are_refused_before_they_are_read(make, original, kind, dtype):
    """A saved 8-bit copy: without its scales, integers would pass for weights."""
    tensors = {**stored(original), WO: torch.ones(16, 24).to(dtype)}
    message = message_of(BackboneConfig(name=str(make(tensors, kind=kind))))
    assert f": {WO} is " in message
    assert ", which is no weight's data type; use the original, not a quantised copy" in message


@pytest.mark.parametrize("kind", [b"F4", b"F6_E2M3", b"U64", b"C64"])
def test_weights_of_a_type_that_torch_does_not_read_are_refused(make, kind):
    folder = make({})
    file = folder / "model.safetensors"
    n_bytes = {b"F4": 2, b"F6_E2M3": 3, b"U64": 32, b"C64": 32}[kind]
    header = json.dumps({"a": {"dtype": kind.decode(), "shape": [4], "data_offsets": [0, n_bytes]}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(n_bytes))
    message = message_of(BackboneConfig(name=str(folder)))
    assert message.startswith(f"{file}: a is {kind.decode()}, which is no weight's data type; ")


def test_a_file_is_no_folder(folder):
    file = folder / "model.safetensors"
    message = message_of(BackboneConfig(name=str(file)))
    assert message == f"backbone.name: {file} is a file; give the folder that it lies in"


def test_a_folder_without_a_configuration_is_no_backbone(folder):
    (folder / "config.json").unlink()
    message = message_of(BackboneConfig(name=str(folder)))
    assert message.startswith(f"{folder}: ")
    assert "config.json" in message


KNOWN = (
    "model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
    "pytorch_model.bin.index.json"
)


def test_a_folder_without_weights_says_what_is_looked_for(folder):
    (folder / "model.safetensors").unlink()
    message = message_of(BackboneConfig(name=str(folder)))
    assert message == f"{folder}: no weights by a name that is read, {KNOWN}; fetch it"


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "adapter_model.safetensors"])
def test_weights_of_another_name_are_not_taken_for_the_backbone(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = message_of(BackboneConfig(name=str(folder)))
    assert message == (
        f"{folder}: no weights by a name that is read, {KNOWN} ({name}: rename the one that is the "
        "backbone)"
    )
