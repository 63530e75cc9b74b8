"""Files of prompt templates: made-up ones, and those of T0."""

import csv
import json
from pathlib import Path

import pytest
from film_templates import write

from mhr_scale.errors import DataError
from mhr_scale.tasks.t0.prompts import Prompter, Template, config_name, load_templates


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
        (
            'dataset: films\ntemplates:\n  a: !Template {name: "x\\e[2J", jinja: y ||| z}',
            ":3: template 'x\\x1b[2J': its name has a character that cannot be printed",
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
