"""`run.deterministic`: on while the backbone is placed, off afterwards, and its one-line errors."""

import json
import os
from pathlib import Path

import pytest
import torch
from processes import ROOT
from torch.utils import deterministic

from mhr_scale.config import PretrainConfig
from mhr_scale.engine import determinism
from mhr_scale.errors import EngineError, ExitCode, RunError
from mhr_scale.recipe.reading import load
from mhr_scale.run import failures
from mhr_scale.training.trainer import Trainer
from mhr_scale.verbs.pretrain import pretrain

SHORT = (
    "schedule.steps=2",
    "batch.batch_size=4",
    "batch.micro_batch_size=4",
    "tasks.n_tasks=3",
    "tasks.train_examples=8",
    "run.save_every=1",
    "run.validate_every=-1",
)


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (determinism.WORKSPACE, determinism.ALGORITHM):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)


def train(folder: Path, *settings: str) -> None:
    recipe = str(ROOT / "launch" / "recipes" / "toy.yaml")
    pretrain(load(PretrainConfig, recipe, [*SHORT, f"run.folder={folder}", *settings]))


def test_the_switch_is_on_while_a_run_trains_and_off_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, accumulate = [], Trainer.accumulate

    def watched(*arguments):
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        modes = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
        seen.append(modes)
        return accumulate(*arguments)

    monkeypatch.setattr(Trainer, "accumulate", watched)
    train(tmp_path, "run.deterministic=true")
    assert seen == [(2, False)] * 2
    assert (torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory) == (
        0,
        True,
    )
    (start,) = json.loads((tmp_path / "provenance.json").read_text())
    assert start["deterministic"] is True
    with pytest.raises(RunError, match=r"run\.deterministic"):
        train(tmp_path, "run.deterministic=false")


def test_an_operation_without_a_deterministic_form_is_named_and_the_switch_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*arguments):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    monkeypatch.setattr(Trainer, "accumulate", put)
    with pytest.raises(RuntimeError) as raised:
        train(tmp_path, "run.deterministic=true")
    explained = failures.explain(raised.value)
    assert explained is not None
    assert explained.code == ExitCode.MISTAKE
    assert "torch has no deterministic form of put_" in explained.text
    assert explained.text.endswith("leave run.deterministic out")
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_set_before_is_set_again():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with determinism.switched(True):
            assert torch.get_deterministic_debug_mode() == 2
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_workspace_is_replaced_aloud(monkeypatch, caplog):
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    monkeypatch.setenv(determinism.ALGORITHM, "Ring")
    monkeypatch.setattr(determinism.log, "propagate", True)
    with determinism.switched(True):
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        assert os.environ[determinism.ALGORITHM] == "Ring"
    assert ":0:0: run.deterministic sets it to :4096:8" in caplog.text


def test_a_process_in_which_cuda_has_begun_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(EngineError, match=r"start the program under CUBLAS_WORKSPACE_CONFIG"),
        determinism.switched(True),
    ):
        raise AssertionError("never here")
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    with determinism.switched(True):
        pass
