"""Traps that ZeRO-3 sets for a frozen backbone; one launch measures them all on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import succeed
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import BackboneConfig, HardwareConfig
from mhr_scale.planning.hardware import find_machines
from mhr_scale.planning.placements import Load, Placement, load_of, weigh

pytestmark = [pytest.mark.dist, pytest.mark.slow]

MODES = ("none", "reentrant", "non_reentrant")
#: What each rank measured.
Ranks = list[dict[str, Any]]


def write_untied_checkpoint(folder: Path) -> None:
    """A tiny T0-like checkpoint: gated, `lm_head` of its own; with the logits of a plain load."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    }
    model = T5ForConditionalGeneration(T5Config(**settings)).eval()
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in model.named_parameters()
        if "embed_tokens" not in name
    }
    save_file(tensors, folder / "model.safetensors")
    config = {**settings, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    x = torch.randint(2, 60, (2, 7))
    y = torch.randint(2, 60, (2, 5))
    with torch.no_grad():
        logits = model(input_ids=x, decoder_input_ids=y).logits
    (folder / "golden").mkdir()
    save_file(
        {"input_ids": x, "decoder_input_ids": y, "logits": logits},
        folder / "golden" / "logits.safetensors",
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_untied_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    out = tmp_path_factory.mktemp("out")
    succeed("tests/distributed/programs/traps.py", str(checkpoint), str(out), ranks=2)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def planned(checkpoint: Path, measured: Ranks) -> Load:
    """What `plan` says of the placement that was measured."""
    file = checkpoint / "ds.json"
    file.write_text(json.dumps(measured[0]["content"]))
    placement = Placement(name="zero3", ds_config=str(file), dtype="float32", is_sharded=True)
    machines = find_machines(HardwareConfig(gpu="A100-40G", gpus=2))
    blueprint = read_blueprint(BackboneConfig(name=str(checkpoint), dtype="float32"))
    return load_of(placement, weigh(blueprint), machines)


def test_an_untied_checkpoint_gives_the_logits_of_a_plain_load(measured: Ranks) -> None:
    for rank in measured:
        assert rank["untied"]["error"] < 1e-6


def test_an_untied_head_stays_untied(measured: Ranks) -> None:
    for rank in measured:
        assert not rank["untied"]["is_tied"]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_stays_gathered_after_backward(measured: Ranks, mode: str) -> None:
    for rank in measured:
        assert rank[mode]["resident_after_backward"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_resident_weights_stay_within_the_live_limit(measured: Ranks, mode: str) -> None:
    for rank in measured:
        assert rank[mode]["peak"] <= rank[mode]["peak_bound"] < rank[mode]["total"]


@pytest.mark.parametrize(
    ("mode", "bound"), [("none", 2.3), ("reentrant", 2.4), ("non_reentrant", 3.2)]
)
def test_gather_volume_of_a_step_is_bounded(measured: Ranks, mode: str, bound: float) -> None:
    for rank in measured:
        assert 1.0 < rank[mode]["gathered_per_step"] <= bound


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_those_of_a_replicated_backbone(measured: Ranks, mode: str) -> None:
    for rank in measured:
        assert rank[mode]["gradient_error"] < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_every_adapter_tensor_has_a_gradient(measured: Ranks, mode: str) -> None:
    for rank in measured:
        assert rank[mode]["zero_gradients"] == 0


def test_each_rank_holds_half_of_the_backbone(measured: Ranks) -> None:
    for rank in measured:
        assert rank["none"]["shard_share"] == pytest.approx(0.5, abs=0.01)


def test_a_rank_s_shards_take_what_is_planned(measured: Ranks, planned: Load) -> None:
    for rank in measured:
        assert rank["none"]["shard_bytes"] == planned.weights


@pytest.mark.parametrize("mode", MODES)
def test_as_much_is_gathered_at_once_as_is_planned(
    measured: Ranks, planned: Load, mode: str
) -> None:
    for rank in measured:
        assert 4 * rank[mode]["most_at_once"] == pytest.approx(planned.gathered, rel=0.1)


def test_deepspeed_never_learns_of_the_adapters(measured: Ranks) -> None:
    for rank in measured:
        assert rank["none"]["adapters_known_to_deepspeed"] == 0


def test_adapters_stay_float32(measured: Ranks) -> None:
    for rank in measured:
        assert rank["none"]["adapter_dtypes"] == ["torch.float32"]


def test_ranks_that_run_different_modules_are_stopped_in_the_first_step(measured: Ranks) -> None:
    for rank in measured:
        assert "different modules" in rank["other_modules"]


def test_adapters_that_differ_between_ranks_are_noticed(measured: Ranks) -> None:
    for rank in measured:
        assert "differ between ranks" in rank["unequal_tensors"]


def test_the_compiled_cpu_collective_is_switched_off(measured: Ranks) -> None:
    for rank in measured:
        assert rank["shm_op"] is False


def test_every_process_group_has_the_timeout_of_the_recipe(measured: Ranks) -> None:
    for rank in measured:
        assert rank["timeouts"] == [77.0]
