"""The JSON schema of a recipe: it takes what is shipped, refuses mistakes, explains settings."""

import jsonschema
import pytest
from processes import ROOT
from recipe_parts import GOOD

from mhr_scale import config
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe import reading, strict_yaml
from mhr_scale.recipe.part import VERBS
from mhr_scale.recipe.schema import json_schema

RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
VALIDATORS = {
    verb: jsonschema.Draft202012Validator(json_schema(schema)) for verb, schema in VERBS.items()
}


def read(text):
    """The values of a recipe as YAML 1.2 has them, which editors read too."""
    return strict_yaml.read(text, source="r.yaml", error=ConfigError)[0]


def takes(schema, path):
    try:
        reading.load(schema, path)
    except ConfigError:
        return False
    return True


def test_every_shipped_recipe_is_valid_for_the_verbs_that_read_it_and_no_other():
    for validator in VALIDATORS.values():
        validator.check_schema(validator.schema)
    for path in RECIPES:
        values = read(path.read_text(encoding="utf-8"))
        valid = {verb for verb, validator in VALIDATORS.items() if validator.is_valid(values)}
        assert valid == {verb for verb, schema in VERBS.items() if takes(schema, path)}, path
        assert valid, path


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adapter", {"rnk": 2}),
        ("adapter", {"rank": "two"}),
        ("adapter", {"kind": "lorra"}),
        ("tasks", {"suite": "toi"}),
        ("schedule", {}),
        ("optim", {"lr": None}),
        ("weights", {}),
    ],
)
def test_a_mistake_is_refused(setting, value):
    good = read(GOOD)
    assert VALIDATORS["pretrain"].is_valid(good)
    assert not VALIDATORS["pretrain"].is_valid({**good, setting: value})


def test_a_recipe_in_full_is_valid_too(tmp_path):
    full = reading.to_yaml(reading.load(PretrainConfig, ROOT / "launch" / "recipes" / "toy.yaml"))
    VALIDATORS["pretrain"].validate(read(full))


def test_every_setting_has_its_help_and_its_default():
    made = json_schema(PretrainConfig)
    parts = [made, *made["$defs"].values()]
    assert all(setting["description"] for part in parts for setting in part["properties"].values())
    lr = made["$defs"]["OptimConfig"]["properties"]["lr"]
    assert lr == {
        "default": config.OptimConfig().lr,
        "description": "Peak learning rate of the inventory.",
        "type": "number",
    }
