"""The verb as a user runs it: what it leaves behind, and what it says to bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, read_metrics
from toy_pretrains import SHORT, TOY, train
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale import load_adapter
from mhr_scale.adapters import artefact
from mhr_scale.config import PretrainConfig
from mhr_scale.errors import RunError, UserError
from mhr_scale.recipe.reading import load
from mhr_scale.training.opening import opened_training
from mhr_scale.verbs.launching import main
from mhr_scale.verbs.pretrain import pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train(folder)
    return folder


# -- what it leaves ----------------------------------------------------------------------------


def test_the_run_folder_is_complete(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter",
        "config.yaml",
        "deepspeed.json",
        "inputs.json",
        "metrics.jsonl",
        "provenance.json",
        "rejects.jsonl",
        "steps",
    ]


def test_saved_steps_are_complete(run: Path) -> None:
    assert sorted(path.parent.name for path in run.glob("steps/*/DONE")) == ["000002", "000004"]


def test_every_step_is_logged_with_its_figures(run: Path) -> None:
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {
        "step",
        "loss",
        "examples",
        "tokens",
        "padding_share",
        "grad_norm",
        "seconds",
        "lr_inventory",
        "lr_routing",
        "tokens_per_second",
    }


def test_validation_is_logged_before_and_after_by_task(run: Path) -> None:
    lines = [line for line in read_metrics(run) if "validation_loss" in line]
    assert [(line["step"], len(line["validation_loss_by_task"])) for line in lines] == [
        (0, 6),
        (4, 6),
    ]


def test_the_stored_config_is_a_recipe_that_loads_to_the_same(run: Path) -> None:
    config = load(PretrainConfig, run / "config.yaml")
    assert config == load(PretrainConfig, TOY, [*SHORT, f"run.folder={run}"])


def test_provenance_says_what_ran_and_on_which_data(run: Path) -> None:
    (start,) = json.loads((run / "provenance.json").read_text())
    assert {"argv", "git_commit", "versions", "world_size", "device", "backbone", "data"} <= set(
        start
    )
    assert start["packing"] is True


def test_the_card_names_the_backbone_and_the_tasks(run: Path) -> None:
    card = artefact.read_card(run)
    assert (card.backbone["name"], len(card.task_names), card.step) == ("builtin:toy", 6, 4)


def test_the_reloaded_adapter_gives_the_logged_validation_loss(run: Path, tmp_path: Path) -> None:
    logged = read_metrics(run)[-1]["validation_loss"]
    config = load(PretrainConfig, TOY, [*SHORT, f"run.folder={tmp_path / 'fresh'}"])
    with opened_training(config) as trainer:
        assert trainer.validate()["validation_loss"] != pytest.approx(logged, rel=1e-3)
        trainer.adapter.load_state_dict(load_adapter(run).state_dict())
        assert trainer.validate()["validation_loss"] == pytest.approx(logged, rel=1e-6)


def test_a_finished_run_started_again_adds_nothing(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    before = (folder / "metrics.jsonl").read_text()
    train(folder)
    assert (folder / "metrics.jsonl").read_text() == before


def test_old_steps_go_beyond_the_number_to_keep(tmp_path: Path) -> None:
    train(tmp_path / "run", "run.keep=1")
    assert [path.name for path in (tmp_path / "run" / "steps").iterdir()] == ["000004"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter={n_skills: 1, rank: 4}"],
        ["adapter={kind: ia3, n_skills: 1}"],
        ["adapter={kind: ia3, n_skills: 3, n_splits: 4}"],
        ["adapter={n_skills: 3, policy: noisy, granularity: sublayer}"],
        ["adapter={n_skills: 3, policy: straight_through, granularity: stack}"],
        ["adapter={n_skills: 3, policy: random, granularity: model}"],
        ["adapter={n_skills: 3, policy: uniform}"],
        ["adapter={n_skills: 3, policy: fixed, layout: light}"],
        ["adapter={n_skills: 1, private: true}"],
        ["optim.name=adafactor", "mixture.temperature=2", "loss.label_smoothing=0.1"],
        ["backbone.dtype=bfloat16", "backbone.recompute=non_reentrant"],
        ["loss.normalise=examples", "schedule.decay=cosine", "backbone.dropout=0.1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_method_and_setting_trains(tmp_path: Path, overrides: list[str]) -> None:
    train(tmp_path / "run", "run.validate_every=-1", *overrides)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)


@pytest.mark.slow
def test_mhr_learns_what_a_lora_of_the_same_rank_cannot(tmp_path: Path) -> None:
    """The inputs do not tell the task: only routing can (reference/toy_suite.md)."""
    length = (
        "schedule.steps=150",
        "run.save_every=0",
        "tasks.n_tasks=20",
        "tasks.train_examples=100",
        "batch.batch_size=64",
        "batch.micro_batch_size=64",
    )
    final = {}
    for name, setting in (("lora", "n_skills: 1"), ("mhr", "n_skills: 4, n_splits: 8")):
        adapter = f"adapter={{layout: attention, rank: 2, {setting}}}"
        train(tmp_path / name, *length, adapter)
        final[name] = read_metrics(tmp_path / name)[-1]["validation_loss"]
    assert final["mhr"] < 0.5 * final["lora"]


# -- bad input ---------------------------------------------------------------------------------


def jsonl(folder: Path, text: str) -> list[str]:
    (folder / "data" / "t").mkdir(parents=True)
    (folder / "data" / "t" / "train.jsonl").write_text(text)
    return [f"tasks={{suite: jsonl, folder: {folder / 'data'}, intake: {{on_bad: error}}}}"]


GOOD_ROW = '{"input": "a b", "target": "b a"}\n'
BAD_INPUT = {
    "unknown_key": (["adapter.n_skils=4"], "'adapter.n_skils'"),
    "missing_folder": (["tasks={suite: superni, folder: nowhere}"], "nowhere"),
    "splits_do_not_divide": (["adapter.n_splits=7"], "adapter.n_splits: 7 "),
    "unknown_backbone_folder": (["backbone.name=./no/such"], "'./no/such'"),
    "unknown_ds_file": (["run.ds_config=ds_configs/zero4.json"], "'ds_configs/zero4.json'"),
    "indivisible_batch": (["batch.micro_batch_size=3"], "micro batches of 3"),
    "t0_without_its_hub": (["tasks={suite: t0}"], "P3"),
    "unknown_tasks_in_weights": (["mixture.weights={revers: 2.0}"], "revers"),
}


def fails(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run the launch script's main; it must leave with code 2, one line, and nothing written."""
    run_folder = folder / "run"
    argv = ["pretrain.py", TOY, *SHORT, f"run.folder={run_folder}", *overrides]
    old, sys.argv = sys.argv, argv
    try:
        with pytest.raises(SystemExit) as left:
            main(PretrainConfig, pretrain, about="pretrain RECIPE")
    finally:
        sys.argv = old
    assert left.value.code == 2
    assert not run_folder.exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in fails(tmp_path, capsys, *overrides)


def test_a_malformed_line_is_named_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(tmp_path, capsys, *jsonl(tmp_path, GOOD_ROW + '{"input": "a\n'))
    assert "train.jsonl:2:" in message


def test_a_run_folder_with_other_settings_is_refused_and_left_alone(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run, folder)
    before = {path: path.stat().st_mtime for path in folder.rglob("*")}
    with pytest.raises(RunError, match=r"adapter\.rank was 2, is 3"):
        train(folder, "adapter.rank=3")
    assert {path: path.stat().st_mtime for path in folder.rglob("*")} == before


def test_an_adapter_of_another_layout_is_refused(run: Path) -> None:
    config = T5Config(
        d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=1, feed_forward_proj="gated-gelu"
    )
    with pytest.raises(UserError, match="made for another backbone"):
        load_adapter(run, model=T5ForConditionalGeneration(config))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_tasks(tmp_path: Path) -> None:
    overrides = [*SHORT, f"run.folder={tmp_path}", "run.validate_every=-1"]
    with opened_training(load(PretrainConfig, TOY, overrides)) as trainer:
        task = trainer.batches.samples(0)[0].task
        name = trainer.adapter.task_names[task]
        with torch.no_grad():
            trainer.adapter.routing_logits[task].fill_(float("nan"))
        with pytest.raises(UserError, match=rf"step 1: .*{name}.*nothing is saved yet"):
            trainer.train()


# -- recipes on real rows ------------------------------------------------------------------------


def check_random_weights(folder: Path, recipe: str, n_tasks: int, *overrides: str) -> None:
    """Two steps of a recipe without a name for its backbone."""
    short = [
        f"run.folder={folder}",
        "run.ds_config=null",
        "schedule.steps=2",
        "run.log_every=1",
        "run.validate_every=-1",
        "run.token_cache=null",
        "batch.max_input_tokens=32",
        "batch.max_target_tokens=8",
    ]
    path = ROOT / "launch" / "recipes" / recipe
    pretrain(load(PretrainConfig, path, [*short, *overrides]))
    card = artefact.read_card(folder)
    assert (len(card.task_names), card.backbone["name"]) == (n_tasks, None)
    assert len(read_metrics(folder)) == 2


def test_superni_trains_random_weights_without_a_backbone(shared: Path, tmp_path: Path) -> None:
    rows = f"tasks.folder={shared / 'data' / 'superni_sample'}"
    check_random_weights(tmp_path, "superni_tiny.yaml", 100, rows, "tasks.train_examples=10")


def test_prompted_rows_train_random_weights_without_a_backbone(
    shared: Path, tmp_path: Path
) -> None:
    """Every fifteenth row of the real tasks."""
    sample = shared / "data" / "t0_open_sample"
    for file in sample.rglob("*.jsonl"):
        short = tmp_path / "rows" / file.relative_to(sample)
        short.parent.mkdir(parents=True, exist_ok=True)
        short.write_text("\n".join(file.read_text(encoding="utf-8").split("\n")[::15]))
    check_random_weights(
        tmp_path / "run", "t0_open_tiny.yaml", 111, f"tasks.folder={tmp_path / 'rows'}"
    )


def gradients(folder: Path, micro_batch_size: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step, of an adapter that has left its initial values."""
    overrides = [*SHORT, f"run.folder={folder}", f"batch.micro_batch_size={micro_batch_size}"]
    generator = torch.Generator().manual_seed(5)
    with opened_training(load(PretrainConfig, TOY, overrides)) as trainer:
        for parameter in trainer.adapter.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        trainer.reduce_gradients(trainer.accumulate(trainer.batches[0]))
        return {name: p.grad.to_dense() for name, p in trainer.adapter.named_parameters()}


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = gradients(tmp_path / "a", 8), gradients(tmp_path / "b", 2)
    errors = {n: float((parts[n] - g).abs().max() / g.abs().max()) for n, g in whole.items()}
    assert {name: error for name, error in errors.items() if error >= 1e-5} == {}
