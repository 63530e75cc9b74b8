"""The verb `average`: the mean of an inventory, with and without extra steps."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_pretrains
from processes import read_metrics
from safetensors.torch import load_file
from small_runs import write_rows
from toy_pretrains import TOY

from mhr_scale.adapters import artefact
from mhr_scale.adapters.collapse import average as mean_of
from mhr_scale.config import AverageConfig, PretrainConfig, RunConfig
from mhr_scale.errors import ConfigError, DataError, RunError, UserError
from mhr_scale.recipe.reading import load
from mhr_scale.verbs.average import average
from mhr_scale.verbs.pretrain import pretrain

SHORT = (*toy_pretrains.SHORT, "optim.name=adafactor", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    pretrain(load(PretrainConfig, TOY, [*SHORT, f"run.folder={folder}"]))
    return folder


def settings(source: Path, folder: Path, **changes: object) -> AverageConfig:
    run = RunConfig(folder=str(folder), log_every=1)
    return replace(AverageConfig(source=str(source), run=run), **changes)


def averaged(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "averaged" / f"{steps:06d}" / artefact.TENSORS)


def test_the_average_is_the_mean_over_the_skills(source: Path, tmp_path: Path) -> None:
    average(settings(source, tmp_path / "mean"))
    inventory, mean = (
        load_file(source / "adapter" / artefact.TENSORS),
        averaged(tmp_path / "mean", 0),
    )
    name = "encoder.block.0.layer.0.SelfAttention.q"
    width, rank = mean[f"{name}.A"].shape[2:]
    a_QIR = inventory[f"{name}.A"].mean(1)
    torch.testing.assert_close(mean[f"{name}.A"].view(width, rank), a_QIR.flatten(0, 1))


def test_an_average_is_one_ordinary_adapter_of_the_same_rank(source: Path, tmp_path: Path) -> None:
    card = artefact.read_card(average(settings(source, tmp_path / "mean")))
    assert (card.adapter.method, card.adapter.rank) == ("LoRA", 2)


def test_an_adapter_folder_will_do_without_extra_steps(source: Path, tmp_path: Path) -> None:
    average(settings(source / "adapter", tmp_path / "mean"))
    assert averaged(tmp_path / "mean", 0)


def test_no_extra_steps_need_neither_deepspeed_nor_a_backbone(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = sys.modules['transformers'] = None\n"
        "from mhr_scale.config import AverageConfig, RunConfig\n"
        "from mhr_scale.verbs.average import average\n"
        f"average(AverageConfig(source={str(source)!r}, run=RunConfig(folder={str(tmp_path)!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert averaged(tmp_path, 0)


@pytest.fixture(scope="module", params=["mean", "inventory"])
def extra(request: pytest.FixtureRequest, source: Path) -> Path:
    folder = source.parent / request.param
    average(settings(source, folder, steps=(0, 2, 3), trainable=request.param))
    return folder


def test_one_run_gives_every_number_of_extra_steps(extra: Path) -> None:
    assert sorted(path.name for path in (extra / "averaged").iterdir()) == [
        "000000",
        "000002",
        "000003",
    ]


def test_extra_steps_start_from_the_average(source: Path, extra: Path) -> None:
    mean = artefact.named_tensors(mean_of(artefact.load(source)))
    assert all(torch.equal(tensor, averaged(extra, 0)[name]) for name, tensor in mean.items())


def test_extra_steps_move_the_average(extra: Path) -> None:
    one, two, three = (averaged(extra, steps) for steps in (0, 2, 3))
    assert all(not torch.equal(one[n], two[n]) and not torch.equal(two[n], three[n]) for n in one)


def test_the_adapter_is_that_of_the_most_extra_steps(extra: Path) -> None:
    last = averaged(extra, 3)
    stored = load_file(extra / "adapter" / artefact.TENSORS)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in last.items())


def test_the_schedule_is_restarted(extra: Path) -> None:
    steps = [line["step"] for line in read_metrics(extra) if "loss" in line]
    assert steps == [1, 2, 3]


def test_the_mean_and_the_inventory_train_differently(source: Path) -> None:
    folders = [source.parent / name for name in ("mean", "inventory")]
    for name, folder in zip(("mean", "inventory"), folders, strict=True):
        if not folder.exists():
            average(settings(source, folder, steps=(0, 2, 3), trainable=name))
    one, two = (averaged(folder, 3) for folder in folders)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_lora_can_be_given_the_same_steps(tmp_path: Path) -> None:
    lora = [*SHORT, "adapter={layout: attention, rank: 2, n_skills: 1}"]
    pretrain(load(PretrainConfig, TOY, [*lora, f"run.folder={tmp_path / 'lora'}"]))
    average(settings(tmp_path / "lora", tmp_path / "more", steps=(0, 2)))
    before = load_file(tmp_path / "lora" / "adapter" / artefact.TENSORS)
    assert all(torch.equal(t, averaged(tmp_path / "more", 0)[name]) for name, t in before.items())


def test_extra_steps_want_the_run_not_its_adapter(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="name its run folder, not its adapter"):
        average(settings(source / "adapter", tmp_path / "mean", steps=(2,)))


def test_tasks_of_a_relative_folder_are_found_from_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "here" / "rows")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = [word for word in SHORT if not word.startswith("tasks.")]
    pretrain(
        load(
            PretrainConfig,
            TOY,
            [*words, "tasks={suite: jsonl, folder: rows}", f"run.folder={tmp_path / 'run'}"],
        )
    )
    asked = settings(tmp_path / "run", tmp_path / "mean", steps=(1,))
    average(settings(tmp_path / "run", tmp_path / "in_place", steps=(1,)))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(DataError, match=r"tasks\.folder: no folder 'rows'"):
        average(asked)
    average(replace(asked, tasks={"folder": str(tmp_path / "here" / "rows")}))
    assert all(
        torch.equal(tensor, averaged(tmp_path / "mean", 1)[name])
        for name, tensor in averaged(tmp_path / "in_place", 1).items()
    )
    (tmp_path / "here" / "rows" / "reverse.mirror.after").rename(tmp_path / "here" / "rows" / "new")
    other = settings(tmp_path / "run", tmp_path / "other", steps=(1,))
    with pytest.raises(RunError, match="only one of the two has new, reverse"):
        average(replace(other, tasks={"folder": str(tmp_path / "here" / "rows")}))


def test_where_tasks_are_is_asked_for_extra_steps_only() -> None:
    with pytest.raises(ConfigError, match="only extra steps read tasks"):
        AverageConfig(source="x", tasks={"folder": "y"}, run=RunConfig(folder="z"))


def test_a_setting_that_the_tasks_do_not_have_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="foldr"):
        average(settings(source, tmp_path / "mean", steps=(1,), tasks={"foldr": "x"}))


def test_a_source_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter\.json here"):
        average(settings(tmp_path, tmp_path / "mean"))


@pytest.mark.parametrize("steps", [(), (-1,), (3, 2), (2, 2)])
def test_steps_have_to_ascend_from_zero(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending numbers from 0"):
        AverageConfig(source="x", steps=steps, run=RunConfig(folder="y"))
