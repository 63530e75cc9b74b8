import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhr_scale.errors import DataError
from mhr_scale.tasks.prompts import Prompter, Rendered, Template, config_name, load_templates

FILE = """\
dataset: films
subset: {subset}
templates:
  one-id: !Template
    answer_choices: bad ||| good
    id: one-id
    jinja: '{{{{text}}}} Verdict? ||| {{{{answer_choices[label]}}}}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: verdict
    reference: ''
  two-id: !Template
    answer_choices: null
    id: two-id
    jinja: "{second}"
    metadata: !TemplateMetadata
      metrics: []
    name: {name}
    reference: ''
"""
CHOICE = "{{ range(1000) | choice }} {{ range(1000) | choice }} ||| {{ range(1000) | choice }}"


def write(folder, *, subset="null", second="Write. ||| {{text}}", name="author"):
    path = folder / "films" / ("" if subset == "null" else subset) / "templates.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FILE.format(subset=subset, second=second, name=name), encoding="utf-8")
    return path


def template(jinja, choices=None, **fields):
    given = {"name": "t", "dataset": "films", "subset": None, "id": "an-id", **fields}
    return Template(jinja=jinja, answer_choices=choices, is_original_task=True, metrics=(), **given)


def render(jinja, row=None, *, choices=None, row_id="0", **options):
    return Prompter(**options).render(template(jinja, choices), row or {}, row_id=row_id)


def fault(jinja, row=None, **options):
    with pytest.raises(DataError) as raised:
        render(jinja, row, **options)
    return str(raised.value)


def load_fault(folder, dataset="films", subset=None):
    with pytest.raises(DataError) as raised:
        load_templates(folder, dataset, subset)
    return str(raised.value)


# Template files


def test_templates_come_sorted_by_name_with_what_the_file_says(tmp_path):
    write(tmp_path)
    author, verdict = load_templates(tmp_path, "films", None)
    assert verdict == Template(
        name="verdict",
        dataset="films",
        subset=None,
        jinja="{{text}} Verdict? ||| {{answer_choices[label]}}",
        answer_choices="bad ||| good",
        is_original_task=True,
        metrics=("Accuracy",),
        id="one-id",
    )
    assert (author.name, author.answer_choices, author.is_original_task) == ("author", None, False)


def test_a_subset_is_a_folder_of_the_data_set(tmp_path):
    write(tmp_path, subset="old")
    assert {made.source for made in load_templates(tmp_path, "films", "old")} == {"films/old"}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("super_glue", "rte", "GPT-3 style"), "super_glue_rte_GPT_3_style"),
        (("imdb", None, "Sentiment with choices "), "imdb_Sentiment_with_choices_"),
        (("cnn_dailymail", "3.0.0", "spice_up"), "cnn_dailymail_3.0.0_spice_up"),
        (("ai2_arc", "ARC-Easy", "a/b (c)"), "ai2_arc_ARC_Easy_a_b_c_"),
    ],
)
def test_tasks_are_named_as_in_p3(parts, name):
    assert config_name(*parts) == name


def test_a_missing_folder_is_named(tmp_path):
    assert load_fault(tmp_path / "no") == f"{tmp_path / 'no'}: no such folder of templates"


def test_an_unknown_data_set_is_answered_with_a_suggestion_and_what_is_there(tmp_path):
    write(tmp_path)
    message = load_fault(tmp_path, "flims")
    assert "no templates of 'flims'; did you mean 'films'?; there are: films" in message


def test_an_unknown_subset_is_answered_with_the_subsets_of_the_data_set(tmp_path):
    write(tmp_path, subset="old")
    write(tmp_path / "x", subset="new")
    message = load_fault(tmp_path, "films", "odl")
    assert message.endswith("did you mean 'films/old'?; there are: films/old")


def test_the_file_must_be_of_the_data_set_its_folder_names(tmp_path):
    path = write(tmp_path, subset="old")
    path.rename(path.parents[1] / "templates.yaml")
    message = load_fault(tmp_path)
    assert "templates.yaml: holds templates of dataset 'films', subset 'old'" in message


def test_broken_yaml_is_reported_with_its_line(tmp_path):
    path = write(tmp_path, name="[author")
    assert load_fault(tmp_path).startswith(f"{path}:22: not YAML: ")


def test_bytes_that_are_no_text_are_reported(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"dataset: films\xff")
    assert load_fault(tmp_path).startswith(f"{path}: cannot be read: 'utf-8' codec")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", ": expected 'dataset', 'subset' and a mapping 'templates'"),
        ("dataset: films", ": expected 'dataset', 'subset' and a mapping 'templates'"),
        ("dataset: films\ntemplates: {a: {name: x}}", ": templates: 'a' is no !Template"),
        ("dataset: films\ntemplates: !!python/name:os.system", ":2: not YAML: could not determine"),
        ("dataset: films\ntemplates:\n  a: !Template x", ":3: not YAML: expected a mapping node"),
        ("dataset: films\ndataset: films", ":2: not YAML: key 'dataset' stands twice"),
        (
            "dataset: films\ntemplates:\n  a: !Template {jinja: x}",
            ":3: 'name' of template 'a' is missing or no text",
        ),
        (
            "dataset: films\ntemplates:\n  a: !Template {name: x, jinja: 5}",
            ":3: 'jinja' of template 'a' is missing or no text",
        ),
        (
            "dataset: films\ntemplates:\n  a: !Template {name: x, jinja: y, answer_choices: 1}",
            ":3: template 'x': 'answer_choices' is no text",
        ),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    path = write(tmp_path)
    path.write_text(text)
    assert load_fault(tmp_path).startswith(f"{path}{message}")


def test_two_templates_of_one_name_are_refused(tmp_path):
    path = write(tmp_path, name="verdict")
    message = f"{path}:15: template 'verdict' stands twice; rename one"
    assert load_fault(tmp_path) == message


@pytest.mark.parametrize(("second", "found"), [("{{text}}", 0), ("a ||| b ||| c", 2)])
def test_a_template_has_one_separator(tmp_path, second, found):
    path = write(tmp_path, second=second)
    assert load_fault(tmp_path) == (
        f"{path}:15: template 'author': 'jinja' has {found} '|||', expected <input> ||| <target>"
    )


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (r"a\n{{ text } ||| b", "line 2: unexpected '}'"),
        ("a ||| {{ text | chioce }}", "line 1: No filter named 'chioce'."),
        ("{% include 'x' ||| b", "line 1: expected token 'name', got '|'"),
    ],
)
def test_broken_jinja_is_reported_with_file_template_and_line(tmp_path, second, reason):
    path = write(tmp_path, second=second)
    assert load_fault(tmp_path).startswith(f"{path}:15: template 'author': 'jinja', {reason}")


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
        "from mhr_scale.tasks.prompts import Prompter, Template\n"
        f"made = Template(name='t', dataset='films', subset=None, jinja={CHOICE!r}, "
        "answer_choices=None, is_original_task=True, metrics=(), id='an-id')\n"
        "print(Prompter().render(made, {}, row_id='0').input)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == render(CHOICE).input


# The templates of T0


@pytest.fixture(scope="module")
def t0_templates(shared: Path) -> list[Template]:
    folder = shared / "data" / "promptsource_templates" / "templates"
    places = [path.parent.relative_to(folder).parts for path in folder.rglob("templates.yaml")]
    return [made for place in places for made in load_templates(folder, *(*place, None)[:2])]


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_all_templates_of_t0_load(t0_templates):
    assert (len(t0_templates), len({made.id for made in t0_templates})) == (562, 562)


@pytest.mark.parametrize("options", [{}, {"max_characters": None}], ids=["cut", "whole"])
def test_all_templates_of_t0_compile_and_want_fields(t0_templates, options):
    prompter = Prompter(**options)
    for made in t0_templates:
        with pytest.raises(DataError, match="is undefined"):
            prompter.render(made, {}, row_id="0")


def test_all_templates_of_t0_are_named_as_in_the_list_of_tasks(t0_templates, shared):
    tasks = rows_of(shared / "data" / "t0_mixture" / "t0_tasks.csv")
    assert {made.id: made.config_name for made in t0_templates} == {
        task["template_id"]: task["task"] for task in tasks
    }


@pytest.mark.parametrize(
    ("file", "mixtures"),
    [
        ("t0_train_313.txt", {"BASE"}),
        ("t0_plus_train_392.txt", {"BASE", "GPT_EVAL"}),
        ("t0_plusplus_train_464.txt", {"BASE", "GPT_EVAL", "SGLUE"}),
    ],
)
def test_the_naming_rule_gives_the_mixtures_of_t0(t0_templates, shared, file, mixtures):
    folder = shared / "data" / "t0_mixture"
    chosen = {
        (row["HF_name"], row["subset"] or None)
        for row in rows_of(folder / "datasets.csv")
        if row["do_train"] in mixtures
    }
    refused = {row["task"] for row in rows_of(folder / "t0_tasks.csv") if row["blacklisted"] == "1"}
    names = [made.config_name for made in t0_templates if (made.dataset, made.subset) in chosen]
    assert sorted(set(names) - refused) == sorted((folder / file).read_text().split())
    assert len(names) == len(set(names))


def test_p3_has_every_task_that_t0_trains_on(t0_templates, shared):
    folder = shared / "data" / "t0_mixture"
    names = set(json.loads((folder / "p3_hub_configs.json").read_text()))
    ours = {made.config_name for made in t0_templates}
    assert ours & names >= set((folder / "t0_train_313.txt").read_text().split())
