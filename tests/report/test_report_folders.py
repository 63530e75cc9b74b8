"""Run folders are recognised, and read as far as they are."""

import json
from pathlib import Path

import made_runs
import pytest

from mhr_scale.errors import RunError
from mhr_scale.report.build import build
from mhr_scale.report.runs import labels, open_run, open_runs
from mhr_scale.report.scored_adapters import scored_adapter


def test_every_kind_is_recognised(tmp_path: Path) -> None:
    runs = open_runs([str(path) for path in made_runs.everything(tmp_path)])
    kinds = ["pre-training", "average", "evaluation", "evaluation"] * 2
    assert [run.kind for run in runs] == [*kinds, "pre-training", "few-shot", "analysis"]
    assert [run.label for run in runs if not run.is_finished] == ["lora"]


def test_an_unfinished_training_run_tells_its_step(tmp_path: Path) -> None:
    run = open_run(made_runs.pretraining(tmp_path, steps=40, is_finished=False))
    assert (run.is_finished, run.state) == (False, "unfinished, step 20 of 40")


def test_an_average_that_lacks_a_number_of_steps_is_unfinished(tmp_path: Path) -> None:
    folder = made_runs.average(tmp_path / "mean", tmp_path, (0, 20))
    (folder / "averaged" / "000020" / "adapter.json").unlink()
    assert not open_run(folder).is_finished


def test_few_shot_jobs_without_a_result_are_counted(tmp_path: Path) -> None:
    run = open_run(made_runs.few_shot(tmp_path, missing=3))
    assert run.state == "unfinished, 9 of at least 12 jobs"


def test_an_interrupted_evaluation_is_unfinished(tmp_path: Path) -> None:
    run = open_run(made_runs.evaluation(tmp_path, None, {"sort": 1.0}, is_finished=False))
    assert run.state == "unfinished, 2 examples"


def test_a_fine_tuning_is_recognised_before_and_after_its_end(tmp_path: Path) -> None:
    made_runs.write_text(tmp_path / "config.yaml", "task: sort\nprotocol: {steps: 9}\n")
    assert open_run(tmp_path).state == "unfinished, step 0 of 9"
    made_runs.write_text(tmp_path / "result.json", json.dumps({"score": 5.0, "steps": 9}))
    run = open_run(tmp_path)
    assert (run.kind, run.state) == ("fine-tuning", "finished, 9 steps")


def test_refused_rows_are_counted(tmp_path: Path) -> None:
    assert open_run(made_runs.pretraining(tmp_path)).n_rejects == 1


def test_torn_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = made_runs.pretraining(tmp_path, steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run = open_run(folder)
    assert (run.n_torn, run.lines[-1]["step"]) == (1, 3)


def test_a_folder_that_is_no_run_is_told_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run; none of config\.yaml, .* lie there"):
        open_run(tmp_path)


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    made_runs.pretraining(tmp_path / "mhr")
    with pytest.raises(RunError, match=r"name runs below it: .*mhr$"):
        open_run(tmp_path)


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        open_run(tmp_path / "nowhere")


def test_a_recipe_of_no_verb_is_told_with_its_parts(tmp_path: Path) -> None:
    made_runs.write_text(tmp_path / "config.yaml", "colour: red\n")
    with pytest.raises(RunError, match=r"no run: its config\.yaml sets colour"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "alignment": "x"}',
        '{"schema": 1, "alignment": {"mean": "x"}}',
        '{"schema": 1, "parameters": {"variants": []}}',
    ],
)
def test_an_analysis_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    made_runs.write_text(tmp_path / "analysis.json", text)
    with pytest.raises(RunError, match=r"analysis\.json(:1)?: "):
        open_run(tmp_path)


def test_labels_are_as_short_as_tells_runs_apart() -> None:
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]


def test_a_folder_given_twice_stands_once(tmp_path: Path) -> None:
    folder = str(made_runs.pretraining(tmp_path / "mhr"))
    assert len(open_runs([folder, folder])) == 1


# -- who was scored --------------------------------------------------------------------------------


def scored(folder: Path, source: Path, k: int) -> Path:
    mean = made_runs.average(folder / f"mean_of_{source.name}", source)
    name = folder / f"scores_of_{source.name}_{k}"
    return made_runs.evaluation(name, mean / "averaged" / f"{k:06d}", {"sort": 1.0})


def test_seeds_of_a_method_are_one_subject_and_methods_are_two(tmp_path: Path) -> None:
    sources = [
        made_runs.pretraining(tmp_path / "one", "run.seed=1"),
        made_runs.pretraining(tmp_path / "two", "run.seed=2"),
        made_runs.pretraining(tmp_path / "lora", *made_runs.LORA),
        made_runs.pretraining(tmp_path / "rank", "adapter.rank=1"),
    ]
    runs = [open_run(scored(tmp_path, source, 20)) for source in sources]
    one, two, lora, rank = (scored_adapter(run, runs) for run in runs)
    assert (one.name, lora.name, one.extra_steps) == ("MHR-mu", "LoRA", 20)
    assert one.key == two.key
    assert len({one.key, lora.key, rank.key}) == 3


def test_an_adapter_whose_run_is_gone_is_called_by_its_path(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "averaged" / "000200"
    run = open_run(made_runs.evaluation(tmp_path / "scores", gone, {"sort": 1.0}))
    subject = scored_adapter(run, [run])
    assert (subject.name, subject.extra_steps) == (str(gone), 200)


def test_a_bare_backbone_is_called_so(tmp_path: Path) -> None:
    run = open_run(made_runs.evaluation(tmp_path, None, {"sort": 1.0}))
    assert scored_adapter(run, [run]).name == "builtin:toy alone"


# -- what cannot be read ---------------------------------------------------------------------------


def test_a_part_of_an_analysis_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    folder = made_runs.analysis(tmp_path)
    found = json.loads((folder / "analysis.json").read_text())
    del found["routing"]["groups"][1]["usage"]
    (folder / "analysis.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match=r"analysis\.json: no routing that a report can show"):
        build(open_runs([str(folder)]))


@pytest.mark.parametrize("value", ["null", "[1]", "text", "{a: 1}"])
def test_settings_of_another_form_do_no_harm(tmp_path: Path, value: str) -> None:
    folder = made_runs.pretraining(tmp_path, steps=2)
    parts = ("adapter", "loss", "schedule", "run", "tasks")
    made_runs.write_text(folder / "config.yaml", "".join(f"{name}: {value}\n" for name in parts))
    run = open_run(folder)
    assert (run.method, run.is_finished) == ("adapter", False)
    assert build([run]).sections


def test_a_folder_called_jobs_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "src").mkdir(parents=True)
    with pytest.raises(RunError, match="no run; none of config"):
        open_run(tmp_path)
