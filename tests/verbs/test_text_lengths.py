"""Texts that are longer than what a decoder-only backbone was made for, at the door of verbs."""

from typing import Any

import pytest

from mhr_scale.config import AdaptConfig, EvaluateConfig, PretrainConfig
from mhr_scale.engine.opened import open_backbone
from mhr_scale.errors import BackboneError
from mhr_scale.jobs.adapt_inputs import open_jobs
from mhr_scale.recipe.reading import load
from mhr_scale.training.opening import opened_training
from mhr_scale.verbs.evaluate import evaluate

LEARNED = """{config: {model_type: gpt2, vocab_size: 384, n_embd: 32, n_layer: 1, n_head: 2,
  n_positions: 48}, dtype: float32}"""
TASKS = "{suite: toy, n_tasks: 4, train_examples: 4, validation_examples: 2"
RECIPES = {
    "pretrain": (
        PretrainConfig,
        f"""
        backbone: {LEARNED}
        adapter: {{n_skills: 1}}
        tasks: {TASKS}}}
        schedule: {{steps: 1}}
        batch: {{max_input_tokens: 33, max_target_tokens: 17}}
        run: {{folder: FOLDER}}
        """,
        r"batch\.max_input_tokens and max_target_tokens: texts of up to 33 \+ 17 tokens, but the "
        "backbone has learned 48 positions",
    ),
    "evaluate": (
        EvaluateConfig,
        f"""
        backbone: {LEARNED}
        tasks: {TASKS}, fold: held_out}}
        scoring: {{metric: exact_match, max_new_tokens: 45, max_input_tokens: 16, examples: 1}}
        run: {{folder: FOLDER}}
        """,
        r"scoring\.max_input_tokens, max_choice_tokens and max_new_tokens: texts of up to \d+ \+ "
        "45 tokens",
    ),
    "adapt": (
        AdaptConfig,
        f"""
        backbone: {LEARNED}
        variants: {{one: {{fresh: {{n_skills: 1}}}}}}
        tasks: {TASKS}, fold: held_out}}
        shots: {{seeds: [0], count: 4}}
        protocol: {{loss: language_model, max_input_tokens: 24, max_target_tokens: 32}}
        run: {{folder: FOLDER}}
        """,
        r"protocol\.max_input_tokens and max_target_tokens: texts of up to 24 \+ 32 tokens",
    ),
}


def run(config: Any) -> None:
    """As far as the verbs check their texts, and not further."""
    if isinstance(config, PretrainConfig):
        with opened_training(config):
            pytest.fail("opened")
    elif isinstance(config, EvaluateConfig):
        evaluate(config)
    else:
        open_jobs(config)


@pytest.mark.parametrize("verb", RECIPES)
def test_texts_beyond_learned_positions_are_refused_before_weights_are_read(
    verb: str, tmp_path: Any
) -> None:
    kind, text, message = RECIPES[verb]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("FOLDER", str(tmp_path / "run")))
    with pytest.raises(BackboneError, match=message):
        run(load(kind, recipe))


def test_rotary_positions_beyond_those_trained_on_are_warned_of(tmp_path: Any, caplog: Any) -> None:
    kind, text, _ = RECIPES["pretrain"]
    recipe = tmp_path / "recipe.yaml"
    rotary = """{config: {model_type: llama, vocab_size: 384, hidden_size: 32,
      intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
      max_position_embeddings: 48}, dtype: float32}"""
    recipe.write_text(text.replace("FOLDER", str(tmp_path / "run")).replace(LEARNED, rotary))
    config = load(kind, recipe)
    assert isinstance(config, PretrainConfig)
    opened = open_backbone(config.backbone, ds_config=None, timeout_seconds=9.0, recipe=config)
    opened.check_length(32, 17, "here")
    assert not caplog.records
    opened.check_length(33, 17, "here")
    (record,) = caplog.records
    assert record.getMessage() == (
        "here: texts of up to 33 + 17 tokens, but the backbone was made for 48 positions and may "
        "fail beyond"
    )
