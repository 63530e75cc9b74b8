"""The benchmark of packed rows runs over both forms, with every way beside the others. No times."""

import json
from typing import Any

import packing
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one turn over the smallest backbones writes."""
    file = tmp_path_factory.mktemp("benchmark") / "results.json"
    words = ["--tiny", "--part", "t5-t0", "llama-t0", "--micro", "4", "--larger", "8"]
    words += ["--batch", "8", "--turns", "1", "--by-length", "--json", str(file)]
    packing.main(words)
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {part: entry["micro 4"] for part, entry in whole.items()}


@pytest.mark.parametrize("part", ["t5-t0", "llama-t0"])
def test_every_way_has_rates_ratios_and_the_share_of_padding(
    found: dict[str, Any], part: str
) -> None:
    rows = found[part]["rows"]
    assert [(row["way"], row["micro"]) for row in rows] == [
        ("frozen, buckets", 4),
        ("frozen, packed", 4),
        ("MHR, buckets", 4),
        ("MHR, packed", 4),
        ("MHR, packed", 8),
        ("PEFT, Trainer", 4),
        ("PEFT, Trainer, by length", 4),
    ]
    for row in rows:
        assert row["cpu_tokens_per_second"] > 0.0
        assert row["wall_ratios"].keys() == set(packing.BASES)
        is_padded = "packed" not in row["way"]
        assert (0.0 < row["padding"] < 1.0) if is_padded else row["padding"] == 0.0
