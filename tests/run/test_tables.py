"""Tables in every format, and the option that asks for one."""

import csv
import io
import logging
import sys

import pytest

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import ConfigError
from mhr_scale.run.tables import printed_as, prose, render
from mhr_scale.scores import summary
from mhr_scale.verbs import launching

HEADS = ["task", "mean", "said"]
ROWS = [["a|b, c", "12.50", "50% of_all"], ["d", "-", ""]]


def test_text_has_numbers_to_the_right_and_words_to_the_left() -> None:
    assert render(HEADS, ROWS) == (
        "task     mean  said\na|b, c  12.50  50% of_all\nd           -\n"
    )


def test_markdown_has_a_rule_and_escapes_its_own_sign() -> None:
    with printed_as("markdown"):
        assert render(HEADS, ROWS) == (
            "\n| task | mean | said |\n| --- | ---: | --- |\n| a\\|b, c | 12.50 | 50% of_all |\n"
            "| d | - |  |\n\n"
        )


def test_csv_reads_back_as_it_was_and_words_beside_it_go_to_the_log(caplog) -> None:
    with printed_as("csv"), caplog.at_level(logging.INFO, logger="mhr_scale"):
        text = prose("runs/a\n") + render(HEADS, ROWS)
    assert list(csv.reader(io.StringIO(text))) == [HEADS, *ROWS]
    assert caplog.messages == ["runs/a"]


def test_latex_escapes_what_it_would_take_for_commands() -> None:
    with printed_as("latex"):
        lines = (prose("runs/a\n") + render(HEADS, ROWS)).splitlines()
    assert lines[:2] == ["% runs/a", r"\begin{tabular}{lrl}"]
    assert lines[5] == r"a|b, c & 12.50 & 50\% of\_all \\"
    assert lines[-1] == r"\end{tabular}"


def test_the_format_holds_for_one_launch() -> None:
    scores = [
        {"id": str(n), "task": "a_b", "prompt": "p", "metric": "accuracy", "points": 50.0}
        for n in range(2)
    ]
    found = summary.summarise(scores)
    with printed_as("csv"):
        assert summary.table(found).splitlines()[:2] == [
            "task,metric,examples,mean",
            "a_b,accuracy,2,50.00",
        ]
    assert summary.table(found).splitlines()[0] == "task                metric    examples   mean"


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["r.yaml", "--format", "csv", "a.b=c"], (["r.yaml", "a.b=c"], "csv")),
        (["--format=latex", "r.yaml"], (["r.yaml"], "latex")),
        (["r.yaml"], (["r.yaml"], "text")),
        (["r.yaml", "--format"], (["r.yaml"], "")),
    ],
)
def test_the_option_may_stand_anywhere(argv, found) -> None:
    assert launching.take_format(argv) == found


def test_an_unknown_format_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"--format markdwon: one of text, .*mean 'markdown'"):
        printed_as("markdwon").__enter__()


def test_a_verb_without_tables_knows_no_format(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "r.yaml", "--format=csv"])
    with pytest.raises(SystemExit) as left:
        launching.main(PretrainConfig, print, about="pretrain RECIPE")
    assert left.value.code == 2
    assert "unknown option --format=csv" in capsys.readouterr().err
