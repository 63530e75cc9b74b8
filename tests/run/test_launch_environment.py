"""What launchers set, found good before anything relies on it."""

import subprocess
import sys

import pytest

from mhr_scale.config import PretrainConfig
from mhr_scale.errors import EngineError
from mhr_scale.run import launch_environment, runlog
from mhr_scale.verbs import launching

GOOD = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
        GOOD,
        {**GOOD, "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "3"},
        {"OMP_NUM_THREADS": "4,2", "DS_ACCELERATOR": "cpu"},
    ],
)
def test_what_launchers_set_is_good(variables: dict[str, str]) -> None:
    launch_environment.check(variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**GOOD, "RANK": "x"}, "RANK='x': must be a number"),
        ({**GOOD, "RANK": "-1"}, "RANK='-1': must be a number"),
        ({**GOOD, "RANK": ""}, "RANK='': must be a number"),
        ({**GOOD, "RANK": "2"}, "RANK=2, but with WORLD_SIZE=2 it is at most 1"),
        ({**GOOD, "LOCAL_RANK": "x"}, "LOCAL_RANK='x': must be a number"),
        ({**GOOD, "LOCAL_RANK": "4"}, "LOCAL_RANK=4, but with WORLD_SIZE=2"),
        ({**GOOD, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be at least 1"),
        ({**GOOD, "LOCAL_SIZE": "0"}, "LOCAL_SIZE=0: must be at least 1"),
        ({**GOOD, "MASTER_PORT": "abc"}, "MASTER_PORT='abc': must be a number"),
        ({**GOOD, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be from 1 to 65535"),
        ({**GOOD, "MASTER_ADDR": ""}, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({**GOOD, "TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x'"),
        ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS='abc': must be a number"),
        ({"DS_ACCELERATOR": "cdua"}, "one of cpu, cuda, or unset; did you mean 'cuda'?"),
    ],
)
def test_a_malformed_launch_is_one_line_that_names_the_variable(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(EngineError) as caught:
        launch_environment.check(variables)
    assert message in str(caught.value)
    assert "unset" in str(caught.value)


def test_where_git_is_absent_or_refuses_the_commit_is_unknown(monkeypatch) -> None:
    def absent(*words: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert runlog.provenance()["git_commit"] == "unknown"
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setattr(subprocess, "run", absent)
    assert runlog.provenance()["git_commit"] == "unknown"


def test_a_launch_of_a_malformed_environment_is_one_line_and_code_2(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "r.yaml"])
    with pytest.raises(SystemExit) as left:
        launching.main(PretrainConfig, print, about="pretrain RECIPE")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: RANK='x': must be a number; ")
