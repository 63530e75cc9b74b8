"""The verb `finetune`: an exported LoRA trains over a backbone in 4, 8 or 32 bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, succeed
from safetensors.torch import load_file
from toy_finetunes import TOY, base_model, losses, make_adapter, tensors, toy

from mhr_scale.adapters import Adapter, AdapterConfig
from mhr_scale.adapters.collapse import average
from mhr_scale.adapters.peft_folders import open_adapter, write_peft_lora
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import (
    BackboneConfig,
    FinetuneBackboneConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneShotsConfig,
    HeldOutTasks,
    ProtocolConfig,
    ScoringConfig,
)
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import ConfigError, RunError
from mhr_scale.jobs.job_data import JobData
from mhr_scale.recipe.reading import load
from mhr_scale.scores import summary
from mhr_scale.verbs.finetune import finetune

pytestmark = pytest.mark.usefixtures("on_cpu")
LORA = AdapterConfig(layout="full", rank=2, n_skills=1)
PRECISIONS = ("none", "int8", "nf4")


# -- a real task -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """RTE with T-Few's shots and losses, from an averaged adapter of a small real backbone."""
    config = BackboneConfig(name=str(shared / "backbones" / "t5_mini_text"), dtype="float32")
    folder = tmp_path_factory.mktemp("real") / "exported"
    write_peft_lora(average(make_adapter(config)), folder, base_model=config.name)
    data = shared / "data"
    return FinetuneConfig(
        adapter=str(folder),
        backbone=config,
        tasks=HeldOutTasks(
            suite="t0_eval",
            folder=str(data / "t0_eval_sets"),
            templates=str(data / "promptsource_templates" / "templates"),
        ),
        task="rte",
        shots=FinetuneShotsConfig(seed=42, folder=str(data / "tfew_few_shot")),
        protocol=ProtocolConfig(steps=12, max_input_tokens=64, max_target_tokens=16),
        optim=FinetuneOptimConfig(name="adamw", lr=2e-2),
        scoring=ScoringConfig(max_input_tokens=64, examples=8),
        run=FinetuneRunConfig(folder="", log_every=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRECISIONS)
def test_a_real_few_shot_task_is_learnt_from_an_averaged_adapter(
    real: FinetuneConfig, kind: str, tmp_path: Path
) -> None:
    config = replace(
        real,
        backbone=replace(real.backbone, quantise=kind),  # type: ignore[arg-type]
        run=replace(real.run, folder=str(tmp_path)),
    )
    finetune(config)
    found = losses(tmp_path)
    assert len(found) == 12
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["metric"], result["examples"]) == ("accuracy", 8)


def test_an_unknown_held_out_task_comes_with_a_suggestion(
    real: FinetuneConfig, tmp_path: Path
) -> None:
    config = replace(real, task="winogrand", run=replace(real.run, folder=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="did you mean 'winogrande'"):
        finetune(config)


# -- what a run leaves -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run over whole weights."""
    folder = tmp_path_factory.mktemp("finetuned") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        finetune(toy(exported, folder))
    return folder


def test_the_loss_falls(run: Path) -> None:
    found = losses(run)
    assert len(found) == 12
    assert found[-1] < 0.8 * found[0]


def test_scores_before_and_after_lie_beside_the_result(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for key, name in (("score_before", "scores_before.jsonl"), ("score", "scores.jsonl")):
        points = [score["points"] for score in summary.read_scores(run / name)]
        assert len(points) == 6
        assert result[key] == pytest.approx(sum(points) / 6)


def test_every_trained_number_is_counted(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["trained_numbers"] == sum(tensor.numel() for tensor in tensors(run).values())


def test_the_new_adapter_has_the_names_of_the_old_one_and_other_numbers(
    run: Path, exported: Path
) -> None:
    before, after = load_file(exported / "adapter_model.safetensors"), tensors(run)
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_stock_peft_loads_the_new_adapter_and_agrees_with_our_reader(run: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(base_model(TOY), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    card, adapter = open_adapter(run / "adapter")
    ours = Engine({}, timeout_seconds=60).build(TOY, read_blueprint(TOY))
    linears = backbone_linears(ours, adapter)
    adapter.bind(linears)
    rows = {"input_ids": torch.arange(3, 15).reshape(2, 6), "labels": torch.full((2, 3), 5)}
    with torch.no_grad(), adapter.slots([0, 0]):
        torch.testing.assert_close(model(**rows).logits, ours(**rows).logits, rtol=0, atol=2e-5)
    assert card.backbone == {"name": base_model(TOY)}


def backbone_linears(model: Any, adapter: Adapter) -> Any:
    from mhr_scale.adapters.wrapping import wrap

    return wrap(model, adapter.sites)


def test_a_finished_run_does_nothing_again(run: Path, exported: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    assert finetune(toy(exported, run)) == run / "adapter"
    assert file.stat().st_mtime_ns == before


# -- PEFT's own folders ----------------------------------------------------------------------------


@pytest.fixture(params=["safetensors", "bin"])
def stock_lora(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """PEFT's default LoRA for T5, on queries and values, as PEFT saves it."""
    import peft
    import transformers

    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(base_model(TOY), dtype=torch.float32)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "stock")
    if request.param == "bin":
        file = tmp_path / "stock" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    return tmp_path / "stock"


def test_a_lora_of_stock_peft_trains_over_the_backbone_that_its_folder_names(
    stock_lora: Path, tmp_path: Path
) -> None:
    backbone = FinetuneBackboneConfig(dtype="float32")
    finetune(toy(stock_lora, tmp_path / "run", backbone=backbone))
    found = losses(tmp_path / "run")
    assert found[-1] < 0.9 * found[0]
    card, adapter = open_adapter(tmp_path / "run" / "adapter")
    assert card.backbone["name"] == base_model(TOY)
    assert adapter.config.layout == ("q", "v")
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert base_model(TOY) in json.dumps(provenance)


# -- precisions and ways to run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [("none", "bfloat16"), ("int8", "bfloat16"), ("nf4", "float32")]
)
def test_every_precision_lowers_the_loss(
    exported: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    quantised = replace(TOY, quantise=kind, dtype=dtype)  # type: ignore[arg-type]
    finetune(toy(exported, tmp_path, backbone=quantised))
    found = losses(tmp_path)
    assert found[-1] < 0.9 * found[0]
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("none", "reentrant"), ("int8", "non_reentrant"), ("nf4", "reentrant")],
)
def test_neither_micro_batches_nor_recomputation_change_a_run(
    exported: Path, tmp_path: Path, kind: str, recompute: str
) -> None:
    protocol = replace(toy(exported, tmp_path).protocol, steps=3)
    quantised = replace(TOY, quantise=kind)  # type: ignore[arg-type]
    whole = toy(exported, tmp_path / "whole", backbone=quantised, protocol=protocol)
    finetune(whole)
    cut = replace(
        whole,
        backbone=replace(quantised, recompute=recompute),  # type: ignore[arg-type]
        micro_batch_size=1,
        run=replace(whole.run, folder=str(tmp_path / "cut")),
    )
    finetune(cut)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


class Killed(BaseException):
    """What ends a run in the middle."""


def interrupted(config: FinetuneConfig, *, at: int, patch: pytest.MonkeyPatch) -> None:
    """Run until the batch of step `at` is asked for."""
    drawn = JobData.batch

    def batch(self: JobData, step: int) -> Any:
        if step == at:
            raise Killed
        return drawn(self, step)

    with patch.context() as inner:
        inner.setattr(JobData, "batch", batch)
        with pytest.raises(Killed):
            finetune(config)


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", "nf4"), ("adafactor", "none")])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, kind: str
) -> None:
    settings = {
        "optim": FinetuneOptimConfig(name=optimizer, lr=5e-3),  # type: ignore[arg-type]
        "backbone": replace(TOY, quantise=kind, dropout=0.1),  # type: ignore[arg-type]
    }
    finetune(toy(exported, tmp_path / "whole", **settings))
    broken = toy(exported, tmp_path / "broken", **settings)
    broken = replace(broken, run=replace(broken.run, deterministic=True))
    interrupted(broken, at=6, patch=monkeypatch)
    assert [folder.name for folder in (tmp_path / "broken" / "steps").iterdir()] == ["000004"]
    finetune(broken)
    starts = json.loads((tmp_path / "broken" / "provenance.json").read_text())
    assert [start["deterministic"] for start in starts] == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RunError, match=r"run\.deterministic"):
        finetune(replace(broken, run=replace(broken.run, deterministic=False)))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "broken" / "steps").exists()


def test_a_damaged_save_is_named(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy(exported, tmp_path)
    interrupted(config, at=6, patch=monkeypatch)
    (tmp_path / "steps" / "000004" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"000004/optimizer\.pt: 4 bytes, .* no saved step"):
        finetune(config)


def test_generated_answers_are_scored_too(exported: Path, tmp_path: Path) -> None:
    scoring = ScoringConfig(metric="exact_match", max_new_tokens=6, examples=3)
    protocol = replace(toy(exported, tmp_path).protocol, steps=1)
    finetune(toy(exported, tmp_path, scoring=scoring, protocol=protocol))
    assert len(summary.read_scores(tmp_path / "scores.jsonl")) == 3


def test_a_folder_of_another_run_is_refused(run: Path, exported: Path) -> None:
    other = toy(exported, run, shots=FinetuneShotsConfig(seed=1, count=16))
    with pytest.raises(RunError, match=r"shots.seed was 0, is 1.*; use another run.folder"):
        finetune(other)


# -- the recipe ------------------------------------------------------------------------------------


def test_the_toy_recipe_runs_as_it_is_shipped(exported: Path, tmp_path: Path) -> None:
    recipe = ROOT / "launch" / "recipes" / "toy_finetune.yaml"
    overrides = [f"adapter={exported}", f"run.folder={tmp_path / 'run'}", "protocol.steps=2"]
    config = load(FinetuneConfig, recipe, [*overrides, "scoring.examples=2"])
    assert (finetune(config) / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_launch_script_prints_its_recipe(exported: Path) -> None:
    recipe = "launch/recipes/toy_finetune.yaml"
    printed = succeed("launch/finetune.py", recipe, f"adapter={exported}", "--print")
    assert f"adapter: {exported}" in printed
    assert "DeepSpeed" not in printed
