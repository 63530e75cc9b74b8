"""Model cards of exported folders, without a hub: licence, scores, settings that say nothing."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from toy_exports import make, run_export, save_run

from mhr_scale.config import ExportConfig
from mhr_scale.errors import ConfigError


def test_a_card_has_the_licence_and_the_scores_of_its_run(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", make("LoRA"), backbone={"name": "builtin:toy"})
    lines = ['{"step": 0, "validation_loss": 2.5}', '{"step": 9, "validation_loss": 1.25}']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run" / "result.json").write_text('{"task": "t", "metric": "accuracy", "score": 5}')
    settings = {"licence": "other", "licence_name": "ours", "licence_link": "https://x.test/l"}
    out = run_export(run, tmp_path / "out", check=False, **settings)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "ours")
    assert card.data.base_model is None
    assert "rows of the training tasks: 2.5000 at the start, 1.2500 at the end\n" in card.text
    assert "- t: accuracy 5.00, all rows\n" in card.text
    assert "## Licence\n\nours (https://x.test/l)." in card.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"licence": "other"}, "^licence_name: "),
        ({"licence": "mit", "licence_name": "x"}, "^licence_name: "),
        ({"licence_link": "x"}, "^licence_link: "),
        ({"hub_message": "x"}, "^hub: "),
        ({"hub_private": False}, "^hub: "),
    ],
)
def test_settings_of_cards_and_pushes_that_say_nothing(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExportConfig(adapter="x", folder="y", **settings)
