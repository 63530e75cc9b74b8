"""Alignment watched while training: the figures, and that training does not notice."""

from pathlib import Path

import pytest
from processes import ROOT, read_metrics

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import ConfigError
from mhr_scale.planning.steps import Shape, trace_pretraining
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.pretrain import pretrain

TOY = str(ROOT / "launch" / "recipes" / "toy.yaml")
SHORT = (
    "schedule.steps=5",
    "run.save_every=3",
    "run.log_every=1",
    "batch.batch_size=8",
    "batch.micro_batch_size=4",
    "backbone.dropout=0.1",
    "tasks.n_tasks=6",
    "tasks.train_examples=10",
    "tasks.validation_examples=3",
)
WATCHED = ("monitor.alignment_every=2", "monitor.alignment_tasks=4", "monitor.alignment_rows=3")


def train(folder: Path, *overrides: str) -> Path:
    pretrain(load(PretrainConfig, TOY, [*SHORT, *overrides, f"run.folder={folder}"]))
    return folder


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs without the monitor, by policy."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        policy: train(folder / policy, f"adapter.policy={policy}")
        for policy in ("learned", "noisy")
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same runs with it."""
    folder = tmp_path_factory.mktemp("watched")
    return {
        policy: train(folder / policy, f"adapter.policy={policy}", *WATCHED)
        for policy in ("learned", "noisy")
    }


@pytest.mark.parametrize("policy", ["learned", "noisy"])
def test_the_monitor_changes_no_bit_of_the_adapter(
    plain: dict[str, Path], watched: dict[str, Path], policy: str
) -> None:
    assert adapter_bytes(watched[policy]) == adapter_bytes(plain[policy])


@pytest.mark.parametrize("policy", ["learned", "noisy"])
def test_the_monitor_changes_no_other_figure(
    plain: dict[str, Path], watched: dict[str, Path], policy: str
) -> None:
    def losses(folder: Path) -> list[object]:
        lines = read_metrics(folder)
        return [(ln["step"], ln["loss"], ln["grad_norm"]) for ln in lines if "loss" in ln]

    assert losses(watched[policy]) == losses(plain[policy])


def test_alignment_is_written_at_the_start_then_every_so_many_steps_and_at_the_end(
    watched: dict[str, Path],
) -> None:
    lines = [line for line in read_metrics(watched["learned"]) if "alignment" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert {line["alignment_tasks"] for line in lines} == {4}
    blocks = [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in range(2)]
    assert all(list(line["alignment_by_layer"]) == blocks for line in lines)
    assert all(-1.0 <= line["alignment"] <= 1.0 for line in lines)
    assert len({line["alignment"] for line in lines}) == 4


def test_a_run_without_the_monitor_measures_nothing(plain: dict[str, Path]) -> None:
    assert not any("alignment" in line for line in read_metrics(plain["learned"]))


def test_a_resumed_run_has_the_same_adapter_and_the_same_lines(
    plain: dict[str, Path], watched: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhr_scale.training.trainer.Trainer._log_validation", _stop_at_the_end)
        with pytest.raises(InterruptedError):
            train(folder, "adapter.policy=learned", *WATCHED)
    assert [path.name for path in (folder / "steps").iterdir()] == ["000003"]
    train(folder, "adapter.policy=learned", *WATCHED)
    assert adapter_bytes(folder) == adapter_bytes(plain["learned"])
    found, expected = (
        [line for line in read_metrics(run) if "alignment" in line]
        for run in (folder, watched["learned"])
    )
    assert found == expected


def _stop_at_the_end(trainer: object) -> None:
    if trainer.step:  # type: ignore[attr-defined]
        raise InterruptedError


def test_a_run_that_goes_on_may_be_watched_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhr_scale.training.trainer.Trainer._log_validation", _stop_at_the_end)
        with pytest.raises(InterruptedError):
            train(folder)
    train(folder, *WATCHED)
    assert [line["step"] for line in read_metrics(folder) if "alignment" in line] == [4, 5]


def test_one_task_has_no_alignment_to_watch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.alignment_every: alignment compares tasks"):
        train(tmp_path / "one", "tasks.n_tasks=1", *WATCHED)


def test_private_inventories_have_no_alignment_to_watch() -> None:
    with pytest.raises(ConfigError, match="private inventories share no tensor"):
        load(PretrainConfig, TOY, ["adapter.private=true", *WATCHED])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("monitor.alignment_every=-1", "monitor.alignment_every: -1 is below 0"),
        ("monitor.alignment_tasks=1", "monitor.alignment_tasks: 1 make no pair"),
        ("monitor.alignment_rows=0", "monitor.alignment_rows: 0 is not at least 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(PretrainConfig, TOY, [override])


def test_a_watched_step_is_traced_like_any_other() -> None:
    shape = Shape(rows=2, width=8, depth=4, n_tasks=2)
    peaks = []
    for overrides in ((), WATCHED):
        config = load(PretrainConfig, TOY, overrides)
        blueprint = read_blueprint(config.backbone)
        trace = trace_pretraining(
            config, blueprint, shape, n_tasks=3, accumulates=False, on_gpu=False
        )
        peaks.append(trace.peak)
    assert peaks[0] == peaks[1] > 0
