"""`convert` compares what it wrote with transformers' reading; little memory, and progress."""

import json
from pathlib import Path
from typing import Any

import pytest
from conversions import SOURCES, refused, run_convert
from processes import run
from small_t5 import CARD, small_t5, tensors_of, write_folder

from mhr_scale.backbone import blueprint
from mhr_scale.config import FingerprintConfig
from mhr_scale.exchange import stock


def test_a_reading_that_differs_from_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stock.map_backbone

    def other(*arguments: Any) -> Any:
        model = original(*arguments)
        model.lm_head.weight = model.shared.weight
        return model

    monkeypatch.setattr(stock, "map_backbone", other)
    text = refused("builtin:toy", tmp_path / "out")
    assert "not converted: against transformers' reading of builtin:toy: the logits of" in text
    assert text.endswith("fingerprint.compare: false converts all the same")


def test_a_head_that_only_our_reading_ties_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blueprint, "is_equal", lambda source, name, other: True)
    card = {name: value for name, value in CARD.items() if name != "tie_word_embeddings"}
    source = write_folder(tmp_path / "source", tensors_of(small_t5()), card=card)
    text = refused(source, tmp_path / "out")
    assert "the logits of what was written differ by" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("kind", "n_shards"), SOURCES)
def test_every_conversion_is_compared_to_the_last_bit(
    kind: str,
    n_shards: int,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = tensors_of(small_t5())
    source = write_folder(tmp_path / "source", tensors, kind=kind, shards=n_shards)
    run_convert(source, tmp_path / "out", dtype=dtype)
    said = capsys.readouterr().out
    assert "the logits are those of transformers' reading of the original exactly" in said


def test_a_comparison_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_convert("builtin:toy", tmp_path / "out", fingerprint=FingerprintConfig(compare=False))
    said = capsys.readouterr().out
    assert "not compared with transformers' reading of the original (as asked)" in said


# -- how far it is ---------------------------------------------------------------------------------


def test_every_phase_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where ten seconds are over, that is; each phase to its end."""
    tied = {**CARD, "tie_word_embeddings": True}
    source = write_folder(tmp_path / "source", tensors_of(small_t5(tied=True)), card=tied)
    monkeypatch.setattr("mhr_scale.run.runlog.ByteProgress._is_due", lambda self, now: True)
    caplog.set_level("INFO", "mhr_scale")

    def phases() -> list[str]:
        lines = [m.split(" of ") for m in caplog.messages if " left" in m]
        done = [(start.rsplit(" ", 2), end.split("  ")[0]) for start, end in lines]
        caplog.clear()
        return [name for (name, *amount), total in done if " ".join(amount) == total]

    folder = run_convert(source, tmp_path / "out")
    assert list(dict.fromkeys(phases())) == [
        "look for ties",
        "convert",
        "hash",
        "fingerprint in float32",
        "fingerprint in bfloat16",
        "compare with transformers",
    ]
    run_convert(source, folder, verify=True)
    assert list(dict.fromkeys(phases())) == ["verify", "fingerprint in float32"]


@pytest.mark.slow
def test_a_bin_file_far_larger_than_its_tensors_takes_little_memory(
    tmp_path: Path,
) -> None:
    """The figure of `peak_memory.py`: what a process of its own allocates at most meanwhile."""
    result = run("tests/verbs/programs/peak_memory.py", str(tmp_path), timeout=120)
    assert result.returncode == 0, result.stdout
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["source"] > 100e6
    assert found["grown"] < 3 * found["largest"] + 32e6 < found["source"] / 2, found
