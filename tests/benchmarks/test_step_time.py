"""The benchmark of a step runs, and what it counts holds on any machine. No times."""

import json
from pathlib import Path
from typing import Any

import pytest
import step_time
from step_time_causal import CAUSAL_BASES
from step_time_ways import BASES, SWITCHES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]

Row = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """What one turn over the smallest backbone writes."""
    file = tmp_path_factory.mktemp("benchmark") / "results.json"
    words = ["--model", "tiny", "--tokens", "16", "--rows", "4", "--turns", "1"]
    step_time.main([*words, "--json", str(file)])
    whole: Row = json.loads(file.read_text(encoding="utf-8"))
    return {part: entry["figures"] for part, entry in whole.items()}


@pytest.fixture(scope="module")
def ways(found: Row) -> dict[str, Row]:
    return {row["way"]: row for row in found["steps"]}


def test_every_way_has_times_ratios_and_memory(found: Row, ways: dict[str, Row]) -> None:
    assert len(ways) == len(found["steps"]) == 18
    for row in ways.values():
        assert row["cpu_ms"] > 0.0
        assert row["ratios"].keys() == set(BASES)
        assert row["peak_mib"] >= row["saved_mib"] > 0.0


def added_kernels(ways: dict[str, Row], name: str, base: str) -> float:
    row = ways[name]
    keys = ("forward_kernels", "backward_kernels")
    return sum((row[key] - ways[base][key]) / row["linears"] for key in keys)


def test_ours_dispatch_less_than_all_others(ways: dict[str, Row]) -> None:
    mhr = added_kernels(ways, "MHR 8", "frozen fused")
    assert mhr < added_kernels(ways, "MHR 8, plain autograd", "frozen fused")
    for name in ("PEFT LoRA", "PEFT Poly", "PEFT Poly, bf16", "reference"):
        assert mhr < added_kernels(ways, name, "frozen stock")


def test_ours_wait_for_the_device_no_more_than_the_frozen_backbone(ways: dict[str, Row]) -> None:
    for name in ("LoRA", "Poly", "MHR 8", "MHR 64"):
        assert ways[name]["waits"] == ways["frozen stock"]["waits"]
    assert ways["PEFT Poly"]["waits"] > ways["frozen stock"]["waits"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_keeps_less_for_backward(ways: dict[str, Row], switch: str) -> None:
    assert ways[f"frozen, {switch} alone"]["saved_mib"] < ways["frozen stock"]["saved_mib"]


def test_an_optimizer_pass_over_stacks_gives_the_numbers_of_separate_tensors(found: Row) -> None:
    figures = found["optimizer"]
    assert figures["largest_difference"] < 1e-6
    assert figures["operations"]["separate"] > 5 * figures["operations"]["stacked"]


def test_attention_alone_changes_no_logit_in_either_type(found: Row) -> None:
    apart = {(row["dtype"], row["switches"]): row["to_stock"] for row in found["logits"]}
    assert apart["float32", "attention"] == apart["bfloat16", "attention"] == 0.0
    assert apart["float32", "norm"] == 0.0
    assert apart["float32", "gate"] < 1e-6


def test_parts_are_kept_beside_those_of_other_runs(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for part in ("logits", "optimizer"):
        words = ["--parts", part, "--model", "tiny", "--tokens", "16", "--turns", "1"]
        step_time.main([*words, "--json", str(file)])
    assert json.loads(file.read_text(encoding="utf-8")).keys() == {"logits", "optimizer"}


# -- over a decoder-only backbone ------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal() -> dict[str, Row]:
    """What one turn over the smallest Llama finds."""
    words = ["--model", "llama-tiny", "--tokens", "32", "--rows", "4", "--turns", "1"]
    found = step_time.main([*words, "--parts", "steps"])
    return {row["way"]: row for row in found["steps"]}


def test_ways_over_a_decoder_only_backbone_are_told_from_peft_with_all_logits(
    causal: dict[str, Row],
) -> None:
    assert len(causal) == 15
    for row in causal.values():
        assert row["ratios"].keys() == set(CAUSAL_BASES)
    for way in ("frozen stock", "PEFT LoRA", "PEFT Poly"):
        assert causal[way]["peak_mib"] < causal[f"{way}, all logits"]["peak_mib"]


def test_ours_dispatch_and_keep_less_than_peft(causal: dict[str, Row]) -> None:
    mhr = causal["MHR 8"]
    for way in ("PEFT LoRA", "PEFT Poly"):
        assert added_kernels(causal, "MHR 8", "frozen fused") < added_kernels(
            causal, way, "frozen stock"
        )
        assert mhr["peak_mib"] < causal[way]["peak_mib"]
    assert mhr["waits"] == 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_keeps_less_of_it(causal: dict[str, Row], switch: str) -> None:
    assert causal[f"frozen, {switch} alone"]["saved_mib"] < causal["frozen stock"]["saved_mib"]
