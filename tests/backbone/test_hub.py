"""What is fetched from the hub, of which revision and folder, and what its refusals say."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, hub_at, serving

from mhr_scale.adapters.places import find_place
from mhr_scale.backbone.hub import TOKENIZER_FILES, find, find_folder
from mhr_scale.config import BackboneConfig, OriginConfig
from mhr_scale.errors import BackboneError, ConfigError
from mhr_scale.run import repositories
from mhr_scale.run.repositories import Place

BOTH = ["config.json", "spiece.model", "README.md", "onnx/model.safetensors", "optimizer.bin"]
BIN = [*BOTH, "pytorch_model.bin", "tf_model.h5", "training_args.bin"]
SAFE = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
SMALL = ["config.json", "spiece.model"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub, hub_at(hub.url, tmp_path / "cache"):
        yield hub


def named(files: list[str]) -> dict[str, bytes]:
    return {file: file.encode() for file in files}


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
def test_weights_are_fetched_in_one_format(hub: Hub, files: list[str], wanted: list[str]) -> None:
    hub.add("some/backbone", named(files))
    folder = find_folder("some/backbone", "main")
    assert hub.fetched() == wanted
    assert sorted(path.name for path in folder.iterdir()) == wanted


def test_of_a_tokenizer_no_weights_are_fetched(hub: Hub) -> None:
    hub.add("some/tokenizer", named(BIN))
    find_folder("some/tokenizer", None, files=TOKENIZER_FILES)
    assert hub.fetched() == SMALL


def test_a_place_is_a_revision_and_a_folder_of_a_repository(hub: Hub) -> None:
    first = hub.add("some/backbone", named(BIN) | {"deep/down/config.json": b"{}"})
    second = hub.add("some/backbone", {"config.json": b"newer"})
    old = find(f"some/backbone@{first}", None)
    assert (old.commit, (old.path / "config.json").read_bytes()) == (first, b"config.json")
    new = find("some/backbone@main", None)
    assert (new.commit, (new.path / "config.json").read_bytes()) == (second, b"newer")
    inner = find("some/backbone@main:deep/down", None)
    assert [path.name for path in inner.path.iterdir()] == ["config.json"]
    assert inner.facts == {"hub": "some/backbone:deep/down", "revision": "main", "commit": second}
    assert (
        repositories.pinned("some/backbone@main:deep/down") == f"some/backbone@{second}:deep/down"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("o/n", Place("o/n")),
        ("gpt2", Place("gpt2")),
        ("o/n@refs/pr/1:a/b/", Place("o/n", "refs/pr/1", "a/b")),
        ("o/n:a", Place("o/n", None, "a")),
        ("runs/x/adapter", None),
        ("/o/n@main", None),
        ("../n@main", None),
        ("./o@main", None),
        ("o/n@main:../a", None),
        ("o/n@main:/", None),
        ("o/n@", None),
        ("builtin:tpy", None),
        ("o/n@a:b:c", None),
    ],
)
def test_what_is_a_place_on_the_hub_and_what_a_path(text: str, place: Place | None) -> None:
    assert repositories.parse(text) == place


def test_a_name_with_a_revision_is_that_of_a_backbone_s_two_settings(tmp_path: Path) -> None:
    config = BackboneConfig(name="o/n@v1:inner")
    assert (config.name, config.revision) == ("o/n:inner", "v1")
    assert OriginConfig(name="o/n@v1", revision="v1").revision == "v1"
    with pytest.raises(ConfigError, match=r"backbone.revision: v2, but backbone.name says v1"):
        BackboneConfig(name="o/n@v1", revision="v2")


def test_what_lies_here_by_that_name_comes_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o/n@main").mkdir(parents=True)
    assert BackboneConfig(name="o/n@main").revision is None
    for find_here in (partial(find, revision=None), find_place):
        caplog.clear()
        with caplog.at_level("INFO", "mhr_scale"):
            assert find_here("o/n@main").path == Path("o/n@main")
        assert "o/n@main: is read here, and not from the hub" in caplog.text
    assert hub.calls == []


def refusal(name: str) -> str:
    with pytest.raises(BackboneError) as caught:
        find_folder(name, None)
    return str(caught.value)


def test_what_the_hub_refuses_is_said_in_one_line_with_the_way_out(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add("o/n", {"a/config.json": b"", "b/c/config.json": b""})
    hub.add("o/secret", named(SMALL), private=True)
    hub.add("o/gated", named(SMALL), gated=True)
    assert refusal("o/n@v9") == (
        "backbone.name: o/n has no revision 'v9' on the hub (there are: main); "
        "give a folder, a hub id or builtin:toy"
    )
    assert refusal("o/n@main:d") == (
        "backbone.name: o/n@main:d: no folder 'd' in that repository; there are: a, b/c"
    )
    private = (
        "no such repository, or a private one: if it is, log in (hf auth login) or set HF_TOKEN"
    )
    assert f"the hub does not give it ({private}); give a folder" in refusal("o/none@main")
    with hub_at(hub.url, tmp_path / "other", token=None):
        assert private in refusal("o/secret")
        asked = "gated: ask for access on the page of o/gated, and log in"
        assert asked in refusal("o/gated")
    assert find_folder("o/secret", None).is_dir()


def test_without_an_answer_of_the_hub_what_was_fetched_before_counts(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.add("some/backbone", named(BIN + SAFE))
    folder = find_folder("some/backbone", None)
    hub.refuses = "/api/"
    with caplog.at_level("INFO", "mhr_scale"):
        found = find("some/backbone", None)
    assert (found.path, found.commit) == (folder, commit)
    assert f"some/backbone: as fetched before, {commit[:12]} (HfHubHTTPError: " in caplog.text


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that does not answer, and how long each question may wait for it."""
    waits: list[float] = []

    def no_answer(api: Any, name: str, *, timeout: float, **options: Any) -> Any:
        waits.append(timeout)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_answer)
    return waits


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
