"""The recipes of decoder-only backbones: what they ask fits the backbones that they name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ROOT

from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import AdaptConfig, BackboneConfig, EvaluateConfig, PretrainConfig
from mhr_scale.families.known_sizes import KNOWN
from mhr_scale.planning.placements import weigh
from mhr_scale.planning.sizes import read_sizes
from mhr_scale.recipe.reading import load

RECIPES = ROOT / "launch" / "recipes"
LARGE = ("llama31_8b", "qwen3_14b", "gemma3_12b")
SETS = ("p3", "flan", "superni")
#: Numbers of weights as their authors publish them; Gemma's without what sees pictures.
PUBLISHED = {
    "bigscience/T0": 11_135_332_352,
    "google/flan-t5-small": 76_961_152,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-pt": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sizes_are_those_that_are_published(name: str) -> None:
    assert weigh(read_sizes(BackboneConfig(name=name))).total == PUBLISHED[name]


@pytest.mark.parametrize("name", LARGE)
def test_recipes_of_large_backbones_differ_in_their_rows_alone(name: str) -> None:
    recipes = [load(PretrainConfig, RECIPES / f"{name}_{rows}.yaml") for rows in SETS]
    assert [recipe.tasks.suite for recipe in recipes] == ["t0", "jsonl", "superni"]
    assert [recipe.tasks.chat for recipe in recipes] == [False, True, True]
    first = recipes[0]
    assert {recipe.adapter for recipe in recipes} == {first.adapter}
    assert {recipe.optim for recipe in recipes} == {first.optim}
    assert (first.adapter.rank, first.adapter.scale, first.optim.lr) == (4, 4.0, 1e-4)
    for recipe in recipes:
        assert KNOWN[str(recipe.backbone.name)] == KNOWN[str(first.backbone.name)]
        assert (recipe.batch.max_input_tokens, recipe.batch.max_target_tokens) == (2048, 64)
    sites = find_sites_of(read_sizes(first.backbone), first.adapter)
    parts = {site.name.rpartition(".")[2] for site in sites}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(sites) == 4 * KNOWN[str(first.backbone.name)]["num_hidden_layers"]
    splits = first.adapter.n_splits
    assert not any(site.in_features % splits or site.out_features % splits for site in sites)


@pytest.mark.parametrize("rows", ["superni", "t0_open"])
def test_what_is_trained_on_smollm2_is_evaluated_and_adapted_as_it_was_trained(rows: str) -> None:
    trained = load(PretrainConfig, RECIPES / f"{rows}_smollm2.yaml")
    evaluated = load(EvaluateConfig, RECIPES / f"{rows}_smollm2_evaluate.yaml")
    adapted = load(AdaptConfig, RECIPES / f"{rows}_smollm2_few_shot.yaml")
    assert {evaluated.adapter} == {trained.run.folder}
    assert {variant.adapter for variant in adapted.variants.values()} == {trained.run.folder}
    assert [v.kind for v in adapted.variants.values()] == ["full", "routing", "average"]
    for later in (evaluated, adapted):
        assert (later.tasks.chat, later.tasks.system) == (trained.tasks.chat, trained.tasks.system)
        assert later.scoring.cut == trained.batch.cut
    assert adapted.protocol.cut == trained.batch.cut


@pytest.mark.parametrize("partition", ["", "_classification"])
@pytest.mark.parametrize("backbone", ["t5_large", "qwen3_06b"])
def test_what_is_trained_on_crossfit_is_adapted_on_the_same_partition(
    backbone: str, partition: str
) -> None:
    name = f"crossfit_{backbone}{partition}"
    trained = load(PretrainConfig, RECIPES / f"{name}.yaml")
    adapted = load(AdaptConfig, RECIPES / f"{name}_few_shot.yaml")
    assert str(trained.backbone.name) in KNOWN
    assert (trained.tasks.fold, adapted.tasks.fold) == ("train", "test")
    assert replace(adapted.tasks, fold="train") == trained.tasks
    assert set(adapted.shots.seeds) == set(trained.tasks.seeds)
    assert {v.adapter for v in adapted.variants.values()} == {None, trained.run.folder}
    assert adapted.variants[adapted.gain_over].adapter is None
    for later in (adapted.protocol, adapted.scoring):
        assert (later.max_input_tokens, later.cut) == (512, trained.batch.cut)


def test_the_shared_model_has_the_sizes_of_its_hub_id(shared: Path) -> None:
    stored = json.loads((shared / "backbones" / "smollm2_135m" / "config.json").read_text())
    known = KNOWN["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert {name: stored[name] for name in known} == known
