"""What is fetched from the hub: one format of weights, and no folder below."""

from pathlib import Path
from typing import Any

import pytest

from mhr_scale.backbone.hub import TOKENIZER_FILES, find_folder

BOTH = ["config.json", "spiece.model", "README.md", "onnx/model.safetensors", "optimizer.bin"]
BIN = [*BOTH, "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
SAFE = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is asked of the hub to send."""
    found: list[Any] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        found.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return found


def hub_has(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: files)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (BIN + SAFE, ["config.json", *SAFE, "spiece.model"]),
        (
            BIN,
            ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "spiece.model"],
        ),
    ],
    ids=["both formats", "bin alone"],
)
def test_weights_are_fetched_in_one_format(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], files: list[str], wanted: list[str]
) -> None:
    hub_has(monkeypatch, files)
    find_folder("some/backbone", "main")
    assert asked == [("some/backbone", "main", wanted)]


def test_of_a_tokenizer_no_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    hub_has(monkeypatch, BIN)
    find_folder("some/tokenizer", None, files=TOKENIZER_FILES)
    assert asked[0][2] == ["config.json", "pytorch_model.bin.index.json", "spiece.model"]


def test_without_an_answer_of_the_hub_what_was_fetched_before_counts(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    def offline(name: str, revision: str | None) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    find_folder("some/backbone", None)
    assert "*.safetensors" in asked[0][2]
    assert "pytorch_model*.bin" in asked[0][2]
