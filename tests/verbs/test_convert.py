"""The verb `convert`: any checkpoint in; checked, indexed safetensors out."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import (
    BIAS,
    SHARED,
    SOURCES,
    convert_small,
    manifest_of,
    refused,
    run_convert,
)
from safetensors.torch import load_file
from small_t5 import CARD, HEAD, INDICES, WO, small_t5, stored, tensors_of, write_folder
from torch import Tensor
from transformers import T5ForConditionalGeneration

from mhr_scale.backbone import shards
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.backbone.manifest import MANIFEST
from mhr_scale.config import BackboneConfig, ConvertConfig, FingerprintConfig
from mhr_scale.errors import ConfigError
from mhr_scale.families.t5 import EMBEDDING_ALIASES
from mhr_scale.recipe.reading import load
from mhr_scale.run.folders import moved_into_place


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tensors_of(small_t5())


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_shards"), SOURCES)
def test_every_kind_of_checkpoint_becomes_the_same_weights(
    kind: str, n_shards: int, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", tensors, kind=kind, shards=n_shards)
    found = stored(run_convert(source, tmp_path / "out"))
    expected = tensors_of(small_t5(), aliases=False)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t.bfloat16()) for name, t in expected.items())


def test_a_source_in_torchs_old_format_is_converted(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "source", tensors)
    file = source / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert HEAD in stored(run_convert(source, tmp_path / "out", dtype="float32"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_small(tmp_path_factory.mktemp("convert"))


def test_transformers_loads_the_folder_as_it_is(folder: Path) -> None:
    model, info = T5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    original = small_t5()
    x = torch.arange(3, 12).reshape(1, 9)
    with torch.no_grad():
        found, expected = (
            one.eval()(input_ids=x, decoder_input_ids=x).logits for one in (model, original)
        )
    assert torch.equal(found, expected)


def test_files_are_as_large_as_asked_and_indexed(folder: Path) -> None:
    index = json.loads((folder / INDICES["safetensors"]).read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    for file in files:
        held = [tensor.nbytes for tensor in load_file(file).values()]
        assert len(held) == 1 or sum(held) <= 8_000


def test_the_manifest_knows_every_file_by_size_and_hash(folder: Path) -> None:
    files = {file.name: file for file in folder.iterdir() if file.name != MANIFEST}
    assert manifest_of(folder)["files"] == {
        name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for name, file in files.items()
    }


def test_the_manifest_says_where_the_weights_are_from(folder: Path) -> None:
    source = folder.parent / "source"
    files = {file.name: file.stat().st_size for file in source.glob("*.bin")}
    assert manifest_of(folder)["source"] == {
        "name": str(source),
        "revision": None,
        "folder": "source",
        "files": files,
    }


def test_what_no_t5_uses_is_left_out_and_told(folder: Path) -> None:
    assert manifest_of(folder)["left_out"] == [BIAS]


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    model = small_t5(tied=True)
    card = {**CARD, "tie_word_embeddings": True}
    source = write_folder(tmp_path / "source", tensors_of(model), card=card)
    found = run_convert(source, tmp_path / "out")
    assert HEAD not in stored(found)
    assert manifest_of(found)["tied"][HEAD] == SHARED
    assert read_blueprint(BackboneConfig(name=str(found))).ties[HEAD] == SHARED
    assert manifest_of(run_convert(source, tmp_path / "again"))["tied"].keys() >= {HEAD}


def test_a_head_of_its_own_is_not_tied(folder: Path) -> None:
    assert HEAD not in manifest_of(folder)["tied"]
    assert HEAD not in read_blueprint(BackboneConfig(name=str(folder))).ties


def test_tokenizer_and_settings_come_along(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN["builtin:toy"], tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"num_beams": 2}')
    found = run_convert(tmp_path / "source", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_left_over_note_on_quantisation_is_left_out(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    card = {**CARD, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    found = run_convert(write_folder(tmp_path / "source", tensors, card=card), tmp_path / "out")
    assert "quantization_config" not in json.loads((found / "config.json").read_text())
    T5ForConditionalGeneration.from_pretrained(found)


def test_an_embedding_by_another_name_is_written_by_its_own(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    alone = {name: tensor for name, tensor in tensors.items() if name != SHARED}
    found = run_convert(write_folder(tmp_path / "source", alone), tmp_path / "out")
    assert torch.equal(stored(found)[SHARED], tensors[SHARED].bfloat16())
    assert not set(EMBEDDING_ALIASES) & stored(found).keys()


def test_prompts_are_what_the_fingerprint_is_asked(tmp_path: Path) -> None:
    settings = FingerprintConfig(prompts=("a b c", "d"))
    found = manifest_of(run_convert("builtin:toy", tmp_path / "out", fingerprint=settings))
    assert [len(row) for row in found["fingerprint"]["inputs"]] == [4, 2]


def test_a_converted_folder_can_be_converted_again(folder: Path, tmp_path: Path) -> None:
    found = stored(run_convert(folder, tmp_path / "out"))
    assert all(torch.equal(found[name], t.bfloat16()) for name, t in stored(folder).items())


def test_one_process_of_a_launch_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not run_convert("builtin:toy", tmp_path / "out").exists()


# -- what is wrong with the source -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("bin", lambda tensors: tensors.pop(WO), f"1 fault(s): missing {WO}"),
        (
            "safetensors",
            lambda tensors: tensors[WO].__setitem__((3, 5), float("nan")),
            f"element 77 of {WO} is nan",
        ),
        (
            "bin",
            lambda tensors: tensors[WO].__setitem__((3, 5), -3.4e38),
            f"element 77 of {WO} is -3.4e+38",
        ),
        (
            "safetensors",
            lambda tensors: tensors.update({WO: torch.zeros(16, 24, dtype=torch.int8)}),
            f"{WO} is I8",
        ),
        (
            "bin",
            lambda tensors: tensors["encoder.embed_tokens.weight"].add_(1),
            "encoder.embed_tokens.weight differs from shared.weight",
        ),
    ],
    ids=["missing", "nan", "overflow", "dtype", "other embedding"],
)
def test_a_checkpoint_that_cannot_be_converted_names_the_tensor(
    kind: str, change: Callable[[Any], Any], expected: str, tmp_path: Path
) -> None:
    tensors = tensors_of(small_t5())
    change(tensors)
    source = write_folder(tmp_path / "source", tensors, kind=kind)
    text = refused(source, tmp_path / "out")
    assert expected in text
    if "fault(s)" not in text:
        (file,) = source.glob("*model.*")
        assert text.startswith(f"{file}: ")


# -- where it is written ---------------------------------------------------------------------------


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in refused("builtin:toy", tmp_path / "out")


def test_the_source_is_no_target(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", tensors)
    text = refused(source, tmp_path / "source" / ".." / "source")
    assert text.endswith("source is the backbone itself; name another folder")


def test_a_disk_without_room_is_told_before_anything_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    text = refused("builtin:toy", tmp_path / "out")
    assert text.startswith("folder: the converted backbone takes 506.4 kB and ")


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    text = refused("builtin:toy", tmp_path / "out")
    assert text.startswith(
        f"folder: cannot write to {tmp_path / 'out'} ([Errno 28] No space left on device: "
    )
    assert text.endswith(
        "/model-00001-of-00001.safetensors'); make room, or name a folder on another disk"
    )


def test_what_an_interrupted_conversion_left_is_not_used(tmp_path: Path) -> None:
    with moved_into_place(tmp_path / "out") as left:
        pass
    (tmp_path / "out").rmdir()
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    found = run_convert("builtin:toy", tmp_path / "out")
    assert not left.exists()
    assert len(list(found.glob("model-*"))) == 1


# -- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dtype=float16", "dtype: 'float16' "),
        ("max_shard_bytes=0", "max_shard_bytes: 0 "),
        ("fingerprint.prompts=['']", "fingerprint.prompts: "),
    ],
)
def test_a_wrong_setting_is_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ConvertConfig, "launch/recipes/toy_convert.yaml", [override])
    assert expected in str(caught.value)
