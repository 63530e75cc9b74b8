"""YAML as recipes mean it: words stay words, and nothing stands twice."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mhr_scale.errors import ConfigError, DataError
from mhr_scale.recipe import strict_yaml

SELF_REFERENCES = ("a: &x\n  b: *x\n", "a: &x [*x]\n", "&x a: {b: &y {c: *y}}\n", "&x {a: *x}\n")


def values_of(text):
    return strict_yaml.read(text, source="r.yaml", error=ConfigError)[0]


def places_of(text):
    return strict_yaml.read(text, source="r.yaml", error=ConfigError)[1]


def message_of(text):
    with pytest.raises(ConfigError) as caught:
        values_of(text)
    return str(caught.value)


# -- scalars ----------------------------------------------------------------------------------


def test_numbers_truth_values_and_null_are_read_as_such():
    values = {
        "1e-3": 0.001,
        "1E3": 1000.0,
        "1.5": 1.5,
        ".5": 0.5,
        "1.": 1.0,
        "-2.5e+1": -25.0,
        "-.inf": float("-inf"),
        "7": 7,
        "-7": -7,
        "+7": 7,
        "010": 10,
        "true": True,
        "False": False,
        "null": None,
        "~": None,
        "": None,
    }
    for word, value in values.items():
        read = values_of(f"a: {word}")["a"]
        assert (type(read), read) == (type(value), value), word


def test_everything_else_is_a_word():
    words = "no yes on off y n 12:30 1_000 0x10 0o17 0b1 nan inf e3 1e 2020-01-01 = << tRue None"
    assert {word: values_of(f"a: {word}")["a"] for word in words.split()} == {
        word: word for word in words.split()
    }


def test_nan_is_a_number():
    value = values_of("a: .nan")["a"]
    assert value != value


@pytest.mark.parametrize("text", ['a: "1"', "a: !!str 1"])
def test_a_quoted_number_is_a_word(text):
    assert values_of(text) == {"a": "1"}


@pytest.mark.parametrize("key", ["1e-3", "true", "null", "<<"])
def test_a_key_is_always_a_word(key):
    assert values_of(f"{key}: 1") == {key: 1}


# -- structure --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_document_is_an_empty_mapping(text):
    assert values_of(text) == {}


def test_lists_and_mappings_nest():
    assert values_of("a: [1, {b: [x]}]\n") == {"a": [1, {"b": ["x"]}]}


def test_an_anchor_may_be_used_again():
    assert values_of("a: &x {b: 1}\nc: *x\nd: [*x, *x]\n") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": [{"b": 1}, {"b": 1}],
    }


def test_a_byte_order_mark_is_no_content():
    assert values_of("\ufeffa: 1") == {"a": 1}


def test_every_key_has_a_place():
    assert places_of("a:\n  b: 1\n\n  c: [x,\n  y]\n") == {
        (): "r.yaml:1",
        ("a",): "r.yaml:1",
        ("a", "b"): "r.yaml:2",
        ("a", "c"): "r.yaml:4",
        ("a", "c", "0"): "r.yaml:4",
        ("a", "c", "1"): "r.yaml:5",
    }


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "r.yaml: expected a mapping, got list"),
        ("a: 1\na: 2\n", "r.yaml:2: key 'a' stands twice (first r.yaml:1)"),
        ("a:\n  b: 1\n  b: 1\n", "r.yaml:3: key 'a.b' stands twice (first r.yaml:2)"),
        ("a: [{b: 1, b: 2}]", "r.yaml:1: key 'a.0.b' stands twice (first r.yaml:1)"),
        ("? [1, 2]\n: 3\n", "r.yaml:1: a key must be a word"),
        ("a: 1\n? {b: 1}\n: 3\n", "r.yaml:2: a key must be a word"),
        ("a:\n  - x\n b: 1\n", "r.yaml:3: not YAML: "),
        ("a: [\n", "r.yaml:2: not YAML: "),
        ("a: b: c\n", "r.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: 1\nb:\n\tc: 1\n", "r.yaml:3: not YAML: "),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not YAML: "),
        ("a: 1\nb: *c\n", "r.yaml:2: not YAML: found undefined alias 'c'"),
        ("a: 1\nb: \x07\n", "r.yaml:2: not YAML: special characters are not allowed"),
        ("a: 1\nb: !!python/none\n", "r.yaml:2: not YAML: '' is no plain value of type python"),
        ("a: !!binary aGk=\n", "r.yaml:1: not YAML: 'aGk=' is no plain value of type binary"),
        ("a: !!timestamp 2020-01-01", "r.yaml:1: not YAML: '2020-01-01' is no plain value"),
        ("a: !!int x\n", "r.yaml:1: not YAML: 'x' is no plain value of type int"),
        ("a: !!bool x\n", "r.yaml:1: not YAML: 'x' is no plain value of type bool"),
        ("a: !!set {x}\n", "r.yaml:1: not YAML: tag:yaml.org,2002:set is no plain value"),
        ("a: !!python/tuple [x]\n", "r.yaml:1: not YAML: tag:yaml.org,2002:python/tuple is no"),
        ("a: [" * 5000, "r.yaml: not YAML: nested too deeply"),
        ("b: 1\na: " + "9" * 5000, "r.yaml:2: Exceeds the limit"),
    ],
)
def test_a_document_that_is_not_plain_is_refused_at_its_line(text, message):
    assert message_of(text).startswith(message)


@pytest.mark.parametrize("text", SELF_REFERENCES)
def test_a_value_that_holds_itself_is_refused(text):
    assert "refers to what it is part of" in message_of(text)


@pytest.mark.parametrize("text", ["a: \x07", "a: b: c", "a: [", SELF_REFERENCES[0]])
def test_an_error_is_one_line(text):
    assert "\n" not in message_of(text)


def test_the_caller_chooses_the_kind_of_error():
    with pytest.raises(DataError):
        strict_yaml.read("a: [", source="tasks.yaml", error=DataError)


def test_no_tag_runs_code(tmp_path):
    witness = tmp_path / "witness"
    message_of(f"a: !!python/object/apply:os.mkdir [{witness}]")
    assert not witness.exists()


# -- writing ----------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), PLAIN, max_size=3))
def test_what_is_written_reads_back_the_same(values):
    assert values_of(strict_yaml.write(values)) == values


def test_words_that_some_reader_takes_for_something_else_are_quoted():
    words = ["1e-3", "08", "010", "+1e5", ".5", "no", "12:30", "1_000", "0x10", "~", "2020-01-01"]
    for word in (*words, "=", "\u00e9"):
        text = strict_yaml.write({"a": word})
        assert yaml.safe_load(text) == values_of(text) == {"a": word}


def test_keys_are_written_in_their_order():
    assert strict_yaml.write({"b": 1, "a": {"d": [1], "c": None}}) == (
        "b: 1\na:\n  d:\n  - 1\n  c: null\n"
    )
