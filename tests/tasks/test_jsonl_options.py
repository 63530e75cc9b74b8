"""`tasks.yaml` beside JSONL files: what it sets, and what is refused."""

import pytest

from mhr_scale.config import JsonlTasks
from mhr_scale.errors import DataError
from mhr_scale.tasks.task import Intake

PLAIN = '{"input": "x", "target": "y"}\n'
RANKED = '{"input": "x", "target": "y", "choices": ["y", "z"]}\n'


def read_with(folder, text, rows=PLAIN):
    (folder / "t").mkdir()
    (folder / "t" / "train.jsonl").write_text(rows)
    (folder / "tasks.yaml").write_text(text)
    (task,) = JsonlTasks(suite="jsonl", folder=str(folder)).read_tasks(Intake())
    return task


def test_options_of_a_task_are_read(tmp_path):
    task = read_with(
        tmp_path, "t: {cap: 5, weight: 1e-1, metric: exact_match, max_input_tokens: 64}"
    )
    assert (task.cap, task.weight, task.metric, task.max_input_tokens) == (
        5,
        0.1,
        "exact_match",
        64,
    )


def test_an_empty_options_file_is_allowed(tmp_path):
    assert read_with(tmp_path, "# nothing yet\n").cap is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u: {cap: 5}", r"tasks\.yaml: no task 'u' in .*; there are: t$"),
        ("t: {cpa: 5}", r"tasks\.yaml:1: t: unknown key 'cpa'; did you mean 'cap'\?"),
        (
            "t: {metric: 'evaluate:'}",
            r"t: metric: 'evaluate:' is not a metric; known: acc.*",
        ),
        ("t: {metric_options: {times: 1}}", "only a metric 'evaluate:NAME_OR_FOLDER' has some"),
        ("t: {metric: rougeL, metric_options: {}}", "t: metric_options: only a metric 'evaluate:"),
        (
            "t: {metric: 'evaluate:x', metric_options: {tims: 1}}",
            "unexpected keyword argument 'tims'; known: value, times, config, arguments",
        ),
        (
            "t: {metric: 'evaluate:x', metric_options: {times: ten}}",
            "t: metric_options.times is 'ten'; known: value, times, config, arguments",
        ),
        ("t: {metric: rouge}", r"t: metric: 'rouge' is not a metric; did you mean 'rougeL'\?"),
        ("t: {cap: 0}", "t: cap: 0 is not a whole number above 0"),
        ("t: {cap: true}", "t: cap: True is not a whole number above 0"),
        ("t: {max_input_tokens: 1.5}", r"max_input_tokens: 1\.5 is not a whole number above 0"),
        ("t: {weight: -1}", "t: weight: -1 is not a finite number above 0"),
        ("t: {weight: .nan}", "t: weight: nan is not a finite number above 0"),
        ("t: {weight: much}", "t: weight: 'much' is not a finite number above 0"),
        ("t: 5", r"tasks\.yaml:1: t: expected a mapping of cap, weight"),
        ("[t]", r"tasks\.yaml: expected a mapping, got list"),
        ("[7]: {cap: 5}", r"tasks\.yaml:1: a key must be a word"),
        ("t: {cap: 5}\nt: {cap: 6}", r"tasks\.yaml:2: key 't' stands twice"),
        ("t: {cap: 2020-99-99}", "t: cap: '2020-99-99' is not a whole number"),
        ("t: {cap: 5", r"tasks\.yaml:1: not YAML"),
    ],
)
def test_a_mistake_in_the_options_is_an_error(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_with(tmp_path, text)


def test_a_task_whose_rows_all_have_choices_is_scored_by_accuracy(tmp_path):
    assert read_with(tmp_path, "", RANKED + RANKED).metric == "accuracy"


def test_a_task_with_a_row_without_choices_is_scored_by_rouge(tmp_path):
    assert read_with(tmp_path, "", RANKED + PLAIN).metric == "rougeL"


def test_a_stated_metric_is_stronger_than_the_default(tmp_path):
    assert read_with(tmp_path, "t: {metric: exact_match}", RANKED).metric == "exact_match"
