"""The few-shot benchmark runs, compares every way, and waves do less per job-step. No times."""

import json
from pathlib import Path
from typing import Any

import few_shot_waves
import pytest
from few_shot_gpu import LINKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]

OURS = {"waves of 2", "one by one", "waves of 2, padded", "one by one, padded"}
WAYS = {
    "average": {*OURS, "PEFT LoRA"},
    "full": {*OURS, "PEFT LoRA", "PEFT Poly"},
    "routing": {*OURS, "PEFT LoRA", "PEFT Poly"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a quick comparison writes."""
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    few_shot_waves.main(["--quick", "--json", str(file)])
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_every_kind_has_a_row_for_every_way(rows: list[dict[str, Any]]) -> None:
    found = [(row["kind"], row["way"]) for row in rows]
    assert len(found) == len(set(found))
    assert set(found) == {(kind, way) for kind, ways in WAYS.items() for way in ways}


def test_every_row_has_times_and_ratios_to_the_other_ways(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["cpu_ms"] > 0.0
        assert row["wall_ms"] > 0.0
        assert row["cpu_ratios"].keys() == WAYS[row["kind"]] - {row["way"]}


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("what", ["operations", "kernels"])
def test_waves_dispatch_fewer_operations_per_job_step(
    rows: list[dict[str, Any]], kind: str, what: str
) -> None:
    counts = {row["way"]: row[what] for row in rows if row["kind"] == kind}
    waves, packed = counts.pop("waves of 2, padded"), counts.pop("waves of 2")
    assert waves < 0.6 * min(counts.values())
    assert packed < counts["one by one"]  # each job's tokens have products of their own


def test_a_gpu_is_estimated_for_every_link_from_counts_at_the_real_shape(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    few_shot_waves.main(["--quick", "--model-gpu", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {row["weights"] for row in found} == set(LINKS)
    for row in found:
        counts = row["counts"]
        kernels = {way: found["kernels"] for way, found in counts.items()}
        waves, alone = "waves of 8, padded", "one by one, padded"
        assert kernels["waves of 24, padded"] < kernels[waves] < kernels[alone] / 4
        assert counts[waves]["flops"] == pytest.approx(counts[alone]["flops"])
        assert row["waves of 8 gain"] > 1.0
