"""A run stopped after a save and started again equals one that was never stopped, bit for bit.

Noisy routing on the toy suite: noise, data order, schedule and optimizer state all have to go on.
In the deterministic forms of operations, which a run keeps when it goes on.
"""

import json
import shutil
from pathlib import Path

import pytest
from processes import succeed, timeless

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SETTINGS = (
    "adapter.policy=noisy",
    "optim.name=adafactor",
    "optim.lr=1e-3",
    "schedule.steps=6",
    "schedule.warmup_fraction=0.2",
    "schedule.decay=linear",
    "run.save_every=2",
    "run.log_every=1",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "tasks.train_examples=20",
    "run.deterministic=true",
)
SHARDED = "run.ds_config=ds_configs/cpu.json"


def train(folder: Path, *, ranks: int, overrides: tuple[str, ...] = ()) -> None:
    succeed(
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        f"run.folder={folder}",
        *SETTINGS,
        *overrides,
        ranks=ranks,
    )


def stop_after(folder: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it was right after the save of `step`."""
    shutil.copytree(folder, copy)
    for later in (copy / "steps").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    return copy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "whole"
    train(folder, ranks=0)
    return folder


@pytest.fixture(scope="module", params=["one", "two"])
def resumed(request: pytest.FixtureRequest, whole: Path) -> Path:
    folder = whole.parent / f"resumed_on_{request.param}"
    stop_after(whole, folder, {"one": 4, "two": 2}[request.param])
    if request.param == "one":
        train(folder, ranks=0)
    else:
        train(folder, ranks=2, overrides=(SHARDED,))
    return folder


def test_the_adapter_is_that_of_the_unstopped_run(whole: Path, resumed: Path) -> None:
    ours, theirs = (f / "adapter" / "adapter.safetensors" for f in (resumed, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_start_is_recorded_as_deterministic(resumed: Path) -> None:
    starts = json.loads((resumed / "provenance.json").read_text())
    assert [start["deterministic"] for start in starts] == [True, True]


def test_the_metrics_have_no_gap_no_duplicate_and_the_same_values(
    whole: Path, resumed: Path
) -> None:
    assert timeless(resumed) == timeless(whole)


def test_the_optimizer_state_is_that_of_the_unstopped_run(whole: Path, resumed: Path) -> None:
    ours, theirs = (f / "steps/000006/resume/optimizer.safetensors" for f in (resumed, whole))
    assert ours.read_bytes() == theirs.read_bytes()
