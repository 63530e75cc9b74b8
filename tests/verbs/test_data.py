"""The verb `data` as a user runs it."""

import json
from pathlib import Path

import pytest
from processes import ROOT

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import DataError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.data import check_data

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")


def check(*overrides: str) -> None:
    check_data(load(PretrainConfig, TOY, overrides))


def write_rows(folder: Path, good: int, bad: int) -> str:
    folder.mkdir()
    rows = [json.dumps({"input": f"a {n}", "target": "b"}) for n in range(good)]
    (folder / "train.jsonl").write_text("\n".join([*rows, *['{"input": 3}'] * bad]) + "\n")
    return f"tasks={{suite: jsonl, folder: {folder.parent}}}"


def test_every_task_has_a_line_and_the_totals_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    check("tasks.n_tasks=5", "tasks.train_examples=7", "tasks.validation_examples=2")
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["task", "metric", "train", "held"]
    assert [line.split()[1:4] for line in lines] == [["exact_match", "7", "2"]] * 5
    assert total.split()[:3] == ["total", "35", "10"]


def test_cut_shares_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    check("tasks.n_tasks=1", "batch.max_input_tokens=2")
    assert "100.0%" in capsys.readouterr().out


def test_refused_rows_are_listed_with_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(write_rows(tmp_path / "t", good=20, bad=2))
    out = capsys.readouterr().out
    assert "train.jsonl:21: " in out
    assert "train.jsonl:22: " in out


def test_data_that_would_stop_a_run_is_an_error_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"^12 of 32 rows refused, more than on_bad: reject allows"):
        check(write_rows(tmp_path / "t", good=20, bad=12))
    assert "train.jsonl:21: " in capsys.readouterr().out


def test_the_strict_policy_counts_every_refused_row(tmp_path: Path) -> None:
    settings = write_rows(tmp_path / "t", good=20, bad=1)
    with pytest.raises(DataError, match=r"^1 of 21 rows refused, more than on_bad: error allows"):
        check(settings, "tasks.intake.on_bad=error")


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none"):
        check(f"tasks={{suite: jsonl, folder: {tmp_path / 'none'}}}")


def test_no_cache_is_begun_for_a_folder_that_is_not_there(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tasks = f"tasks={{suite: jsonl, folder: {tmp_path / 'none'}}}"
    with pytest.raises(DataError, match=r"tasks\.folder: no folder '.*none'"):
        check(tasks, f"run.token_cache={cache}")
    assert not cache.exists()


def test_the_cache_is_filled_for_later_runs(tmp_path: Path) -> None:
    check("tasks.n_tasks=2", f"run.token_cache={tmp_path / 'cache'}")
    assert len(list(tmp_path.glob("cache/*/manifest.json"))) == 1
