"""The command line of a verb: its words, its options and its help page."""

import shlex
import typing

import pytest
from recipe_parts import GOOD, PARTS, VERBS, parts_in

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import ConfigError
from mhr_scale.recipe import reading, settings

#: What a launch stub says of itself.
ABOUT = "Trains.\n\npretrain RECIPE [a.b=value ...]     one process"


@pytest.fixture
def parse(write):
    """Parses a command line that may name the good recipe as r.yaml."""
    write(GOOD)
    return lambda words: reading.parse(PretrainConfig, shlex.split(words), about=ABOUT)


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
        ("r.yaml --dry-run", "unknown option --dry-run; options: --print, --schema, --help"),
        ("--rank=3 r.yaml", "unknown option --rank=3; options: --print, --schema, --help"),
        ("r.yaml -v", "unknown option -v; options: --print, --schema, --help"),
        ("r.yaml r.yaml", "'r.yaml': overrides read a.b=value"),
        (
            "other.yaml",
            "other.yaml: cannot be read (No such file or directory); did you mean 'r.yaml'?",
        ),
    ],
)
def test_a_wrong_command_line_is_refused(parse, words, expected):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert str(caught.value) == expected


@pytest.mark.parametrize("words", ["--help", "-h", "r.yaml --help", "--local_rank=0 --help"])
def test_help_may_stand_anywhere_and_needs_no_recipe(words):
    assert reading.page_of(PretrainConfig, shlex.split(words), about=ABOUT)


def names_of(kind, prefix=""):
    """Dotted names of all settings below a part."""
    for name, parts in parts_in(kind):
        for part in parts:
            is_named = typing.get_origin(typing.get_type_hints(kind)[name]) is dict
            yield from names_of(part, f"{prefix}{name}.{'NAME.' if is_named else ''}")
        if not parts:
            yield prefix + name


def help_of(kind):
    """Each entry of a help page: name, and the line below it."""
    page = settings.help_text(kind).splitlines()
    return [(above.split(":")[0], below.strip()) for above, below in zip(page[::2], page[1::2])]


def test_every_field_of_every_part_has_a_help_text():
    bare = [(kind.__name__, name) for kind in PARTS for name, text in help_of(kind) if not text]
    assert bare == []


def test_the_help_page_of_every_verb_has_every_setting():
    for kind in VERBS:
        assert [name for name, _ in help_of(kind)] == list(names_of(kind)), kind


def test_the_help_page_says_what_a_setting_is():
    assert ("optim.lr", "Peak learning rate of the inventory.") in help_of(PretrainConfig)


def test_the_help_page_says_how_to_call_and_what_to_set():
    assert reading.page_of(PretrainConfig, ["r.yaml"], about=ABOUT) is None
    page = reading.page_of(PretrainConfig, ["--help"], about=ABOUT)
    assert page.startswith(ABOUT)
    assert page.endswith(settings.help_text(PretrainConfig))


def test_the_help_page_shows_type_and_default():
    expected = [
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
    ]
    page = settings.help_text(PretrainConfig).splitlines()
    assert [line for line in expected if line not in page] == []
