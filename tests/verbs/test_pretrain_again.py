"""Runs of pre-training that are made longer, or that start from another run's adapter."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import read_metrics
from safetensors.torch import load_file
from toy_pretrains import SHORT, TOY, train

from mhr_scale.adapters import Adapter, artefact
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import RunError, UserError
from mhr_scale.recipe.reading import load, to_yaml
from mhr_scale.training.opening import opened_training
from mhr_scale.verbs.pretrain import start_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "toy").parent


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / artefact.TENSORS)


def test_a_finished_run_of_a_constant_rate_can_be_made_longer(tmp_path: Path) -> None:
    warm = "schedule={steps: 4, decay: constant, warmup_steps: 2}"
    longer = warm.replace("steps: 4", "steps: 7")
    train(tmp_path / "one", warm)
    train(tmp_path / "one", longer)
    train(tmp_path / "whole", longer)
    for name in (f"adapter/{artefact.TENSORS}", "adapter/adapter.json"):
        one, whole = ((tmp_path / run / name).read_text("latin1") for run in ("one", "whole"))
        assert one.replace('"run": "one"', "") == whole.replace('"run": "whole"', "")
    assert load(PretrainConfig, tmp_path / "one" / "config.yaml").schedule.steps == 7
    steps = [line["step"] for line in read_metrics(tmp_path / "one") if "loss" in line]
    assert steps == list(range(1, 8))


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ("{steps: 4, decay: linear}", "decay is linear"),
        ("{steps: 4, decay: cosine}", "decay is cosine"),
        ("{steps: 4, decay: constant, warmup_fraction: 0.5}", "warmup_fraction makes the warm-up"),
        ("{steps: 4, decay: constant, anneal_routing_steps: 2}", "anneal_routing_steps are the"),
    ],
)
def test_steps_that_would_change_those_made_are_refused_with_the_reason(
    run: Path, tmp_path: Path, schedule: str, reason: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    words = [*SHORT, f"schedule={schedule}", f"run.folder={folder}"]
    (folder / "config.yaml").write_text(to_yaml(load(PretrainConfig, TOY, words)))
    longer = schedule.replace("steps: 4", "steps: 9", 1)
    with pytest.raises(RunError, match=rf"schedule.steps was 4, is 9.*cannot be made.*{reason}"):
        train(folder, f"schedule={longer}")


def test_a_run_is_not_made_shorter(run: Path) -> None:
    with pytest.raises(RunError, match=r"schedule\.steps was 4, is 3"):
        train(run, "schedule.steps=3")


def test_training_starts_from_the_tensors_of_an_adapter(run: Path, tmp_path: Path) -> None:
    config = [*SHORT, f"source={run}", f"run.folder={tmp_path / 'more'}"]
    with opened_training(
        load(PretrainConfig, TOY, config), start=start_of(load(PretrainConfig, TOY, config))
    ) as trainer:
        begun = artefact.named_tensors(trainer.adapter)
        assert all(torch.equal(begun[name], tensor) for name, tensor in tensors(run).items())
    train(tmp_path / "more", f"source={run}")
    first = next(line for line in read_metrics(tmp_path / "more") if "validation_loss" in line)
    assert first["validation_loss"] == pytest.approx(read_metrics(run)[-1]["validation_loss"])
    start, *_ = json.loads((tmp_path / "more" / "provenance.json").read_text())
    assert (start["start"]["adapter"], start["start"]["step"]) == (str(run), 4)
    assert start["start"]["content"] == artefact.digest(artefact.load(run))


def test_rows_of_tasks_that_the_adapter_does_not_know_are_fresh(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*SHORT, "tasks.n_tasks=8", f"source={run}", f"run.folder={tmp_path / 'more'}"]
    config = load(PretrainConfig, TOY, words)
    with caplog.at_level("INFO"), opened_training(config, start=start_of(config)) as trainer:
        adapter = trainer.adapter
    fresh = Adapter(adapter.config, adapter.sites, task_names=adapter.task_names, seed=0)
    known = artefact.load(run).task_names
    name = next(name for name in tensors(run) if name.endswith("routing_logits"))
    for number, task in enumerate(adapter.task_names):
        row = artefact.named_tensors(adapter)[name][number]
        if task in known:
            assert torch.equal(row, tensors(run)[name][known.index(task)])
        else:
            assert torch.equal(row, artefact.named_tensors(fresh)[name][number])
    assert f"starting from {run}: rows of 6 of 8 tasks, new are " in caplog.text


def test_an_interrupted_run_goes_on_without_what_it_started_from(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run, source)
    train(tmp_path / "whole", f"source={source}", "schedule.steps=6")
    train(tmp_path / "run", f"source={source}")
    shutil.rmtree(source)
    train(tmp_path / "run", f"source={source}", "schedule.steps=6")
    one, whole = (tensors(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one[name], tensor) for name, tensor in whole.items())


def test_an_adapter_of_other_settings_is_no_start(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter.rank is 2 there, 4 here; adapter.n_skills is 4"):
        train(tmp_path / "run", f"source={run}", "adapter.rank=4", "adapter.n_skills=2")
    assert not (tmp_path / "run").exists()
