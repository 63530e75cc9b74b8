"""The check of an export runs block by block: the same logits, in a fraction of the memory."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run
from toy_exports import make, run_export, save_run

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, find_sites
from mhr_scale.adapters.wrapping import wrap
from mhr_scale.backbone.blueprint import Blueprint, make_model, read_blueprint, tie
from mhr_scale.backbone.merging import merge, plan_weights
from mhr_scale.backbone.on_demand import hollow_model
from mhr_scale.backbone.weights import read_whole
from mhr_scale.config import BackboneConfig, ExportConfig
from mhr_scale.errors import BackboneError
from mhr_scale.exchange.reloading import LogitsCheck, expected_logits
from mhr_scale.verbs.export import parts_of


@pytest.fixture
def blueprint() -> Blueprint:
    return read_blueprint(BackboneConfig(name="builtin:toy"))


def plain(blueprint: Blueprint) -> torch.nn.Module:
    """The backbone as a whole, in float32."""
    model = make_model(blueprint).float()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(read_whole(blueprint.source, name))
    tie(model, blueprint)
    return model


def plain_logits(check: LogitsCheck, model: torch.nn.Module) -> torch.Tensor:
    """What a model gives for the rows of a check."""
    packed = check._family.pack(check._rows, check._blueprint.model_config, pad_multiple=1)
    return check._family.logits(model, packed)


@pytest.mark.parametrize("kind", ["MHR", "LoRA", "IA3", "private"])
def test_logits_are_those_of_a_model_that_holds_its_weights(
    kind: str, blueprint: Blueprint
) -> None:
    check, adapter, model = LogitsCheck(blueprint), make(kind), plain(blueprint)
    task_ids = (2, 0, 1, 1, 2, 0, 0, 1)
    found = check.native(adapter, task_ids)
    adapter.bind(wrap(model, adapter.sites))
    with torch.no_grad(), adapter.slots(task_ids):
        assert torch.equal(found, plain_logits(check, model))


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_merged_logits_are_those_of_a_model_that_is_merged(kind: str, blueprint: Blueprint) -> None:
    check, adapter, model = LogitsCheck(blueprint), make(kind), plain(blueprint)
    pairs = artefact.named_tensors(adapter)
    found = check.merged(adapter, plan_weights(blueprint, "bfloat16"))
    with torch.no_grad():
        for round_once, logits in zip((False, True), found, strict=True):
            for name, parameter in model.named_parameters():
                if round_once:
                    parameter.copy_(parameter.bfloat16())
                else:
                    parameter.copy_(merge(name, parameter, pairs, scale=adapter.config.scale))
            assert torch.equal(logits, plain_logits(check, model))


class CountingCheck(LogitsCheck):
    """Counts its passes under our own adapter."""

    n_passes = 0

    def native(self, adapter: Adapter, task_ids: Sequence[int]) -> torch.Tensor:
        self.n_passes += 1
        return super().native(adapter, task_ids)


def test_tasks_of_one_adapter_are_computed_in_one_pass(blueprint: Blueprint) -> None:
    check, adapter = CountingCheck(blueprint), make("MHR")
    parts = parts_of("all_tasks", ExportConfig(adapter="", folder="", what="all_tasks"), adapter)
    found = expected_logits(check, parts)
    assert check.n_passes == 1
    for part, logits in zip(parts, found, strict=True):
        torch.testing.assert_close(logits, check.native(adapter, part.task_ids))


def test_a_weight_that_nobody_fetched_shows(blueprint: Blueprint) -> None:
    model, weights = hollow_model(blueprint)
    head = next(p for p, weight in weights.items() if weight.name == "lm_head.weight")
    check = LogitsCheck(blueprint)
    assert (
        not check._logits(model, {p: w for p, w in weights.items() if p is not head})
        .isfinite()
        .any()
    )
    assert check._logits(model, weights).isfinite().all()


def test_a_model_is_hollow_again_after_a_call_also_after_one_that_failed(
    blueprint: Blueprint,
) -> None:
    model, weights = hollow_model(blueprint)
    check, before = LogitsCheck(blueprint), list(model.parameters())
    failing = dict(weights)
    last = before[-1]

    def fail() -> torch.Tensor:
        raise BackboneError("cannot be read")

    failing[last] = replace(weights[last], make=fail)
    with pytest.raises(BackboneError, match="cannot be read"):
        check._logits(model, failing)
    check._logits(model, weights)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert not any(p.untyped_storage().nbytes() > 8 for p in model.parameters())


@pytest.mark.slow
def test_a_backbone_far_larger_than_its_modules_is_compared_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of `peak_memory_export.py`: what a process of its own allocates at most."""
    # blocks below 32 MB would otherwise stay with the C library when they are freed
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    result = run("tests/verbs/programs/peak_memory_export.py", str(tmp_path), timeout=240)
    assert result.returncode == 0, result.stdout
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["whole"] > 100e6
    for form, grown in found["grown"].items():
        assert grown < 3 * found["largest"] + 32e6 < found["whole"] / 2, (form, found)


def test_a_right_adapter_with_strong_updates_on_a_real_backbone_is_not_refused(
    shared: Path, tmp_path: Path
) -> None:
    """Rank 4, B of deviation 0.5: logits differ by 1e-4 of the largest, as last bits make them."""
    backbone = str(shared / "backbones" / "t5_mini_text")
    with torch.device("meta"):
        model = make_model(read_blueprint(BackboneConfig(name=backbone)))
    config = AdapterConfig(layout="attention", rank=4, n_skills=1, alpha=32.0)
    adapter = Adapter(config, find_sites(model, config.layout), task_names=["a"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if ".B_" in name:
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    folder = save_run(tmp_path / "run", adapter, backbone={"name": backbone})
    assert (run_export(folder, tmp_path / "out") / "adapter_config.json").is_file()
