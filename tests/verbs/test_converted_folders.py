"""Converted folders as every run opens them: what is damaged or foreign is noticed."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conversions import SHARED, convert_small, manifest_of, run_convert
from safetensors.torch import load_file, save_file
from small_t5 import CARD, HEAD, INDICES, WO, save, small_t5, tensors_of, write_folder

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.manifest import MANIFEST
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_small(tmp_path_factory.mktemp("convert"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def cannot_open(folder: Path) -> str:
    with pytest.raises(BackboneError) as caught:
        read_blueprint(BackboneConfig(name=str(folder)))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def file_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDICES["safetensors"]).read_text())
    return folder / index["weight_map"][name]


def change_manifest(folder: Path, **values: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps({**manifest_of(folder), **values}))


def test_a_missing_file_is_named(copied: Path) -> None:
    file_of(copied, WO).unlink()
    assert cannot_open(copied).startswith(f"{file_of(copied, WO)}: missing, and {MANIFEST} lists")


def test_a_file_that_was_cut_off_names_its_tensor(copied: Path) -> None:
    file = file_of(copied, WO)
    last = list(load_file(file))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    text = cannot_open(copied)
    assert text.startswith(f"{file}: {file.stat().st_size} bytes, {MANIFEST} says ")
    assert "(it ends in " in text
    assert last in text or WO in text


def test_a_file_of_other_content_is_noticed_by_its_size(copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({**CARD, "num_heads": 4}))
    assert cannot_open(copied).startswith(f"{copied / 'config.json'}: ")


def test_another_data_type_than_was_written_is_noticed(copied: Path) -> None:
    change_manifest(copied, dtype="bfloat16")
    text = cannot_open(copied)
    assert " is float32, mhr_scale.json says bfloat16; copy the folder again" in text


def test_a_head_beside_a_tie_is_noticed(copied: Path) -> None:
    change_manifest(copied, tied={**manifest_of(copied)["tied"], HEAD: SHARED})
    expected = f"{file_of(copied, HEAD)}: holds {HEAD}, which {MANIFEST} says is {SHARED}"
    assert cannot_open(copied).startswith(expected)


def test_a_tie_that_the_weights_do_not_have_is_noticed(copied: Path) -> None:
    change_manifest(copied, tied={**manifest_of(copied)["tied"], "extra": SHARED})
    expected = f"{copied / MANIFEST}: says that extra is {SHARED}, the weights say a tensor of its"
    assert cannot_open(copied).startswith(expected)


def test_a_missing_head_is_not_taken_for_a_tie(tmp_path: Path) -> None:
    """Without the manifest it would be tied, and nobody would notice."""
    found = run_convert("builtin:toy", tmp_path / "out")
    (file,) = found.glob("model-*")
    tensors = load_file(file)
    del tensors[HEAD]
    save_file(tensors, file)
    index = json.loads((found / INDICES["safetensors"]).read_text())
    del index["weight_map"][HEAD]
    (found / INDICES["safetensors"]).write_text(json.dumps(index))
    manifest = manifest_of(found)
    for name in (file.name, INDICES["safetensors"]):
        manifest["files"][name]["bytes"] = (found / name).stat().st_size
    (found / MANIFEST).write_text(json.dumps(manifest))
    assert cannot_open(found).startswith(f"{found}: {HEAD} is missing, and {MANIFEST} ties it to")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n"schema": ', ":2: not JSON (Expecting value)"),
        ("[]", ": not a JSON object; copy the folder again"),
        ('{"schema": 1}', ": schema 1, this version reads 2; convert the backbone anew"),
        ('{"schema": 2}', ": source: field required"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(copied: Path, text: str, expected: str) -> None:
    (copied / MANIFEST).write_text(text)
    assert cannot_open(copied).startswith(f"{copied / MANIFEST}{expected}")


def test_a_manifest_cannot_name_files_elsewhere(copied: Path) -> None:
    files = {**manifest_of(copied)["files"], "../x": {"bytes": 0, "sha256": ""}}
    change_manifest(copied, files=files)
    assert "'../x' is no file beside it" in cannot_open(copied)


def test_verifying_a_folder_reads_and_changes_nothing(folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert run_convert("builtin:toy", folder, verify=True) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def not_verified(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        run_convert("builtin:toy", folder, verify=True)
    return str(caught.value)


def test_a_changed_bit_is_noticed_when_verifying(copied: Path) -> None:
    file = file_of(copied, WO)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    read_blueprint(BackboneConfig(name=str(copied)))  # cheap checks cannot see it
    assert not_verified(copied).startswith(f"{file}: its bytes are not those that were written (sh")


def test_swapped_tensors_with_hashes_of_their_own_are_noticed_when_verifying(copied: Path) -> None:
    """As a wrong converter would leave them."""
    one, other = WO, WO.replace("encoder", "decoder").replace("layer.1", "layer.2")
    first, second = load_file(file_of(copied, one)), load_file(file_of(copied, other))
    if file_of(copied, one) == file_of(copied, other):
        second = first
    first[one], second[other] = second[other].clone(), first[one].clone()
    save(first, file_of(copied, one))
    save(second, file_of(copied, other))
    files = manifest_of(copied)["files"]
    for name in (one, other):
        data = file_of(copied, name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        files[file_of(copied, name).name] = {"bytes": len(data), "sha256": digest}
    change_manifest(copied, files=files)
    assert "the logits of these weights and the stored ones differ by" in not_verified(copied)


def test_only_converted_folders_can_be_verified(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", tensors_of(small_t5()))
    assert not_verified(source).endswith("missing; only converted folders can be verified")
    assert "convert first" in not_verified(tmp_path / "nowhere")
