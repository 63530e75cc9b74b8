"""Files of weights: their index, what it is worth, and what is wrong with them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_t5 import INDICES, save, write_folder

from mhr_scale.backbone.shards import Weight, first_cut, plan_shards, write_shard
from mhr_scale.backbone.weight_files import open_weights
from mhr_scale.errors import BackboneError

KINDS = ("safetensors", "bin")
TENSORS = {name: torch.full((4, 3), float(n)) for n, name in enumerate("abcdef")}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    """Three shards with an index; a and d are in the first."""
    return write_folder(tmp_path / "folder", TENSORS, kind=kind, shards=3)


def shards(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*-of-*.{kind}"))


def message(folder: Path) -> str:
    with pytest.raises(BackboneError) as caught:
        open_weights(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def change_index(folder: Path, kind: str, change: Callable[[dict[str, str]], Any]) -> None:
    file = folder / INDICES[kind]
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_indexed_shards_are_read_as_one(folder: Path) -> None:
    source = open_weights(folder)
    assert source.names() == TENSORS.keys()
    assert all(torch.equal(source.read(name, 0, 12), t.flatten()) for name, t in TENSORS.items())


def test_a_tensor_tells_its_file(folder: Path, kind: str) -> None:
    assert [open_weights(folder).file(name) for name in "abc"] == shards(folder, kind)


def test_a_stray_file_beside_an_index_is_not_read(folder: Path, kind: str) -> None:
    save({"a": torch.zeros(1), "stray": torch.zeros(1)}, folder / f"pytorch_model-x.{kind}")
    assert open_weights(folder).names() == TENSORS.keys()


def test_a_stray_file_beside_a_whole_one_is_not_read(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS, kind=kind)
    save({"stray": torch.zeros(1)}, folder / f"pytorch_model_old.{kind}")
    assert open_weights(folder).names() == TENSORS.keys()


@pytest.mark.parametrize(
    "stray", ["model.fp16.safetensors", "adapter_model.safetensors", "pytorch_model.fp16.bin"]
)
def test_a_file_of_another_name_is_not_read_and_that_is_said(
    kind: str, stray: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS, kind=kind)
    save({"a": torch.zeros(4, 3)}, folder / stray)
    save({"step": torch.zeros(1)}, folder / "training_args.bin")
    caplog.set_level("INFO", logger="mhr_scale")
    assert open_weights(folder).names() == TENSORS.keys()
    first = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[kind]
    assert caplog.messages == [f"{folder}: weights from {first}; not read: {stray}"]


def test_one_whole_file_is_read_before_shards_as_transformers_does(folder: Path, kind: str) -> None:
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    save({"whole": torch.zeros(1)}, folder / f"{stem}.{kind}")
    assert open_weights(folder).names() == {"whole"}


def test_shards_without_an_index_are_read_if_all_are_there(folder: Path, kind: str) -> None:
    (folder / INDICES[kind]).unlink()
    assert open_weights(folder).names() == TENSORS.keys()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_shards_without_an_index_of_which_one_is_missing_are_refused(
    folder: Path, kind: str, number: int
) -> None:
    (folder / INDICES[kind]).unlink()
    shards(folder, kind)[number].unlink()
    assert " are not the 3 shards of one backbone; fetch all of them" in message(folder)


def test_shards_of_two_backbones_are_refused(folder: Path, kind: str) -> None:
    (folder / INDICES[kind]).unlink()
    other = shards(folder, kind)[0].name.replace("of-00003", "of-00004")
    save({"other": torch.zeros(1)}, folder / other)
    assert " are not the 4 shards of one backbone" in message(folder)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (5,), (2, 3, 4)])
def test_the_type_of_a_tensor_of_any_shape_is_known(
    kind: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    folder = write_folder(tmp_path / "folder", {"a": tensor}, kind=kind)
    assert open_weights(folder).dtype("a") == torch.bfloat16


def test_a_file_without_a_tensor_is_named(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {}, kind=kind)
    assert message(folder).endswith(f".{kind}: holds no tensor; fetch it again")


def test_a_shard_that_the_index_names_must_be_there(folder: Path, kind: str) -> None:
    gone = shards(folder, kind)[1]
    gone.unlink()
    assert message(folder) == (
        f"{gone}: missing, and {INDICES[kind]} puts b and 1 more tensors there; fetch it"
    )


def test_a_tensor_that_the_index_names_must_be_in_its_shard(folder: Path, kind: str) -> None:
    first = shards(folder, kind)[0]
    save({"a": TENSORS["a"]}, first)
    text = f"{first}: d is missing, which {INDICES[kind]} puts there; fetch both again"
    assert message(folder) == text


def test_a_tensor_that_the_index_does_not_name_is_refused(folder: Path, kind: str) -> None:
    first = shards(folder, kind)[0]
    save({"a": TENSORS["a"], "d": TENSORS["d"], "x": torch.zeros(1)}, first)
    text = f"{first}: holds x, which {INDICES[kind]} does not know; fetch both again"
    assert message(folder) == text


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path, kind: str) -> None:
    first, second, _ = shards(folder, kind)
    change_index(folder, kind, lambda places: places.update(a=second.name))
    text = f"{first}: holds a, which {INDICES[kind]} puts in {second.name}; fetch both again"
    assert message(folder) == text


def test_a_tensor_in_two_files_is_refused(folder: Path, kind: str) -> None:
    first, second, _ = shards(folder, kind)
    save({"a": TENSORS["a"], "b": TENSORS["b"], "e": TENSORS["e"]}, second)
    assert message(folder).startswith(f"{second}: holds a, as {first.name} does")


@pytest.mark.parametrize("place", ["../outside.bin", "/etc/passwd", 3])
def test_an_index_cannot_name_files_elsewhere(folder: Path, kind: str, place: Any) -> None:
    change_index(folder, kind, lambda places: places.update(a=place))
    assert message(folder) == (
        f"{folder / INDICES[kind]}: a is in {place!r}, which is no file beside the index; fetch it "
        "again"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", ":1: not JSON"),
        ("[]", ": not a JSON object"),
        ('{"weight_map": {}}', ": no weight_map here"),
        ('{"weight_map": []}', ": no weight_map here"),
    ],
)
def test_a_broken_index_is_named(folder: Path, kind: str, text: str, expected: str) -> None:
    (folder / INDICES[kind]).write_text(text)
    assert message(folder).startswith(f"{folder / INDICES[kind]}{expected}")


def test_a_bin_file_that_was_cut_off_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    text = f"{file}: not a readable checkpoint (its end is missing); fetch it again"
    assert message(folder) == text


def test_a_large_file_in_torchs_old_format_is_told_to_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "folder", {})
    file = folder / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    monkeypatch.setattr("mhr_scale.backbone.weights.LARGE", 100)
    open_weights(folder)
    size = f"{file.stat().st_size / 1000:.1f} kB"
    assert caplog.messages == [
        f"{file}: torch's old format cannot be memory-mapped; {size} go into memory"
    ]


@pytest.mark.parametrize(("n_bytes", "name", "there"), [(1, "f", 47), (48, "f", 0), (49, "e", 47)])
def test_a_safetensors_file_that_was_cut_off_names_the_tensor(
    tmp_path: Path, n_bytes: int, name: str, there: int
) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS, kind="safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-n_bytes])
    assert message(folder) == (
        f"{file}: not a readable safetensors file "
        f"(it ends in {name}, of which {there} of 48 bytes are there); fetch it again"
    )


def test_a_safetensors_file_that_ends_in_its_header_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS, kind="safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert "(it ends in its header, after 50 of " in message(folder)


def test_a_safetensors_file_of_an_unknown_data_type_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", TENSORS, kind="safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"F32", b"F99"))
    assert message(folder).startswith(f"{file}: not a readable safetensors file (")


# -- writing a stream ------------------------------------------------------------------------------


def write(file: Path, tensors: dict[str, torch.Tensor]) -> Any:
    weights = [Weight(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]
    seen: list[tuple[str, int]] = []
    facts = write_shard(
        file,
        weights,
        lambda weight, start, stop: tensors[weight.name].flatten()[start:stop],
        advance=lambda name, n_bytes: seen.append((name, n_bytes)),
    )
    return facts, seen


def test_the_library_reads_what_was_streamed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mhr_scale.backbone.shards.CHUNK", 5)
    tensors = {
        "wide": torch.randn(3, 7),
        "vector": torch.randn(4),
        "half": torch.randn(2, 3).bfloat16(),
        "other half": torch.randn(1, 5).half(),
    }
    _, seen = write(tmp_path / "file.safetensors", tensors)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert seen[:5] == [("wide", 20)] * 4 + [("wide", 4)]


def test_a_streamed_file_has_the_size_and_hash_that_are_told(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    facts, _ = write(file, TENSORS)
    data = file.read_bytes()
    assert (facts.bytes, facts.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_whole_file_lacks_nothing(tmp_path: Path) -> None:
    write(tmp_path / "file.safetensors", TENSORS)
    assert first_cut(tmp_path / "file.safetensors") is None


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    weights = [Weight(name=str(n), shape=(n,), dtype=torch.float32) for n in (1, 1, 9, 1)]
    planned = plan_shards(weights, 8)
    assert [[weight.name for weight in shard] for shard in planned] == [["1", "1"], ["9"], ["1"]]
