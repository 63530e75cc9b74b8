"""Metrics of the evaluate library, from folders as offline machines have them."""

import json
import sys
from pathlib import Path

import pytest

from mhr_scale.config import BackboneConfig, EvaluateConfig, JsonlTasks, PlainRunConfig
from mhr_scale.errors import DataError
from mhr_scale.tasks.loaded_metrics import MetricOptions
from mhr_scale.tasks.metrics import text_metric
from mhr_scale.verbs.evaluate import evaluate

SCRIPT = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(
                {{"predictions": datasets.Value("{kind}"), "references": {references}}}
            ),
        )

    def _compute(self, predictions, references{arguments}):
        {body}
"""
ONE, SEVERAL = 'datasets.Value("string")', 'datasets.Sequence(datasets.Value("string"))'
#: The folder of a metric: what it takes, what it has beside predictions and references, its body.
METRICS = {
    "first_letter": (
        ONE,
        ", weight=1.0",
        'return {"hits": weight * sum(p[:1] == r[:1] for p, r in zip(predictions, references)), '
        '"words": len(predictions)}',
    ),
    "any_of": (
        SEVERAL,
        "",
        'return {"any_of": sum(p in r for p, r in zip(predictions, references)) / 1}',
    ),
    "in_points": (ONE, "", 'return {"in_points": 100.0 * (predictions == references)}'),
    "of_lists": (ONE, "", 'return {"of_lists": float("nan")}'),
    "breaks": (ONE, "", 'return {"breaks": 1 / len(predictions[0])}'),
    "of_numbers": (ONE, "", 'return {"of_numbers": 1.0}'),
    "needs_more": (ONE, "", "import no_such_library"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the metrics; the library keeps its copies beside them."""
    folder = tmp_path_factory.mktemp("metrics")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
            patch.setenv(name, str(folder / "cache" / name))
        patch.setenv("HF_EVALUATE_OFFLINE", "1")
        for name, (references, arguments, body) in METRICS.items():
            (folder / name).mkdir()
            (folder / name / f"{name}.py").write_text(
                SCRIPT.format(
                    name=name.title().replace("_", ""),
                    kind="int32" if name == "of_numbers" else "string",
                    references=references,
                    arguments=arguments,
                    body=body,
                )
            )
        text_metric(
            f"evaluate:{folder / 'any_of'}"
        )  # imports the library, which reads the variables
    return folder


def test_the_library_is_found_behind_a_script_of_its_name(folder: Path) -> None:
    assert any(Path(place, "evaluate.py").is_file() for place in sys.path)
    assert sys.modules["evaluate"].Metric


def test_a_metric_of_several_references_gets_them_all_and_one_of_one_the_best(folder: Path) -> None:
    several = text_metric(f"evaluate:{folder / 'any_of'}")
    assert [several(text, ["yes", "yep"]) for text in ("yep", "yes", "no")] == [100.0, 100.0, 0.0]
    one = text_metric(f"evaluate:{folder / 'first_letter'}", MetricOptions(value="hits"))
    assert [one(text, ["yes", "no"]) for text in ("yep", "nope", "maybe", "")] == [100, 100, 0, 0]


def test_options_choose_the_value_its_scale_and_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    half = MetricOptions(value="hits", arguments={"weight": 0.5})
    assert text_metric("evaluate:first_letter", half)("a", ["a"]) == 50.0
    whole = MetricOptions(times=1)
    assert text_metric("evaluate:in_points", whole)("a", ["b", "a"]) == 100.0


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        (
            "nowhere",
            {},
            r"'evaluate:nowhere' cannot be loaded \(.*\); give a metric of",
        ),
        ("needs_more", {}, r"'a' by its references \(No module named 'no_such_library'\)"),
        ("first_letter", {}, r"several values \(it has: hits, words\); set metric_options.value"),
        ("any_of", {"value": "hits"}, r"no value 'hits' \(it has: any_of\); set metric_options"),
        ("any_of", {"arguments": {"x": 1}}, r"the answer 'a' .*unexpected keyword argument"),
        ("in_points", {}, r"in_points 100.0 times 100.0 is no number of points from 0 to 100"),
        ("of_lists", {}, r"no finite number for a single answer \(it has: of_lists\)"),
        ("of_numbers", {}, r"'evaluate:of_numbers' does not score the answer 'a' by its ref"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_door(
    folder: Path, name: str, options: dict, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=error):
        text_metric(f"evaluate:{name}", MetricOptions(**options))


def test_an_answer_on_which_a_metric_fails_is_named(folder: Path) -> None:
    metric = text_metric(f"evaluate:{folder / 'breaks'}")
    with pytest.raises(DataError, match=r"the answer '' by its references \(division by zero\)"):
        metric("", ["a"])


def test_a_task_is_scored_by_the_metric_that_it_names(folder: Path, tmp_path: Path) -> None:
    for task in ("letters", "other"):
        (tmp_path / "rows" / task).mkdir(parents=True)
        rows = [
            {"input": f"a b {n}", "target": "x", "targets": ["a", "b", "c", "d"]} for n in "abcd"
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for fold in ("train", "test"):
            (tmp_path / "rows" / task / f"{fold}.jsonl").write_text(text)
    options = f"letters: {{metric: 'evaluate:{folder / 'first_letter'}', metric_options: %s}}"
    (tmp_path / "rows" / "tasks.yaml").write_text(options % "{value: words}")
    config = EvaluateConfig(
        backbone=BackboneConfig(name="builtin:toy", dtype="float32"),
        tasks=JsonlTasks(suite="jsonl", folder=str(tmp_path / "rows")),
        run=PlainRunConfig(folder=str(tmp_path / "run")),
    )
    summary = json.loads((evaluate(config) / "summary.json").read_text())
    found = {name: (task["metric"], task["mean"]) for name, task in summary["tasks"].items()}
    assert found["letters"] == (f"evaluate:{folder / 'first_letter'}", 100.0)
    assert found["other"][0] == "rougeL"
    (tmp_path / "rows" / "tasks.yaml").write_text(options % "{}")
    with pytest.raises(DataError, match=r"^task letters: metric 'evaluate:.*' has several values"):
        evaluate(config)
