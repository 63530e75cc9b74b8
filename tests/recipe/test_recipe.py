"""Precedence: a default is weaker than the recipe, and the recipe than an override."""

import dataclasses

import pytest
from recipe_parts import GOOD

from mhr_scale import config
from mhr_scale.config import OptimConfig, SuperNITasks
from mhr_scale.recipe import reading


def test_a_setting_nobody_mentions_has_its_default(load):
    assert load().adapter.n_skills == 8


def test_the_recipe_is_stronger_than_the_default(load):
    assert load().adapter.rank == 2


def test_an_override_is_stronger_than_the_recipe(load):
    assert load(GOOD, "adapter.rank=4").adapter.rank == 4


def test_the_last_override_is_the_strongest(load):
    assert load(GOOD, "adapter.rank=4", "adapter.rank=8").adapter.rank == 8


def test_an_override_leaves_its_neighbours_alone(load):
    assert load(GOOD, "adapter.n_skills=4").adapter.rank == 2


def test_an_override_may_name_a_part_that_the_recipe_leaves_out(load):
    assert load(GOOD, "optim.name=adamw").optim == OptimConfig(name="adamw")


def test_an_override_may_give_a_whole_part(load):
    assert load(GOOD, "tasks={suite: superni, folder: d, tasks: [a, b]}").tasks == SuperNITasks(
        suite="superni", folder="d", tasks=("a", "b")
    )


def test_an_override_may_choose_another_suite(load):
    assert isinstance(load(GOOD, "tasks.suite=t0").tasks, config.T0Tasks)


def test_an_override_may_add_an_entry_to_a_mapping(load):
    given = "mixture: {weights: {a: 1.0}}\n"
    assert load(GOOD + given, "mixture.weights.b=2.0").mixture.weights == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("folder", ["no", "12:30", "a=b", "2020-01-01", "two words", "a\nb"])
def test_the_value_of_an_override_may_be_any_word(load, folder):
    assert load(GOOD, f"run.folder={folder}").run.folder == folder


@pytest.mark.parametrize("value", ["1e-3", "0.001", "1.0e-3", ".001"])
def test_all_spellings_of_a_number_are_the_number(load, value):
    assert load(f"{GOOD}optim: {{lr: {value}}}\n").optim.lr == 0.001


def test_a_whole_number_is_a_rate_too(load):
    assert load(GOOD, "optim.lr=1").optim.lr == 1.0


def test_null_switches_an_optional_setting_off(load):
    assert load(GOOD, "optim.clip_norm=null").optim.clip_norm is None


@pytest.mark.parametrize(
    ("overrides", "layout", "blocks"),
    [
        (["adapter.layout=[q_proj, mlp.c_proj]"], ("q_proj", "mlp.c_proj"), "all"),
        (["adapter.layout=light", "adapter.blocks=8-15"], "light", "8-15"),
        (["adapter.layout=[v_proj]", "adapter.blocks=0"], ("v_proj",), "0"),
        (["adapter.blocks=0-3,28-31"], "full", "0-3,28-31"),
    ],
)
def test_linears_and_blocks_may_be_listed_and_are_written_as_they_are_read(
    load, tmp_path, overrides, layout, blocks
):
    loaded = load(GOOD, *overrides)
    assert (loaded.adapter.layout, loaded.adapter.blocks) == (layout, blocks)
    (tmp_path / "written.yaml").write_text(reading.to_yaml(loaded))
    assert reading.load(type(loaded), tmp_path / "written.yaml") == loaded


def test_a_loaded_recipe_cannot_be_changed(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().adapter.rank = 4
