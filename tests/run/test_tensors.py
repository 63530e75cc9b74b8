"""Written files: their modes, and the name of the one that a full disk broke off."""

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from mhr_scale.backbone import shards
from mhr_scale.rows import tokens
from mhr_scale.run import failures
from mhr_scale.run.files import append_text, write_text
from mhr_scale.run.runlog import Metrics
from mhr_scale.run.tensors import save_tensors

BIG = 4 << 20


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_of_tensors_has_the_mode_that_the_umask_gives(
    umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of one megabyte, where the tests may mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def write_shard(file: Path) -> None:
    weight = shards.Weight(name="a", shape=(BIG,), dtype=torch.float32)
    chunk = torch.zeros(BIG)
    shards.write_shard(
        file, [weight], lambda weight, a, b: chunk[a:b], advance=lambda name, n: None
    )


def write_tokens(file: Path) -> None:
    rows = {"input_ids": [[7] * BIG], "targets": [[[1]]]}
    kind = tokens._id_type([])
    schema = pa.schema([("input_ids", pa.list_(kind)), ("targets", pa.list_(pa.list_(kind)))])
    tokens._write(file, [pa.RecordBatch.from_pydict(rows, schema=schema)], [])


WRITERS: dict[str, Callable[[Path], object]] = {
    "metrics": lambda file: Metrics(file, resume_step=0).write({"step": 1, "x": "x" * BIG}),
    "scores": lambda file: append_text(file, "x" * BIG),
    "text": lambda file: write_text(file, "x" * BIG),
    "tensors": lambda file: save_tensors({"a": torch.zeros(BIG)}, file),
    "shards": write_shard,
    "tokens": write_tokens,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_file_that_a_full_disk_broke_off_is_named(kind: str, small_disk: Path) -> None:
    file = small_disk / kind
    with pytest.raises(OSError) as caught:
        WRITERS[kind](file)
    file.unlink(missing_ok=True)
    assert caught.value.errno == errno.ENOSPC
    explained = failures.explain(caught.value)
    assert explained is not None
    assert explained.text.startswith(f"{file}: the disk is full; make room")
