"""Mistakes in a recipe and in overrides: each is named with its place and the way out."""

import dataclasses
import re
from pathlib import Path

import pytest
from processes import ROOT
from recipe_parts import GOOD

from mhr_scale import config
from mhr_scale.config import EvaluateConfig, PretrainConfig, ToyTasks
from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe import reading
from mhr_scale.run import files
from mhr_scale.run.run_folder import RunFolder


@pytest.fixture
def message(load):
    """The error of a recipe with `old` replaced by `new`, and of overrides."""

    def message(old, new, *overrides):
        assert old in GOOD
        with pytest.raises(ConfigError) as caught:
            load(GOOD.replace(old, new, 1), *overrides)
        return str(caught.value)

    return message


# -- mistakes in the recipe ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # settings of several types
        (
            "rank: 2",
            "layout: [q_proj, null]",
            'r.yaml:2: adapter.layout: ["q_proj", null] is not str | [str, ...]',
        ),
        ("rank: 2", "blocks: [0, 1]", "r.yaml:2: adapter.blocks: [0, 1] is not str | int"),
        # unknown keys
        ("adapter:", "adaptor:", "r.yaml:2: unknown setting 'adaptor'; did you mean 'adapter'?"),
        ("rank", "rnk", "r.yaml:2: unknown setting 'adapter.rnk'; did you mean 'rank'?"),
        ("adapter:", "lr: 1\nadapter:", "r.yaml:2: unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("suite: toy", "suite: toy, sed: 1", "r.yaml:3: unknown setting 'tasks.sed'"),
        (
            "suite: toy",
            "suite: superni, folder: d, intake: {onbad: skip}",
            "r.yaml:3: unknown setting 'tasks.intake.onbad'; did you mean 'on_bad'?",
        ),
        # wrong types
        ("rank: 2", "rank: 1.0", "r.yaml:2: adapter.rank: | integer, got 1.0"),
        ("rank: 2", "rank: true", "r.yaml:2: adapter.rank: | integer, got true"),
        ("rank: 2", "rank: '2'", 'r.yaml:2: adapter.rank: | integer, got "2"'),
        ("rank: 2", "rank: ", "r.yaml:2: adapter.rank: | integer, got null"),
        ("rank: 2", "rank: [2]", "r.yaml:2: adapter.rank: | integer, got [2]"),
        ("rank: 2", "alpha: many", 'r.yaml:2: adapter.alpha: | number, got "many"'),
        ("rank: 2", "alpha: true", "r.yaml:2: adapter.alpha: | number, got true"),
        ("runs/x", "7", "r.yaml:6: run.folder: | string, got 7"),
        ("{steps: 10}", "10", "r.yaml:4: schedule: | object, got 10"),
        ("{steps: 10}", "", "r.yaml:4: schedule: | object, got null"),
        (
            "run:",
            "mixture: {first_rows: yes}\nrun:",
            'r.yaml:5: mixture.first_rows: | boolean, got "yes"',
        ),
        (
            "suite: toy",
            "suite: superni, folder: d, tasks: [a, 5]",
            "r.yaml:3: tasks.tasks.1: | string, got 5",
        ),
        # wrong choices
        (
            "rank: 2",
            "kind: lorra",
            "r.yaml:2: adapter.kind: 'lorra' | 'ia3'; did you mean 'lora'",
        ),
        # missing
        ("schedule: {steps: 10}\n", "", "r.yaml: setting 'schedule' is required"),
        ("steps: 10", "", "r.yaml:4: setting 'schedule.steps' is required"),
        (GOOD, "", "r.yaml: setting 'backbone' is required"),
        # no numbers
        ("steps: 10", "steps: .nan", "r.yaml:4: schedule.steps: nan "),
        ("rank: 2", "alpha: 1e999", "r.yaml:2: adapter.alpha: inf "),
        ("suite: toy", "suite: toy, x: [1, -.inf]", "r.yaml:3: tasks.x.1: -inf "),
        # documents: more in test_strict_yaml.py
        ("run:", "adapter: {}\nrun:", "r.yaml:5: key 'adapter' | r.yaml:2"),
        # suites
        ("suite: toy", "seed: 1", "r.yaml:3: setting 'tasks.suite' is required; | toy, "),
        ("{suite: toy}", "toy", "r.yaml:3: setting 'tasks.suite' is required; | toy, "),
        ("suite: toy", "suite: tody", "r.yaml:3: tasks.suite: 'tody' | toy, "),
        ("suite: toy", "suite: [toy]", "r.yaml:3: tasks.suite: '['toy']' | toy, "),
        # settings that do not go together
        ("rank: 2", "rank: 0", "r.yaml:2: adapter.rank: 0 "),
        ("rank: 2", "block_span: 2", "r.yaml:2: adapter.block_span: | 'blocks'"),
        ('name: "builtin:toy"', "dropout: 0", "r.yaml:1: backbone: | name"),
        (
            "steps: 10",
            "steps: 10, warmup_steps: 1, warmup_fraction: 0.1",
            "r.yaml:4: schedule: | warmup_steps | warmup_fraction",
        ),
        (
            "suite: toy",
            "suite: superni, folder: d, positive_examples: 3",
            "r.yaml:3: tasks.positive_examples: 3 | 0..2",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_way_out(message, old, new, expected):
    place, *words = expected.split(" | ")
    found = message(old, new)
    assert found.startswith(place)
    assert all(word in found for word in words), found


def test_an_unknown_suite_comes_with_a_suggestion(message):
    assert message("suite: toy", "suite: superny").endswith("; did you mean 'superni'?")


def test_an_unknown_key_unlike_any_other_comes_with_the_known_ones(message):
    assert message("rank: 2", "zzz: 2").endswith(
        "unknown setting 'adapter.zzz'; known here: "
        + ", ".join(field.name for field in dataclasses.fields(config.AdapterConfig))
    )


def test_a_misspelt_required_setting_is_called_unknown_rather_than_missing(message):
    assert message("steps", "stesp") == (
        "r.yaml:4: unknown setting 'schedule.stesp'; did you mean 'steps'?"
    )


def test_a_mistake_in_a_part_of_a_union_names_that_parts_fields_only(message):
    assert message("suite: toy", "suite: toy, zzz: 1") == (
        "r.yaml:3: unknown setting 'tasks.zzz'; known here: "
        + ", ".join(field.name for field in dataclasses.fields(ToyTasks))
    )


def test_another_suites_required_field_is_not_asked_for(message):
    assert message("suite: toy", "suite: superni") == "r.yaml:3: setting 'tasks.folder' is required"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00", "r.yaml: not UTF-8"),
        (b"a: 1\nb: \x00\n", "r.yaml:2: not YAML"),
    ],
)
def test_a_file_that_is_no_text_is_refused(load, content, expected):
    with pytest.raises(ConfigError) as caught:
        load(content)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_recipe_that_cannot_be_read_says_why(tmp_path, path, reason):
    with pytest.raises(ConfigError) as caught:
        reading.load(PretrainConfig, tmp_path / path)
    assert str(tmp_path / path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_recipe_that_is_not_there_comes_with_those_that_are(tmp_path):
    for name in ("toy.yaml", "other.yaml"):
        (tmp_path / name).write_text("")
    for path, expected in (
        ("tpy.yaml", "did you mean 'toy.yaml'?"),
        (
            ".",
            f"recipes in {tmp_path}: other.yaml, toy.yaml; give the path of a recipe, or a name "
            "that `mhr_scale recipes` lists",
        ),
        ("toy_averag", "did you mean 'toy_average'?"),
        ("none/toi.yaml", "did you mean 'toy'?"),
        ("none/mine", "give the path of a recipe, or a name that `mhr_scale recipes` lists"),
    ):
        with pytest.raises(ConfigError, match=f"; {re.escape(expected)}$"):
            reading.load(PretrainConfig, tmp_path / path)


@pytest.mark.parametrize("path", ["/dev/zero", "long.yaml"])
def test_a_recipe_without_end_is_not_read_to_its_end(tmp_path, path):
    (tmp_path / "long.yaml").write_text("a: 1\n" * 300_000)
    with pytest.raises(ConfigError, match=r"longer than 1048576 bytes, the most"):
        reading.load(PretrainConfig, tmp_path / path)


def test_a_json_file_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 1000)
    with pytest.raises(RunError, match=r"/dev/zero: longer than 1000 bytes, .*; move it away"):
        files.read_json(Path("/dev/zero"), RunError, way_out="move it away")


def test_a_recipe_of_another_verb_is_called_so(tmp_path):
    recipes = ROOT / "launch" / "recipes"
    with pytest.raises(ConfigError, match=r"toy\.yaml: a recipe of pretrain, not of evaluate$"):
        reading.load(EvaluateConfig, recipes / "toy.yaml")
    with pytest.raises(ConfigError, match=r"adapt\.yaml: a recipe of adapt, not of pretrain$"):
        reading.load(PretrainConfig, recipes / "toy_adapt.yaml")
    stored = tmp_path / "config.yaml"
    stored.write_text(reading.to_yaml(reading.load(PretrainConfig, recipes / "toy.yaml")))
    folder = RunFolder(tmp_path, EvaluateConfig)
    with pytest.raises(RunError, match="a recipe of pretrain, not of evaluate; use another run"):
        folder.read_recipe()


# -- mistakes in overrides ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rnk=1", "'adapter.rnk=1': unknown setting 'adapter.rnk'; did you mean 'rank'?"),
        ("adaptor.rank=1", "'adaptor.rank=1': unknown setting 'adaptor'; did you mean 'adapter'?"),
        ("adapter.rank=no", "'adapter.rank=no': adapter.rank: "),
        ("adapter.rank=", "'adapter.rank=': adapter.rank: "),
        ("adapter.rank.x=1", "'adapter.rank.x=1': adapter.rank: "),
        ("adapter.rank=0", "'adapter.rank=0': adapter.rank: 0 "),
        ("optim.lr=.nan", "'optim.lr=.nan': optim.lr: nan "),
        ("adapter", "'adapter': overrides"),
        ("=1", "'=1': overrides"),
        ("adapter..rank=1", "'adapter..rank=1': overrides"),
        ("run.folder=a: b", "'run.folder=a: b':1: not YAML: "),
        ("tasks.suite=superni", "'tasks.suite=superni': setting 'tasks.folder' "),
        ("tasks.suite=jsnl", "'tasks.suite=jsnl': tasks.suite: 'jsnl' "),
        ("tasks={suite: toy, seed: x}", "'tasks={suite: toy, seed: x}': tasks.seed: "),
    ],
)
def test_a_mistake_in_an_override_names_the_override(message, override, expected):
    assert message("suite: toy", "suite: toy, seed: 1", override).startswith(expected)


def test_a_mistake_in_the_file_is_not_blamed_on_an_override(message):
    assert message("rank: 2", "rank: x, alpha: 1", "adapter.alpha=2").startswith(
        "r.yaml:2: adapter.r"
    )


@pytest.mark.parametrize("override", ["run.folder=[a", "adapter.rnk=1", "adapter.rank=a\nb"])
def test_an_error_is_one_line(message, override):
    assert len(message("rank", "rank", override).splitlines()) == 1
