"""What `same_numbers.py` calls the same, and what not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from same_numbers import collect, differences


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    save_file({"a": torch.arange(4.0), "none": torch.zeros(0)}, folder / "x.safetensors")
    lines = [{"step": 1, "loss": 0.5, "seconds": 3.0}, {"step": 2, "loss": 0.25, "seconds": 4.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps({"score": 1.0, "times": [1, 2]}))
    return folder.parent


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_times_may_differ(runs: Path) -> None:
    before = collect(runs)
    assert len(before) == 3
    change(runs / "one" / "metrics.jsonl", "3.0", "5.0")
    change(runs / "one" / "result.json", "[1, 2]", "[3]")
    assert differences(before, collect(runs)) == []


@pytest.mark.parametrize(
    ("name", "old", "new"), [("metrics.jsonl", "0.25", "0.26"), ("result.json", "1.0", "2.0")]
)
def test_a_number_that_differs_is_found(runs: Path, name: str, old: str, new: str) -> None:
    before = collect(runs)
    change(runs / "one" / name, old, new)
    assert differences(before, collect(runs)) == [f"runs/one/{name}"]


def test_a_bit_of_a_tensor_that_differs_is_found(runs: Path) -> None:
    before, file = collect(runs), runs / "one" / "x.safetensors"
    changed = torch.arange(4.0)
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    save_file({"a": changed, "none": torch.zeros(0)}, file)
    assert differences(before, collect(runs)) == ["runs/one/x.safetensors"]


def test_a_file_that_is_missing_is_found(runs: Path) -> None:
    before = collect(runs)
    (runs / "one" / "result.json").unlink()
    assert differences(before, collect(runs)) == ["runs/one/result.json"]
