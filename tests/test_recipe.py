import dataclasses
import shlex
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale import config, recipe, strict_yaml
from mhr_scale.config import OptimConfig, PretrainConfig, SuperNITasks, ToyTasks
from mhr_scale.engine import read_ds_config
from mhr_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
PARTS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
]


def parts_in(kind):
    """The parts among the types of a part's fields, by field."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        members = (hint, *typing.get_args(hint))
        yield field.name, [member for member in members if dataclasses.is_dataclass(member)]


INNER = {id(part) for kind in PARTS for _, parts in parts_in(kind) for part in parts}
#: What a launched verb reads: the parts that are no part of another.
VERBS = [kind for kind in PARTS if id(kind) not in INNER]

GOOD = """\
backbone: {name: "builtin:toy"}
adapter: {rank: 2}
tasks: {suite: toy}
schedule: {steps: 10}
run:
  folder: runs/x
"""

#: What a launch stub says of itself.
ABOUT = "Trains.\n\npretrain RECIPE [a.b=value ...]     one process"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes r.yaml into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "r.yaml"

    return write


@pytest.fixture
def load(write):
    def load(text=GOOD, *overrides, schema=PretrainConfig):
        return recipe.load(schema, write(text), overrides)

    return load


@pytest.fixture
def message(load):
    """The error of a recipe with `old` replaced by `new`, and of overrides."""

    def message(old, new, *overrides):
        assert old in GOOD
        with pytest.raises(ConfigError) as caught:
            load(GOOD.replace(old, new, 1), *overrides)
        return str(caught.value)

    return message


# -- precedence -------------------------------------------------------------------------------


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


def test_a_loaded_recipe_cannot_be_changed(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().adapter.rank = 4


# -- mistakes in the recipe ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # unknown keys
        ("adapter:", "adaptor:", "r.yaml:2: unknown setting 'adaptor'; did you mean 'adapter'?"),
        ("rank", "rnk", "r.yaml:2: unknown setting 'adapter.rnk'; did you mean 'rank'?"),
        ("folder: ", "floder: ", "r.yaml:6: unknown setting 'run.floder'; did you mean 'folder'?"),
        ("suite: toy", "suite: toy, sed: 1", "r.yaml:3: unknown setting 'tasks.sed'; did you mean"),
        (
            "suite: toy",
            "suite: superni, folder: d, intake: {onbad: skip}",
            "r.yaml:3: unknown setting 'tasks.intake.onbad'; did you mean 'on_bad'?",
        ),
        # wrong types
        (
            "rank: 2",
            "rank: 1.5",
            "r.yaml:2: adapter.rank: input should be a valid integer, got 1.5",
        ),
        (
            "rank: 2",
            "rank: 1.0",
            "r.yaml:2: adapter.rank: input should be a valid integer, got 1.0",
        ),
        ("rank: 2", "rank: true", "r.yaml:2: adapter.rank: input should be a valid integer, got t"),
        ("rank: 2", "rank: '2'", 'r.yaml:2: adapter.rank: input should be a valid integer, got "2'),
        ("rank: 2", "rank: ", "r.yaml:2: adapter.rank: input should be a valid integer, got null"),
        ("rank: 2", "rank: [2]", "r.yaml:2: adapter.rank: input should be a valid integer, got [2"),
        ("rank: 2", "rank: 0x2", 'r.yaml:2: adapter.rank: input should be a valid integer, got "0'),
        ("rank: 2", "alpha: many", "r.yaml:2: adapter.alpha: input should be a valid number, got"),
        ("rank: 2", "alpha: true", "r.yaml:2: adapter.alpha: input should be a valid number, got"),
        ("runs/x", "7", "r.yaml:6: run.folder: input should be a valid string, got 7"),
        ("runs/x", "", "r.yaml:6: run.folder: input should be a valid string, got null"),
        ("{steps: 10}", "10", "r.yaml:4: schedule: input should be an object, got 10"),
        ("{steps: 10}", "", "r.yaml:4: schedule: input should be an object, got null"),
        (
            "run:",
            "mixture: {first_rows: yes}\nrun:",
            'r.yaml:5: mixture.first_rows: input should be a valid boolean, got "yes"',
        ),
        (
            "suite: toy",
            "suite: superni, folder: d, tasks: [a, 5]",
            "r.yaml:3: tasks.tasks.1: input should be a valid string, got 5",
        ),
        # wrong choices
        (
            "rank: 2",
            "kind: lorra",
            "adapter.kind: 'lorra' is not 'lora' or 'ia3'; did you mean 'lora'",
        ),
        (
            "suite: toy",
            "suite: superni, folder: d, fold: trian",
            "r.yaml:3: tasks.fold: 'trian' is not 'train' or 'test'; did you mean 'train'?",
        ),
        # missing
        ("schedule: {steps: 10}\n", "", "r.yaml: setting 'schedule' is required"),
        ("steps: 10", "", "r.yaml:4: setting 'schedule.steps' is required"),
        (GOOD, "", "r.yaml: setting 'backbone' is required"),
        # no numbers
        ("steps: 10", "steps: .nan", "r.yaml:4: schedule.steps: nan is no setting"),
        ("rank: 2", "alpha: -.inf", "r.yaml:2: adapter.alpha: -inf is no setting"),
        ("rank: 2", "alpha: 1e999", "r.yaml:2: adapter.alpha: inf is no setting"),
        ("suite: toy", "suite: toy, x: [1, .inf]", "r.yaml:3: tasks.x.1: inf is no setting"),
        # documents
        (
            "rank: 2",
            "rank: 2, rank: 3",
            "r.yaml:2: key 'adapter.rank' stands twice (first r.yaml:2)",
        ),
        ("run:", "adapter: {}\nrun:", "r.yaml:5: key 'adapter' stands twice (first r.yaml:2)"),
        (GOOD, "- a\n", "r.yaml: expected a mapping, got list"),
        ("{rank: 2}", "{rank: 2", "r.yaml:3: not YAML: "),
        ("{rank: 2}", "&a {rank: *a}", "r.yaml:2: not YAML: 'adapter.rank' refers to what it is"),
        ("rank: 2", "[x]: 2", "r.yaml:2: a key must be a word"),
        # suites
        ("suite: toy", "", "r.yaml:3: setting 'tasks.suite' is required; one of toy, "),
        ("suite: toy", "seed: 1", "r.yaml:3: setting 'tasks.suite' is required; one of toy, "),
        ("{suite: toy}", "toy", "r.yaml:3: setting 'tasks.suite' is required; one of toy, "),
        ("suite: toy", "suite: tody", "r.yaml:3: tasks.suite: 'tody' is not one of toy, "),
        ("suite: toy", "suite: [toy]", "r.yaml:3: tasks.suite: '['toy']' is not one of toy, "),
        # settings that do not go together
        ("rank: 2", "rank: 0", "r.yaml:2: adapter.rank: 0 is not at least 1"),
        (
            "rank: 2",
            "block_span: 2",
            "r.yaml:2: adapter.block_span: only granularity 'blocks' reads",
        ),
        (
            'name: "builtin:toy"',
            "dropout: 0",
            "r.yaml:1: backbone: give a name (hub id or folder) or",
        ),
        (
            "steps: 10",
            "steps: 10, warmup_steps: 1, warmup_fraction: 0.1",
            "r.yaml:4: schedule: give warmup_steps or warmup_fraction, not both",
        ),
        (
            "suite: toy",
            "suite: superni, folder: d, positive_examples: 3",
            "r.yaml:3: tasks.positive_examples: 3 is not in 0..2",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_way_out(message, old, new, expected):
    assert expected in message(old, new)


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
        (b"\xff\xfe\x00", "r.yaml: not UTF-8 text (invalid start byte)"),
        (b"a: 1\nb: \x00\n", "r.yaml:2: not YAML: special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_text_is_refused(load, content, expected):
    with pytest.raises(ConfigError) as caught:
        load(content)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_recipe_that_cannot_be_read_says_why(tmp_path, path, reason):
    with pytest.raises(ConfigError) as caught:
        recipe.load(PretrainConfig, tmp_path / path)
    assert str(caught.value).endswith(f"cannot be read ({reason})")


# -- mistakes in overrides ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rnk=1", "'adapter.rnk=1': unknown setting 'adapter.rnk'; did you mean 'rank'?"),
        ("adaptor.rank=1", "'adaptor.rank=1': unknown setting 'adaptor'; did you mean 'adapter'?"),
        ("adapter.rank=1.5", "'adapter.rank=1.5': adapter.rank: input should be a valid integer"),
        ("adapter.rank=no", "'adapter.rank=no': adapter.rank: input should be a valid integer"),
        ("adapter.rank=", "'adapter.rank=': adapter.rank: input should be a valid integer"),
        ("adapter.rank.x=1", "'adapter.rank.x=1': adapter.rank: input should be a valid integer"),
        ("adapter.rank=0", "'adapter.rank=0': adapter.rank: 0 is not at least 1"),
        ("optim.lr=nan", "'optim.lr=nan': optim.lr: input should be a valid number, got \"nan\""),
        ("optim.lr=.nan", "'optim.lr=.nan': optim.lr: nan is no setting"),
        ("adapter", "'adapter': overrides read a.b=value"),
        ("=1", "'=1': overrides read a.b=value"),
        (".rank=1", "'.rank=1': overrides read a.b=value"),
        ("adapter..rank=1", "'adapter..rank=1': overrides read a.b=value"),
        ("run.folder=[a", "'run.folder=[a':1: not YAML: "),
        ("run.folder=a: b", "'run.folder=a: b':1: not YAML: "),
        ("tasks.suite=superni", "'tasks.suite=superni': setting 'tasks.folder' is required"),
        ("tasks.suite=jsnl", "'tasks.suite=jsnl': tasks.suite: 'jsnl' is not one of"),
        ("tasks={suite: toy, seed: x}", "'tasks={suite: toy, seed: x}': tasks.seed: input should"),
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


# -- writing a recipe ---------------------------------------------------------------------------


def schemas_of(path):
    """The verbs a recipe could be for, and the errors of those it is not for."""
    found, errors = [], []
    for kind in VERBS:
        try:
            found.append((kind, recipe.load(kind, path)))
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


def test_a_shipped_recipe_written_in_full_loads_to_the_same_values(shipped, tmp_path):
    for kind, loaded in shipped:
        (tmp_path / "full.yaml").write_text(recipe.to_yaml(loaded), encoding="utf-8")
        assert recipe.load(kind, tmp_path / "full.yaml") == loaded


def test_a_shipped_recipe_names_a_deepspeed_file_that_is_there(shipped):
    for _, loaded in shipped:
        run = getattr(loaded, "run", None)
        assert "zero_optimization" in read_ds_config(getattr(run, "ds_config", None))


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_a_shipped_recipe_writes_numbers_that_every_reader_of_yaml_takes_for_numbers(path):
    def leaves(values):
        if isinstance(values, dict | list):
            for inner in values.values() if isinstance(values, dict) else values:
                yield from leaves(inner)
        else:
            yield values

    text = path.read_text(encoding="utf-8")
    ours = strict_yaml.read(text, source=path.name, error=ConfigError)[0]
    assert list(leaves(yaml.safe_load(text))) == list(leaves(ours))


def test_a_written_recipe_holds_every_setting(load):
    tree = yaml.safe_load(recipe.to_yaml(load()))
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
    path.write_text(recipe.to_yaml(made), encoding="utf-8", newline="")
    assert recipe.load(PretrainConfig, path) == made


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def parse(write):
    """Parses a command line that may name the good recipe as r.yaml."""
    write(GOOD)
    return lambda words: recipe.parse(PretrainConfig, shlex.split(words), about=ABOUT)


def test_a_command_is_a_recipe_and_overrides(parse):
    command = parse("r.yaml adapter.rank=4 run.folder='two words'")
    assert (command.config.adapter.rank, command.config.run.folder) == (4, "two words")


@pytest.mark.parametrize("words", ["--local_rank=1 r.yaml", "r.yaml --local_rank=0 adapter.rank=2"])
def test_the_launchers_local_rank_is_ignored(parse, words):
    assert parse(words).config.adapter.rank == 2


@pytest.mark.parametrize("words", ["--print r.yaml", "r.yaml --print", "r.yaml --print optim.lr=1"])
def test_print_may_stand_anywhere(parse, words):
    assert parse(words).print_only


def test_without_print_a_command_runs(parse):
    assert not parse("r.yaml").print_only


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "no recipe given; usage: pretrain RECIPE [a.b=value ...]"),
        ("--print", "no recipe given; usage: pretrain RECIPE [a.b=value ...]"),
        ("adapter.rank=1", "no recipe given; usage: pretrain RECIPE [a.b=value ...]"),
        ("r.yaml --dry-run", "unknown option --dry-run; options: --print, --help"),
        ("--rank=3 r.yaml", "unknown option --rank=3; options: --print, --help"),
        ("r.yaml -v", "unknown option -v; options: --print, --help"),
        ("r.yaml r.yaml", "'r.yaml': overrides read a.b=value"),
        ("other.yaml", "other.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_command_line_is_refused(parse, words, expected):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert str(caught.value) == expected


@pytest.mark.parametrize("words", ["--help", "-h", "r.yaml --help", "--local_rank=0 --help"])
def test_help_leaves_with_code_0(parse, words):
    with pytest.raises(SystemExit) as left:
        parse(words)
    assert left.value.code == 0


def settings_of(kind, prefix=""):
    """Dotted names of all settings below a part."""
    for name, parts in parts_in(kind):
        for part in parts:
            is_named = typing.get_origin(typing.get_type_hints(kind)[name]) is dict
            yield from settings_of(part, f"{prefix}{name}.{'NAME.' if is_named else ''}")
        if not parts:
            yield prefix + name


def help_of(kind):
    """Each entry of a help page: name, and the line below it."""
    page = recipe.help_text(kind).splitlines()
    return [(above.split(":")[0], below.strip()) for above, below in zip(page[::2], page[1::2])]


@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_every_field_of_every_part_has_a_help_text(kind):
    assert [name for name, text in help_of(kind) if not text] == []


@pytest.mark.parametrize("kind", VERBS, ids=lambda kind: kind.__name__)
def test_the_help_page_has_every_setting(kind):
    assert [name for name, _ in help_of(kind)] == list(settings_of(kind))


def test_the_help_page_says_what_a_setting_is():
    assert ("optim.lr", "Peak learning rate of the inventory.") in help_of(PretrainConfig)


def test_the_help_page_says_how_to_call_and_what_to_set(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    page = capsys.readouterr().out
    assert page.startswith(ABOUT)
    assert page.endswith(recipe.help_text(PretrainConfig))


@pytest.mark.parametrize(
    "line",
    [
        "schedule.steps: int (required)",
        "optim.lr: float (default 0.001)",
        "optim.clip_norm: float | null (default 1.0)",
        "mixture.first_rows: bool (default false)",
        "backbone.name: str | null (default null)",
        "adapter.kind: lora | ia3 (default lora)",
        "tasks.suite: superni (required)",
        "tasks.tasks: [str, ...] (default [])",
        "tasks.max_rows: int | cap | null (default null)",
        "backbone.config: {name: value, ...} | null (default null)",
        "mixture.weights: {name: float, ...} (default {})",
    ],
)
def test_the_help_page_shows_type_and_default(line):
    assert line in recipe.help_text(PretrainConfig).splitlines()
