"""The verb `adapt` on recipes it cannot run: one line with the way out, and nothing is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import BARE, LORA, TASKS, make_config, make_source, write_rows

from mhr_scale.adapters import artefact
from mhr_scale.backbone.hub import BUILTIN
from mhr_scale.config import (
    AdaptConfig,
    AdapterConfig,
    BackboneConfig,
    JsonlTasks,
    SelectionConfig,
    ShotsConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.errors import AdapterError, ConfigError, DataError, LayoutError, RunError, UserError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.adapt import adapt

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def source(base) -> Path:
    return make_source(base / "source")


@pytest.fixture(scope="module")
def rows(base) -> Path:
    return write_rows(base / "rows")


@pytest.fixture
def config(source, rows, tmp_path) -> AdaptConfig:
    variants = {"MHR": VariantConfig(adapter=str(source))}
    return make_config(tmp_path / "run", rows, variants)


@pytest.fixture
def fresh(config) -> AdaptConfig:
    return replace(config, variants={"LoRA": LORA}, backbone=BARE)


def refuse(config: AdaptConfig, error: type[UserError], words: str) -> None:
    """Expect an error, before anything is written."""
    with pytest.raises(error, match=words):
        adapt(config)
    assert not Path(config.run.folder).exists()


# --- variants


def test_an_adapter_that_is_not_there_is_named(config, tmp_path):
    variants = {**config.variants, "mine": VariantConfig(adapter=str(tmp_path / "gone"))}
    refuse(replace(config, variants=variants), AdapterError, r"/gone: ")


def test_a_variant_that_its_adapter_cannot_give_is_named(config, source):
    variants = {"mine": VariantConfig(adapter=str(source), kind="soup")}
    refuse(replace(config, variants=variants), ConfigError, r"variants\.mine\.kind: soup")


def test_splits_that_do_not_fit_the_backbone_are_refused(fresh):
    odd = VariantConfig(fresh=AdapterConfig(layout="attention", n_skills=2, n_splits=7))
    refuse(
        replace(fresh, variants={"odd": odd}),
        LayoutError,
        r"adapter\.n_splits: 7 .* width 64 of encoder",
    )


def test_a_layout_that_the_backbone_lacks_is_refused(fresh):
    odd = VariantConfig(fresh=AdapterConfig(layout="atention"))
    refuse(replace(fresh, variants={"odd": odd}), LayoutError, r"adapter\.layout: 'atention'")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("variants.MHR.adaptor=x", "'variants.MHR.adaptor'"),
        ("variants={}", "recipe.yaml: variants: "),
        ("selection.on=shots", "selection.on: shots .*shots.set_aside"),
        ("selection.patience=0", "selection.patience: 0 "),
        ("shots.seeds=[1, 1]", r"shots.seeds: \[1, 1\] "),
        ("shots.seeds=[]", r"shots.seeds: \[\] "),
        ("shots.set_aside=8", "shots.set_aside: 8 "),
        ("protocol.batch_size=0", "protocol.batch_size: 0 "),
        ("waves.size=0", "waves.size: 0 "),
        ("waves.save_every=-1", "waves.save_every: -1 "),
        ("variants.MHR.soup={adapters: 0}", "soup.adapters: 0 "),
    ],
)
def test_settings_that_are_none_are_refused_as_the_recipe_is_read(tmp_path, override, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "variants: {MHR: {adapter: runs/toy}}\n"
        "tasks: {suite: toy, fold: held_out}\n"
        "shots: {count: 8}\n"
        "run: {folder: run}\n"
    )
    load(AdaptConfig, recipe)
    with pytest.raises(ConfigError, match=words):
        load(AdaptConfig, recipe, [override])


# --- the backbone


def test_fresh_variants_alone_need_a_backbone(fresh):
    refuse(replace(fresh, backbone=None), ConfigError, "^backbone: ")


def test_jobs_of_a_run_share_a_backbone(config, source, tmp_path):
    card = artefact.read_card(source)
    other = artefact.save(
        artefact.load(source), tmp_path / "other", backbone={**card.backbone, "name": "t5-other"}
    )
    variants = {**config.variants, "other": VariantConfig(adapter=str(other))}
    refuse(
        replace(config, variants=variants),
        ConfigError,
        r"variants: .*/source .*builtin:toy, .*/other .*t5-other;.* backbone_moved_to",
    )


def test_an_adapter_and_another_backbone_make_no_run(config):
    other = replace(BARE, name="t5-other")
    refuse(
        replace(config, backbone=other), ConfigError, "/source .*builtin:toy, backbone .*t5-other"
    )


def test_random_weights_of_another_seed_are_another_backbone(config, source, tmp_path):
    loaded, variants = artefact.load(source), {}
    for seed in (0, 1):
        facts = {"name": None, "config": {"d_model": 64}, "config_seed": seed}
        folder = artefact.save(loaded, tmp_path / str(seed), backbone=facts)
        variants[f"seed {seed}"] = VariantConfig(adapter=str(folder))
    refuse(replace(config, variants=variants), ConfigError, "/0 .*random weights, .*/1 .*other")


def test_an_adapter_of_other_widths_is_refused(config, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(BUILTIN["builtin:toy"], narrow)
    settings = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**settings, "num_layers": 1}))
    refuse(
        replace(config, backbone_moved_to=str(narrow)), AdapterError, "/source: .*encoder.block.1"
    )


@pytest.mark.parametrize(
    ("dropout", "value"), [(0.1, "0.1"), (None, "null")], ids=["given", "of-the-backbone"]
)
def test_dropout_is_refused(fresh, tmp_path, dropout, value):
    """Null keeps the rate of the backbone's own configuration."""
    wet = tmp_path / "wet"
    shutil.copytree(BUILTIN["builtin:toy"], wet)
    settings = json.loads((wet / "config.json").read_text())
    (wet / "config.json").write_text(json.dumps({**settings, "dropout_rate": 0.1}))
    backbone = BackboneConfig(name=str(wet), dtype="float32", dropout=dropout)
    refuse(replace(fresh, backbone=backbone), ConfigError, rf"backbone\.dropout: {value}\b")


# --- rows


def test_validation_rows_have_to_be_there_to_select_on(fresh, tmp_path):
    rows = write_rows(tmp_path / "rows", validation=0)
    tasks = JsonlTasks(suite="jsonl", folder=str(rows), validation_examples=0)
    selection = SelectionConfig(on="validation")
    refuse(
        replace(fresh, tasks=tasks, selection=selection),
        ConfigError,
        rf"selection\.on: validation, .* {TASKS[0]} ",
    )


def test_more_shots_than_rows_are_refused(fresh):
    refuse(
        replace(fresh, shots=ShotsConfig(count=99)),
        DataError,
        rf"task {TASKS[0]}: 10 .* 99 .*shots\.count",
    )


def test_training_tasks_are_no_few_shot_tasks(fresh):
    tasks = ToyTasks(suite="toy")
    refuse(replace(fresh, tasks=tasks), ConfigError, r"tasks\.fold: train .*held_out")


# --- the folder


def test_a_run_folder_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match=r"run\.folder: .*/run "):
        adapt(config)


def test_a_recipe_in_the_run_folder_that_cannot_be_read_is_named(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("variants: [")
    with pytest.raises(UserError, match=r"/run/config\.yaml:1: "):
        adapt(config)
