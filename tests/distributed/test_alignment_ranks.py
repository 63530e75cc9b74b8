"""Gradient alignment over two sharded ranks against one process."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, succeed

from mhr_scale.config import AnalyseConfig, PretrainConfig
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.analyse import analyse
from mhr_scale.verbs.pretrain import pretrain

RECIPES = ROOT / "launch" / "recipes"
SHORT = (
    "schedule.steps=20",
    "batch.batch_size=8",
    "tasks.n_tasks=6",
    "tasks.train_examples=10",
    "tasks.validation_examples=5",
    "run.validate_every=-1",
)


@pytest.mark.dist
@pytest.mark.slow
def test_two_sharded_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    overrides = ["batch.micro_batch_size=8", f"run.folder={source}"]
    pretrain(load(PretrainConfig, RECIPES / "toy.yaml", [*SHORT, *overrides]))
    settings = [
        f"adapter={source}",
        "alignment.tasks=4",
        "alignment.rows=5",
        "alignment.micro_batch_size=2",  # three passes: one rank's last one does not count
    ]
    recipe, found = RECIPES / "toy_analyse.yaml", {}
    analyse(load(AnalyseConfig, recipe, [*settings, f"run.folder={tmp_path / 'one'}"]))
    sharded = ["run.ds_config=ds_configs/cpu.json", f"run.folder={tmp_path / 'two'}"]
    succeed("launch/analyse.py", str(recipe), *settings, *sharded, ranks=2)
    for name in ("one", "two"):
        found[name] = json.loads((tmp_path / name / "analysis.json").read_text())
    (start,) = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert (start["world_size"], start["placement"]) == (2, "zero3")
    one, two = (found[name].pop("alignment") for name in ("one", "two"))
    assert found["two"] == found["one"]
    assert two["tasks"] == one["tasks"]
    np.testing.assert_allclose(two["matrix"], one["matrix"], atol=1e-6)
    assert two["mean"] == pytest.approx(one["mean"], abs=1e-6)
    means = [[layer["mean"] for layer in each["layers"]] for each in (one, two)]
    np.testing.assert_allclose(*means, atol=1e-6)
