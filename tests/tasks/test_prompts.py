"""Rows rendered by prompt templates: texts, choices, filters, and what fails."""

import os
import subprocess
import sys

import pytest
from film_templates import write

from mhr_scale.errors import DataError
from mhr_scale.tasks.t0.prompts import Prompter, Rendered, Template, load_templates

CHOICE = "{{ range(1000) | choice }} {{ range(1000) | choice }} ||| {{ range(1000) | choice }}"


def template(jinja, choices=None, **fields):
    given = {"name": "t", "dataset": "films", "subset": None, "id": "an-id", **fields}
    return Template(jinja=jinja, answer_choices=choices, is_original_task=True, metrics=(), **given)


def render(jinja, row=None, *, choices=None, row_id="0", **options):
    return Prompter(**options).render(template(jinja, choices), row or {}, row_id=row_id)


def fault(jinja, row=None, **options):
    with pytest.raises(DataError) as raised:
        render(jinja, row, **options)
    return str(raised.value)


# Rendering


def test_a_row_becomes_input_target_and_choices(tmp_path):
    write(tmp_path)
    _, verdict = load_templates(tmp_path, "films", None)
    made = Prompter().render(verdict, {"text": "Fine.", "label": 1}, row_id="0")
    assert made == Rendered("Fine. Verdict?", "good", ("bad", "good"))


def test_choices_may_come_from_the_row():
    made = render(
        "{{ q }} ||| {{ answer_choices[1] }}",
        {"q": "Which?", "options": [" a", "b "]},
        choices='{{ options | join("|||") }}',
    )
    assert made == Rendered("Which?", "b", ("a", "b"))


def test_ends_are_stripped_and_the_rest_is_kept():
    assert render("\n a  b\n\nc \n||| \n d ") == Rendered("a  b\n\nc", "d", ())


@pytest.mark.parametrize("value", ["a|||b", "|||", "a | b || c ||| d |||| e"])
def test_pipes_in_a_field_survive(value):
    assert render("x {{ f }} ||| {{ f }} y", {"f": value}) == Rendered(
        f"x {value}", f"{value} y", ()
    )


def test_pipes_survive_in_lists_objects_and_choices():
    row = {"f": ["a|||b", {"c": "d|||e"}]}
    made = render("{{ f[1].c }} ||| {{ answer_choices[0] }}", row, choices="{{ f[0] }} ||| no")
    assert made == Rendered("d|||e", "a|||b", ("a|||b", "no"))


def test_rendering_leaves_the_row_alone():
    row = {"f": ["a|||b"], "g-h": "x"}
    render("{{ f }} ||| {{ g_h }}", row)
    assert row == {"f": ["a|||b"], "g-h": "x"}


def test_a_hyphen_in_a_field_is_an_underscore():
    assert render("{{ label_coarse }} ||| x", {"label-coarse": 3}).input == "3"


def test_every_printed_value_is_cut_at_2048_characters_by_default():
    long = "word " * 1000
    made = render("{{ a }} / {{ b }} ||| {{ a }}", {"a": long, "b": "short"})
    cut = ("word " * 409)[:-1] + "..."
    assert made == Rendered(f"{cut} / short", cut, ())


def test_the_cut_can_be_switched_off():
    long = "word " * 1000
    assert render("{{ a }} ||| x", {"a": long}, max_characters=None).input == long.strip()


def test_choices_are_not_cut():
    made = render("a ||| {{ answer_choices[0] }}", {"c": "x" * 3000}, choices="{{ c }}")
    assert (len(made.target), len(made.choices[0])) == (2048, 3000)


def test_white_space_control_works_with_the_cut():
    assert render("{{- a -}} b ||| {{ a -}}  c", {"a": "x" * 3000}, max_characters=5) == Rendered(
        "xx...b", "xx...c", ()
    )


@pytest.mark.parametrize(
    "jinja", ["{% if x %}a ||| b{% endif %}", "{{ x }} ||| a", "a ||| {{ x }}"]
)
def test_an_empty_render_is_dropped(jinja):
    assert render(jinja, {"x": ""}) is None


@pytest.mark.parametrize(
    ("jinja", "texts"),
    [
        ("{% if x %}a ||| b{% endif %}", ("<NO INPUT>", "<NO LABEL>")),
        ("a ||| {{ x }}", ("a", "<NO LABEL>")),
        ("{{ x }} ||| a", ("", "a")),
        ("a ||| b", ("a", "b")),
    ],
)
def test_an_empty_render_can_become_what_tfew_trains_on(jinja, texts):
    made = render(jinja, {"x": ""}, empty_render="placeholder")
    assert (made.input, made.target) == texts


def test_a_missing_item_of_a_field_renders_empty():
    assert render("a ||| {{ answers.text[0] }}", {"answers": {"text": []}}) is None


def test_a_missing_field_is_an_error_that_names_data_set_template_and_row():
    assert fault("{{ txet }} ||| a", {"text": "x", "label": 1}, row_id="train:7") == (
        "films: template 't' cannot render row train:7: 'txet' is undefined (fields: text, label); "
        "mend the row or leave the template out"
    )


@pytest.mark.parametrize(
    ("jinja", "row", "reason"),
    [
        ("{% if txet %}a{% endif %} ||| a", {"text": "x"}, "'txet' is undefined"),
        ("{{ text.lower() }} ||| a", {"text": None}, "'None' has no attribute 'lower'"),
        ("{{ n + 'a' }} ||| a", {"n": 0}, "unsupported operand type(s) for +: 'int' and 'str'"),
        ("{{ [] | choice }} ||| a", {}, "a choice from nothing"),
        ("a ||| b", {"answer_choices": []}, "a field is called 'answer_choices'"),
        ("a ||| {{ {'x': {}} }}", {}, "unexpected '|' (once cut to 2048 characters)"),
    ],
)
def test_a_render_that_fails_is_a_data_error(jinja, row, reason):
    assert f"films: template 't' cannot render row 0: {reason}" in fault(jinja, row)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ zip.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ row.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(attack):
    assert "cannot render row 0" in fault(f"{attack} ||| a", {"row": [0]})


# Filters


def test_the_filters_of_promptsource():
    jinja = (
        "{{ ['a', 'b', 'b', 'c', 'c'] | most_frequent | join(',') }} {{ [] | most_frequent }} "
        "{% for x, y in zip([1, 2], [3, 4]) %}{{ x }}{{ y }} {% endfor %} ||| {{ 'a' | highlight }}"
    )
    target = "<span style='color: #F08080'>a</span>"
    assert render(jinja) == Rendered("b,c None 13 24", target, ())


def test_a_choice_depends_on_the_seed_the_template_and_the_row_alone():
    prompter, one, other = Prompter(seed=1), template(CHOICE), template(CHOICE, id="other")
    first = prompter.render(one, {}, row_id="0")
    assert prompter.render(one, {}, row_id="1") != first
    assert prompter.render(other, {}, row_id="0") != first
    assert Prompter(seed=2).render(one, {}, row_id="0") != first
    assert Prompter(seed=1).render(one, {}, row_id="0") == first


def test_choices_of_one_render_are_independent():
    made = render(CHOICE)
    assert len({*made.input.split(), made.target}) == 3


def test_every_item_is_chosen_about_as_often():
    prompter, made = Prompter(), template("{{ ['a', 'b', 'c'] | choice }} ||| x")
    texts = [prompter.render(made, {}, row_id=str(row)).input for row in range(3000)]
    assert all(900 < texts.count(item) < 1100 for item in "abc")


def test_jinja_s_own_random_filter_is_seeded_too():
    jinja = "{{ range(10 ** 5 - 1) | random }} ||| x"
    assert render(jinja) == render(jinja)


def test_a_choice_is_the_same_in_every_process():
    code = (
        "from mhr_scale.tasks.t0.prompts import Prompter, Template\n"
        f"made = Template(name='t', dataset='films', subset=None, jinja={CHOICE!r}, "
        "answer_choices=None, is_original_task=True, metrics=(), id='an-id')\n"
        "print(Prompter().render(made, {}, row_id='0').input)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == render(CHOICE).input
