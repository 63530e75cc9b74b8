"""The benchmark of tokens' slots runs, and reckons what a limit costs. No times."""

import json
from pathlib import Path

import pytest
import slot_products

pytestmark = pytest.mark.slow


def test_every_case_has_both_ways_and_every_limit_a_cost(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    words = ["--tokens", "16", "--slots", "2", "32", "--ranks", "1", "--widths", "1"]
    slot_products.main([*words, "--turns", "1", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))["bfloat16"]
    (row,) = found["rows"]  # 16 tokens are in 16 slots at most
    assert row["spans_us"] > 0.0
    assert row["masked_us"] > 0.0
    assert all(cost >= 1.0 for cost in found["costs"].values())


def test_a_limit_costs_what_the_way_it_chooses_is_slower() -> None:
    row = {"tokens": 10, "in": 10, "rank": 1, "masked / spans": 0.5}
    assert slot_products.slowdown(row, 100) == 1.0
    assert slot_products.slowdown(row, 99) == 2.0
    assert slot_products.slowdown({**row, "masked / spans": 2.0}, 100) == 2.0
