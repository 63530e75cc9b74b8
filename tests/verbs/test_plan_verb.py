"""The verb `plan` from the command line: which recipes, which settings, what it prints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import AdaptConfig, EvaluateConfig, PretrainConfig
from mhr_scale.errors import BackboneError, ConfigError
from mhr_scale.verbs.plan import plan, recognise

RECIPES = ROOT / "launch" / "recipes"
TOY = str(RECIPES / "toy.yaml")
GPU = ("hardware.gpu=A100-40G", "hardware.gpus=2")
TINY = (
    "backbone={dtype: float32, tokenizer: byt5, config: {vocab_size: 384, d_model: 32, d_kv: 8, "
    "d_ff: 64, num_layers: 1, num_heads: 4, feed_forward_proj: gated-gelu}}"
)


GPT2 = "backbone={quantise: int8, tokenizer: byt5, config: {model_type: gpt2, vocab_size: 384}}"


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "no recipe given; usage: mhr_scale plan RECIPE"),
        (("hardware.gpus=8",), "no recipe given"),
        ((TOY, "--fast"), "unknown option --fast; options: --json, --help"),
        ((TOY, "hardware.gpu_s=8"), "unknown setting 'hardware.gpu_s'; did you mean 'gpus'?"),
        ((TOY, "workload.choices=0"), "workload.choices: 0 is not at least 1"),
        ((TOY, "adapter.rnk=2"), "unknown setting 'adapter.rnk'; did you mean 'rank'?"),
        ((TOY, "hardware.gpu=A100-40G", "hardware.gpus=3"), "64 rows do not divide over 3 ranks"),
        (("nowhere.yaml",), "nowhere.yaml: cannot be read"),
        ((str(RECIPES / "toy_export.yaml"),), "plan reads recipes of pretrain, evaluate and adapt"),
        (
            (str(RECIPES / "t0_few_shot.yaml"), *GPU),
            "to plan before it exists, name its recipe: workload.source=RECIPE",
        ),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(words: tuple[str, ...], expected: str) -> None:
    message = refused(*words)
    assert expected in message
    assert "\n" not in message


def test_linears_that_cannot_be_quantised_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"c_attn is a Conv1D, and only plain linears"):
        plan((TOY, GPT2, *GPU))


def test_the_kind_of_every_recipe_is_recognised() -> None:
    from mhr_scale.recipe.reading import load

    schemas: dict[str, Any] = {
        "pretrain": PretrainConfig,
        "evaluate": EvaluateConfig,
        "adapt": AdaptConfig,
    }
    for path in RECIPES.glob("*.yaml"):
        try:
            kind = recognise(path)
        except ConfigError:
            for schema in schemas.values():
                with pytest.raises(ConfigError):
                    load(schema, path)
        else:
            load(schemas[kind], path)


def test_help_lists_the_settings_of_the_plan() -> None:
    text = plan(["--help"])
    assert "hardware.nodes" in text
    assert "workload.source" in text


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a pre-training run that has not been started."""
    from mhr_scale.recipe.reading import load, to_yaml

    path = tmp_path_factory.mktemp("source") / "recipe.yaml"
    path.write_text(to_yaml(load(PretrainConfig, TOY, [TINY])))
    return path


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan([TOY, *GPU, TINY, "--json"]))
    return found


def test_a_plan_as_json_has_every_placement_under_every_recomputation(toy: dict[str, Any]) -> None:
    names = [(one["placement"], one["settings"]["backbone.recompute"]) for one in toy["placements"]]
    assert len(names) == len(set(names)) == 12  # rows of 32 numbers are no blocks of nf4
    assert toy["kind"] == "pretrain"
    assert all(one["fits"] for one in toy["placements"])


def test_the_parts_of_the_memory_add_up(toy: dict[str, Any]) -> None:
    for one in toy["placements"]:
        parts = dict(one["bytes"])
        total = parts.pop("total")
        parts.pop("host")
        assert sum(parts.values()) == pytest.approx(total)
        assert min(parts.values()) >= 0


def test_frozen_weights_have_no_gradients_and_no_optimizer_state(toy: dict[str, Any]) -> None:
    one = toy["placements"][0]["bytes"]
    assert 0 < one["gradients"] <= one["adapter"]
    assert one["adapter"] < one["optimizer"] < 2.1 * one["adapter"]  # AdamW's two moments


def test_the_settings_to_use_are_those_of_a_recipe(toy: dict[str, Any]) -> None:
    from mhr_scale.recipe.reading import load

    settings = [f"{name}={value}" for name, value in toy["use"]["settings"].items()]
    config = load(PretrainConfig, TOY, [TINY, *settings])
    assert config.batch.accumulation(2) == toy["use"]["passes_per_step"]
    assert config.backbone.dtype == "float32"
    assert toy["use"]["placement"] == "replicated fp32"


def test_a_folder_that_the_other_verbs_refuse_is_not_counted(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(BUILTIN["builtin:toy"], folder)
    (folder / "mhr_scale.json").write_text('{"schema": 1}')
    with pytest.raises(BackboneError, match="schema 1, this version reads 2; convert the backbone"):
        plan([TOY, f"backbone={{name: {folder}}}", *GPU])


def test_a_bare_backbone_is_planned_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    text = plan(
        [
            str(RECIPES / "toy_evaluate.yaml"),
            "adapter=null",
            TINY,
            "workload.input_tokens=16",
        ]
    )
    assert "Use: replicated fp32" in text
    assert "on 1 x cpu" in text
    assert "examples_per_second" in text


def test_generated_answers_are_planned_too(tiny_source: Path) -> None:
    found = json.loads(
        plan(
            [
                str(RECIPES / "toy_evaluate.yaml"),
                f"workload.source={tiny_source}",
                "adapter=nowhere",
                "scoring.metric=exact_match",
                "scoring.max_new_tokens=8",
                *GPU,
                "--json",
            ]
        )
    )
    assert found["use"]["examples_per_second"] > 0
    assert "run.ds_config" in found["use"]["settings"]


def test_jobs_of_adapters_that_do_not_exist_yet_are_planned_from_their_recipe(
    tiny_source: Path,
) -> None:
    found = json.loads(
        plan(
            [
                str(RECIPES / "toy_adapt.yaml"),
                f"workload.source={tiny_source}",
                "variants={MHR: {adapter: nowhere}, MHR-z: {adapter: nowhere, kind: routing}}",
                "hardware.gpu=A100-40G",
                "--json",
            ]
        )
    )
    assert "variant MHR," in found["what"]
    assert 1 <= int(found["use"]["settings"]["waves.size"]) <= 32
    assert found["use"]["jobs_per_hour"] > 0
