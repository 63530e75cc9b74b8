"""What is fetched from the hub: one format of weights, and no folder below."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mhr_scale.backbone.hub import TOKENIZER_FILES, find_folder
from mhr_scale.errors import BackboneError

BOTH = ["config.json", "spiece.model", "README.md", "onnx/model.safetensors", "optimizer.bin"]
BIN = [*BOTH, "pytorch_model.bin", "tf_model.h5", "training_args.bin"]
SAFE = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
SMALL = ["config.json", "spiece.model"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is asked of the hub to send: names, revision, and whether of the local copy alone."""
    found: list[Any] = []

    def snapshot(
        name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        files = None if allow_patterns is None else sorted(allow_patterns)
        found.append((name, revision, files, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return found


def hub_has(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, **options: info)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that does not answer, and how long each question may wait for it."""
    waits: list[float] = []

    def no_answer(name: str, *, timeout: float, **options: Any) -> Any:
        waits.append(timeout)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.model_info", no_answer)
    return waits


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (BIN + SAFE, ["config.json", *SAFE, "spiece.model"]),
        (BIN, ["config.json", "pytorch_model.bin", "spiece.model"]),
        ([*BIN, "model.fp16.safetensors"], ["config.json", "pytorch_model.bin", "spiece.model"]),
        ([*BIN, "adapter_model.safetensors"], ["config.json", "pytorch_model.bin", "spiece.model"]),
        (
            [*BIN, "first.safetensors", "model.safetensors.index.json"],
            ["config.json", "first.safetensors", "model.safetensors.index.json", "spiece.model"],
        ),
        (BOTH, SMALL),
    ],
    ids=["both formats", "bin alone", "a variant", "an adapter", "own names", "no weights"],
)
def test_weights_are_fetched_in_one_format(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], files: list[str], wanted: list[str]
) -> None:
    hub_has(monkeypatch, files)
    find_folder("some/backbone", "main")
    assert asked == [("some/backbone", "main", wanted, False)]


def test_of_a_tokenizer_no_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    hub_has(monkeypatch, BIN)
    find_folder("some/tokenizer", None, files=TOKENIZER_FILES)
    assert asked[0][2] == SMALL


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("known", [True, False])
def test_without_an_answer_of_the_hub_what_was_fetched_before_counts(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], known: bool
) -> None:
    def tree(name: str, revision: str | None) -> list[Any]:
        if not known:
            raise LookupError("an older cache")
        return [SimpleNamespace(path=file) for file in BIN + SAFE]

    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", tree)
    find_folder("some/backbone", None)
    wanted = ["config.json", *SAFE, "spiece.model"] if known else None
    assert asked == [("some/backbone", None, wanted, True)]


def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_long(
    no_network: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError) as caught:
        find_folder("some/backbone", None)
    assert len(no_network) == 1
    assert no_network[0] <= 10
    assert str(caught.value) == (
        "backbone.name: 'some/backbone' is no local folder and the hub does not give it "
        "(ConnectionError: no network); give a folder, a hub id or builtin:toy"
    )


@pytest.mark.usefixtures("no_network")
def test_a_copy_from_the_hub_is_found_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--some--backbone", "0" * 40
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert find_folder("some/backbone", None) == folder
