"""Recipes written in full: those that are shipped, and any other, load to the same values."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT
from recipe_parts import GOOD, VERBS

from mhr_scale import config
from mhr_scale.config import PretrainConfig, ToyTasks
from mhr_scale.engine.ds_config import read_ds_config
from mhr_scale.errors import ConfigError
from mhr_scale.recipe import reading, strict_yaml

RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))


def schemas_of(path):
    """The verbs a recipe could be for, and the errors of those it is not for."""
    found, errors = [], []
    for kind in VERBS:
        try:
            found.append((kind, reading.load(kind, path)))
        except ConfigError as error:
            errors.append(f"{kind.__name__}: {error}")
    return found, errors


@pytest.fixture(params=RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])
def shipped(request):
    found, errors = schemas_of(request.param)
    assert found, "; ".join(errors)
    return found


def test_there_are_shipped_recipes():
    assert RECIPES


def test_a_shipped_recipe_loads_from_its_full_form_and_its_deepspeed_file_is_there(
    shipped, tmp_path
):
    for kind, loaded in shipped:
        (tmp_path / "full.yaml").write_text(reading.to_yaml(loaded), encoding="utf-8")
        assert reading.load(kind, tmp_path / "full.yaml") == loaded
        run = getattr(loaded, "run", None)
        assert "zero_optimization" in read_ds_config(getattr(run, "ds_config", None))


def test_shipped_recipes_write_numbers_that_every_reader_of_yaml_takes_for_numbers():
    def leaves(values):
        if isinstance(values, dict | list):
            for inner in values.values() if isinstance(values, dict) else values:
                yield from leaves(inner)
        else:
            yield values

    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        ours = strict_yaml.read(text, source=path.name, error=ConfigError)[0]
        assert list(leaves(yaml.safe_load(text))) == list(leaves(ours)), path


def test_a_written_recipe_holds_every_setting(load):
    tree = yaml.safe_load(reading.to_yaml(load()))
    assert set(tree["adapter"]) == {
        field.name for field in dataclasses.fields(config.AdapterConfig)
    }


def test_a_zero_byte_is_no_part_of_a_setting(load):
    with pytest.raises(ConfigError, match=r"run\.folder: a\\x00b is no setting"):
        load(GOOD, 'run.folder="a\\0b"')


@settings(max_examples=40, deadline=None)
@given(
    folder=st.text().filter(lambda text: "\0" not in text),
    weights=st.dictionaries(st.text(), st.floats(0.01, 1e6), max_size=2),
)
def test_any_words_and_numbers_survive_being_written(tmp_path_factory, folder, weights):
    made = PretrainConfig(
        backbone=config.BackboneConfig(name="builtin:toy"),
        adapter=config.AdapterConfig(),
        tasks=ToyTasks(suite="toy"),
        mixture=config.MixtureConfig(weights=weights),
        schedule=config.ScheduleConfig(steps=1),
        run=config.RunConfig(folder=folder),
    )
    path = tmp_path_factory.mktemp("full") / "r.yaml"
    path.write_text(reading.to_yaml(made), encoding="utf-8", newline="")
    assert reading.load(PretrainConfig, path) == made
