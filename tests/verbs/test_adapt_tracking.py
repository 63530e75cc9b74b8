"""The verb `adapt` and trackers: every job's curves, each number once, as a run in one group."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import BARE, LORA, TASKS, job_folders, make_config, results, write_rows
from tracked import expected, tensorboard_steps, wandb_history, wandb_records

from mhr_scale.config import WavesConfig
from mhr_scale.errors import ConfigError
from mhr_scale.jobs.wave import Wave
from mhr_scale.run.trackers import kept_id
from mhr_scale.verbs.adapt import adapt

pytestmark = pytest.mark.usefixtures("on_cpu")


class Killed(BaseException):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs of six steps, saved at step 3, killed before step 6, gone on with."""
    base = tmp_path_factory.mktemp("tracked")
    made = make_config(base / "few", write_rows(base / "rows"), {"LoRA": LORA}, backbone=BARE)
    trackers = replace(made.run, trackers=("tensorboard", "wandb"))
    config = replace(made, run=trackers, waves=WavesConfig(save_every=3))
    train_step = Wave.train_step

    def killed(wave, placed):
        if wave.step == 5:
            raise Killed
        return train_step(wave, placed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(Wave, "train_step", killed)
        with pytest.raises(Killed):
            adapt(config)
        patch.setattr(Wave, "train_step", train_step)
        adapt(config)
    assert len(results(base / "few")) == 2
    return base / "few"


def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch):
    made = make_config(tmp_path / "few", tmp_path / "rows", {"LoRA": LORA}, backbone=BARE)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=r"run\.trackers: 'trackio' is not installed; pip"):
        adapt(replace(made, run=replace(made.run, trackers=("trackio",))))
    assert not (tmp_path / "few" / "config.yaml").exists()


def test_tensorboard_shows_what_each_jobs_record_has(run):
    for folder in job_folders(run).values():
        made = expected(folder)
        assert [step for step, _ in made["loss"]] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in made["score"]] == [0, 2, 4, 6]
        assert {"loss", "score", "grad_norm", "lr"} <= made.keys()
        assert tensorboard_steps(folder) == made


def test_wandb_gets_a_run_for_every_job_in_the_group_of_the_run(run):
    for (task, seed, variant), folder in job_folders(run).items():
        files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
        sent = [{int(row["_step"]): row for row in wandb_history(file)} for file in files]
        assert [list(rows) for rows in sent] == [[0, 1, 2, 3, 4, 5], [4, 5, 6]]
        # the service keeps the first of a step
        kept = {**sent[1], **sent[0]}
        for name in ("loss", "score"):
            curve = [(step, json.loads(row[name])) for step, row in kept.items() if name in row]
            assert sorted(curve) == expected(folder)[name]
        records = [one.run for file in files for one in wandb_records(file) if one.HasField("run")]
        assert {one.run_group for one in records} == {"few"}
        assert {one.display_name for one in records} == {f"{task}/{seed}/{variant}"}
        assert {one.run_id for one in records} == {kept_id(folder, "wandb", str)}
    assert {task for task, _, _ in job_folders(run)} == set(TASKS)
