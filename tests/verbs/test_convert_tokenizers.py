"""`convert` takes a tokenizer along, and writes the fast form of a sentencepiece file beside it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conversions import manifest_of, run_convert
from small_pieces import T5_IDS, train_pieces
from small_t5 import CARD, HEAD, small_t5, stored, tensors_of, write_folder
from transformers import AutoTokenizer

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.identity import identify
from mhr_scale.backbone.tokenizer import hash_tokenizer, load_tokenizer
from mhr_scale.config import BackboneConfig, FingerprintConfig
from mhr_scale.errors import BackboneError

N_PIECES, N_EXTRA = 1000, 100
#: More rows than the tokenizer has tokens, as in T5's.
CARD_OF_T0 = {**CARD, "vocab_size": N_PIECES + N_EXTRA + 28}
del CARD_OF_T0["tie_word_embeddings"]
SENTINELS = [f"<extra_id_{number}>" for number in range(N_EXTRA)]
SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
#: As the hub has them beside T0.
SETTINGS = {
    **SPECIAL,
    "extra_ids": N_EXTRA,
    "additional_special_tokens": SENTINELS,
    "model_max_length": 512,
    "name_or_path": "google/t5-xl-lm-adapt",
    "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
}


@pytest.fixture(scope="module")
def lines(shared: Path) -> list[str]:
    """Real texts: inputs and targets of Super-NaturalInstructions."""
    found: list[str] = []
    for file in sorted((shared / "data" / "superni_sample" / "tasks").glob("*.json"))[:24]:
        task = json.loads(file.read_text(encoding="utf-8"))
        for row in task["Instances"][:60]:
            texts = [row["input"], *row["output"]]
            found += [line[:400] for text in texts for line in text.splitlines() if line.strip()]
    return found


@pytest.fixture(scope="module")
def pieces(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as T5's are, of real text."""
    place = tmp_path_factory.mktemp("pieces")
    return train_pieces(place, lines[::2], **T5_IDS, vocab_size=N_PIECES)


@pytest.fixture(scope="module")
def small_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that takes no real data."""
    return train_pieces(tmp_path_factory.mktemp("small_pieces"), **T5_IDS)


def write_source(place: Path, pieces: Path, settings: Any = None, **layout: Any) -> Path:
    """A backbone's folder as the hub has T0: no `tokenizer.json`, no word of ties."""
    card = {**CARD_OF_T0, **layout.pop("card", {})}
    model = small_t5(vocab_size=card["vocab_size"])
    folder = write_folder(place, tensors_of(model), card=card, **layout)
    shutil.copy(pieces, folder / "spiece.model")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def without_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither it nor protobuf is installed."""
    for package in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        import sentencepiece  # noqa: F401


def tokenizer_of(folder: Path) -> Any:
    config = BackboneConfig(name=str(folder))
    return load_tokenizer(config, read_blueprint(config))


# -- T0 as the hub has it --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "index"])
def t0(
    request: pytest.FixtureRequest, pieces: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The original, float32 in one `.bin` or in three with an index, and what becomes of it."""
    place = tmp_path_factory.mktemp("t0")
    source = write_source(place / "source", pieces, SETTINGS, shards=request.param)
    special = {**SPECIAL, "additional_special_tokens": SENTINELS}
    (source / "special_tokens_map.json").write_text(json.dumps(special))
    return source, run_convert(source, place / "out")


def test_real_texts_are_read_as_sentencepiece_reads_them(
    t0: tuple[Path, Path], pieces: Path, lines: list[str], without_sentencepiece: None
) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    tokenizer = tokenizer_of(t0[1])
    texts = lines[1::2][:2000]
    assert len(texts) == 2000
    ids = tokenizer(texts)["input_ids"]
    assert ids == [[*expected, 1] for expected in original.encode(texts)]


def test_sentinels_and_settings_are_the_originals(
    t0: tuple[Path, Path], without_sentencepiece: None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(t0[1])
    assert len(tokenizer) == N_PIECES + N_EXTRA
    last = N_PIECES + N_EXTRA - 1
    assert tokenizer.convert_tokens_to_ids(SENTINELS) == [last - n for n in range(N_EXTRA)]
    ids = tokenizer("<extra_id_0> of <extra_id_1>", add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (last, last - 1)
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True).strip() == "of"
    assert tokenizer.model_max_length == 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_files_of_the_original_stay_as_they_are(t0: tuple[Path, Path]) -> None:
    source, folder = t0
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    written = {file.name for file in folder.iterdir()} - {"mhr_scale.json"}
    assert manifest_of(folder)["files"].keys() == written
    assert "tokenizer.json" in written


def test_it_is_the_same_tokenizer_of_another_backbone(t0: tuple[Path, Path]) -> None:
    """Tokens that were cached are found again; a run goes on over the backbone it began on."""
    source, folder = t0
    assert hash_tokenizer(tokenizer_of(source)) == hash_tokenizer(tokenizer_of(folder))
    one, other = (read_blueprint(BackboneConfig(name=str(place))) for place in t0)
    assert identify(one) != identify(other)


def test_a_head_of_its_own_stays_where_nothing_is_said_of_ties(t0: tuple[Path, Path]) -> None:
    source, folder = t0
    assert "tie_word_embeddings" not in json.loads((source / "config.json").read_text())
    assert HEAD in stored(folder)
    assert HEAD not in manifest_of(folder)["tied"]


# -- other tokenizers ------------------------------------------------------------------------------


MT5 = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": None}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("t5", None),
        ("t5", {"tokenizer_class": "T5Tokenizer", "model_max_length": 77}),
        ("t5", {"tokenizer_class": "T5TokenizerFast", "legacy": True}),
        ("t5", {"extra_ids": 100, "additional_special_tokens": [*SENTINELS, "<mine>"]}),
        ("mt5", None),
        ("mt5", MT5),
    ],
    ids=["no settings", "slow class", "fast class", "a token more", "mT5 alone", "mT5"],
)
def test_a_converted_folder_opens_without_sentencepiece(
    tmp_path: Path,
    small_pieces: Path,
    model_type: str,
    settings: dict[str, Any] | None,
    request: pytest.FixtureRequest,
) -> None:
    card = {"model_type": model_type}
    source = write_source(tmp_path / "source", small_pieces, settings, card=card)
    before = tokenizer_of(source)
    folder = run_convert(source, tmp_path / "out")
    request.getfixturevalue("without_sentencepiece")
    after = tokenizer_of(folder)
    assert hash_tokenizer(after) == hash_tokenizer(before)
    assert len(after) == len(before)
    assert after.model_max_length == before.model_max_length
    assert after.all_special_tokens == before.all_special_tokens
    assert run_convert(folder, tmp_path / "again").exists()


def test_a_tokenizer_that_is_fast_already_is_left_alone(tmp_path: Path, small_pieces: Path) -> None:
    source = write_source(tmp_path / "source", small_pieces)
    first = run_convert(source, tmp_path / "first")
    text = json.loads((first / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(text))  # the same on one line
    second = run_convert(source, tmp_path / "second")
    assert (second / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_folder_that_reads_bytes_needs_no_fast_form(tmp_path: Path, small_pieces: Path) -> None:
    """Whatever sentencepiece file lies there is not its own."""
    settings = {"tokenizer_class": "ByT5Tokenizer"}
    source = write_source(tmp_path / "source", small_pieces, settings)
    assert not (run_convert(source, tmp_path / "out") / "tokenizer.json").exists()


def refused(source: Path, folder: Path) -> str:
    with pytest.raises(BackboneError) as caught:
        run_convert(source, folder)
    assert not folder.exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_tokens_that_transformers_makes_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", train_pieces(tmp_path, **T5_IDS, model_type="bpe"))
    monkeypatch.setattr("mhr_scale.backbone.conversion.write_weights", pytest.fail)
    text = refused(source, tmp_path / "out")
    assert text.startswith(f"{source / 'spiece.model'}: transformers makes other tokens of ")
    assert text.endswith(
        " than sentencepiece does; put a right tokenizer.json beside it, or move its sentencepiece "
        "file away to convert the weights alone"
    )


def test_settings_that_change_a_fast_tokenizer_are_refused(
    tmp_path: Path, small_pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", small_pieces)
    hashes = iter("ab")
    monkeypatch.setattr("mhr_scale.backbone.tokenizer.hash_tokenizer", lambda one: next(hashes))
    text = refused(source, tmp_path / "out")
    assert text.startswith(f"{source}: transformers makes another tokenizer of it once tokenizer.j")


def test_without_sentencepiece_the_package_is_named(
    tmp_path: Path, small_pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", small_pieces)
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    assert refused(source, tmp_path / "out") == (
        f"{source / 'spiece.model'}: cannot be read without sentencepiece; "
        "pip install sentencepiece"
    )


def test_prompts_of_a_fingerprint_are_read_too(tmp_path: Path, small_pieces: Path) -> None:
    source = write_source(tmp_path / "source", small_pieces)
    settings = FingerprintConfig(prompts=("the question", "is"))
    folder = run_convert(source, tmp_path / "out", fingerprint=settings)
    tokenizer = tokenizer_of(folder)
    expected = [tokenizer(prompt)["input_ids"] for prompt in settings.prompts]
    assert manifest_of(folder)["fingerprint"]["inputs"] == expected
