"""Weights that are used where their files are mapped: nothing is copied, nothing else changes."""

import logging
import mmap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_t5 import save, small_t5, tensors_of, write_folder
from torch import Tensor, nn

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.mapped_file import MappedFile
from mhr_scale.backbone.weight_files import open_weights
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import host_memory
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.host_memory import Stager

CPU = torch.device("cpu")
HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(params=["safetensors", "bin"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A backbone in float32."""
    tensors = tensors_of(small_t5(), aliases=False)
    return write_folder(tmp_path / "backbone", tensors, kind=request.param)


def place(folder: Path, **settings: Any) -> nn.Module:
    config = BackboneConfig(name=str(folder), **{"dtype": "float32", **settings})
    return Engine({}, timeout_seconds=60).build(config, read_blueprint(config))


def is_in_file(weight: Tensor, folder: Path) -> bool:
    """Whether a weight lies in one of the maps of the folder's files, which the system lists."""
    address = weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < stop:
            return str(folder) in line
    return False


def test_weights_of_the_files_data_type_lie_in_the_files(folder: Path) -> None:
    weights = dict(place(folder).named_parameters())
    assert len(weights) > 20
    assert all(is_in_file(weight, folder) for weight in weights.values())
    assert not any(weight.requires_grad for weight in weights.values())


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"mapped": False}])
def test_others_are_copied(folder: Path, settings: dict[str, Any]) -> None:
    weights = dict(place(folder, **settings).named_parameters())
    assert not any(is_in_file(weight, folder) for weight in weights.values())


def test_mapped_and_copied_weights_are_the_same(folder: Path) -> None:
    mapped, copied = place(folder), place(folder, mapped=False)
    theirs = dict(copied.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in mapped.named_parameters())


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    tensors = tensors_of(small_t5(tied=True), aliases=False)
    model: Any = place(write_folder(tmp_path / "tied", tensors, kind="safetensors"))
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert is_in_file(model.encoder.embed_tokens.weight, tmp_path)


def test_only_what_is_not_quantised_is_mapped(folder: Path) -> None:
    model: Any = place(folder, quantise="int8")
    assert is_in_file(model.shared.weight, folder)
    assert not is_in_file(model.encoder.block[0].layer[0].SelfAttention.q.weight, folder)


def test_what_is_written_to_a_view_stays_in_this_process(folder: Path) -> None:
    model: Any = place(folder)
    before = open_weights(folder).read(HEAD, 0, 4).clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model.lm_head.weight.any()
    assert torch.equal(open_weights(folder).read(HEAD, 0, 4), before)


def test_the_log_tells_bytes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mhr_scale")
    place(folder)
    place(folder, dtype="bfloat16")
    place(folder, quantise="int8")
    mapped, copied, quantised = (text for text in caplog.messages if text.startswith("backbone: "))
    assert mapped == "backbone: 81.2 kB mapped, which this machine holds once in its file cache"
    assert copied == "backbone: 40.6 kB of weights of this process's own"
    assert "kB mapped" in quantised
    assert quantised.endswith("kB of int8 weights of this process's own")


def test_a_map_that_is_refused_is_an_error_with_a_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(Exception, match=r"kB cannot be mapped .*Cannot allocate.*ulimit -v"):
        open_weights(folder)


def test_nothing_is_reserved_for_a_map_larger_than_memory(tmp_path: Path) -> None:
    """Sparse, twice as large as the memory and swap of this machine together."""
    fields = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(2 * total)
    mapped = MappedFile(file)
    assert len(mapped) == 2 * total
    assert mapped.tensor(2 * total - 8, torch.float32, (2,)).tolist() == [0.0, 0.0]


def test_numbers_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    file = tmp_path / "odd"
    values = torch.arange(6, dtype=torch.float32)
    file.write_bytes(b"x" + values.numpy().tobytes())
    assert torch.equal(MappedFile(file).tensor(1, torch.float32, (2, 3)).flatten(), values)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_checkpoint_that_was_packed_anew_is_read(tmp_path: Path, compressed: bool) -> None:
    """Other programs write zip files without alignment, or compressed."""
    tensors = {name: torch.randn(5, 3) for name in "abc"}
    save(tensors, tmp_path / "first.bin")
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        zipfile.ZipFile(tmp_path / "first.bin") as first,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", kind) as second,
    ):
        for record in first.namelist():
            if not record.endswith((".format_version", ".storage_alignment")):
                second.writestr(record, first.read(record))
    source = open_weights(folder)
    assert all(torch.equal(source.read(n, 0, 15), t.flatten()) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
def test_copies_through_two_buffers_are_copies(dtype: torch.dtype, numel: int) -> None:
    stager, source = Stager(CPU, n_bytes=64 * dtype.itemsize), torch.randn(numel)
    target = torch.empty(numel, dtype=dtype)
    stager.copy_through(target, source)
    assert torch.equal(target, source.to(dtype))


def test_freed_blocks_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libc.so.6"

        def mallopt(self, option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(host_memory.ctypes, "CDLL", Library)
    host_memory.give_back_freed_blocks()
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("", ""))
    host_memory.give_back_freed_blocks()
    assert calls == [(-3, 1 << 20)]
