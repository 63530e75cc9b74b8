"""A plan by rates that were measured on a card, and files that have none."""

import json
from pathlib import Path
from typing import Any

import pytest

from mhr_scale.config import HardwareConfig
from mhr_scale.errors import ConfigError
from mhr_scale.planning.hardware import LAUNCH_SECONDS, Machines, find_machines
from mhr_scale.verbs.plan import plan

TOY = Path(__file__).parents[2] / "launch/recipes/toy.yaml"
ENTRIES = (
    ("card", "matrix products", {"flops_per_s": 7.5e14, "width": 8192}),
    ("card", "memory", {"bytes_per_s": 4.1e12}),
    ("card", "copies", {"up_bytes_per_s": 5.2e10, "down_bytes_per_s": 4.9e10}),
    ("card", "launches", {"seconds": 4.5e-6}),
)


def write(folder: Path, entries: Any = ENTRIES, **changes: Any) -> str:
    machine = {"device": "NVIDIA H200", "date": "2027-01-05", "gib": 139.8}
    found = {
        "machine": machine,
        "entries": [{"part": p, "name": n, "values": v, "error": ""} for p, n, v in entries],
        **changes,
    }
    file = folder / "accept.json"
    file.write_text(json.dumps(found))
    return str(file)


def on_h200(file: str | None) -> Machines:
    return find_machines(HardwareConfig(gpu="H200", gpus=1, measured=file))


def test_measured_rates_are_in_place_of_shares_of_peaks(tmp_path: Path) -> None:
    table, found = on_h200(None), on_h200(write(tmp_path))
    assert (found.bf16_flops, found.memory_rate, found.host_rate) == (7.5e14, 4.1e12, 5.2e10)
    assert (found.launch_seconds, table.launch_seconds) == (4.5e-6, LAUNCH_SECONDS)
    assert (found.fp32_flops, found.memory) == (table.fp32_flops, table.memory)
    layers = ("plan", "products of layers", {"flops_per_s": 6.0e14})
    assert on_h200(write(tmp_path, (*ENTRIES, layers))).bf16_flops == 6.0e14


def test_a_plan_says_what_was_measured_and_where(tmp_path: Path) -> None:
    words = [str(TOY), "hardware.gpu=H200", "hardware.gpus=1"]
    measured = [*words, f"hardware.measured={write(tmp_path)}"]
    table, found = (" ".join(plan(asked).split()) for asked in (words, measured))
    assert "of the makers' peaks products reach 65%" in table
    assert "makers' peaks" not in found
    assert "a kernel costs 4.5 us to start" in found
    assert "measured: on NVIDIA H200, 2027-01-05 (hardware.measured)" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": ENTRIES[1:]}, "no flops_per_s under card, matrix products; measure it again"),
        ({"entries": (*ENTRIES[:3], ("card", "launches", {}))}, "no seconds under card, launches"),
        (
            {"entries": (*ENTRIES[:1], ("card", "memory", {"bytes_per_s": 0}), *ENTRIES[2:])},
            "card, memory: bytes_per_s 0 is not above 0",
        ),
        (
            {"entries": (("card", "matrix products", {"flops_per_s": "fast"}), *ENTRIES[1:])},
            "flops_per_s fast is not above 0",
        ),
        ({"machine": {"device": "CPU", "date": "2027-01-05"}}, "measured on a CPU at toy size"),
        ({"machine": {"device": "NVIDIA A100", "date": ""}}, "is of a NVIDIA A100, and the plan"),
        ({"machine": None}, "it is no accept.json of this version"),
        ({"machine": {"device": "NVIDIA H200"}}, "no accept.json .*'date'"),
    ],
)
def test_files_without_rates_of_the_card_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        on_h200(write(tmp_path, **changes))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        on_h200(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("rates")
    with pytest.raises(ConfigError, match=r"text\.json: it is no JSON .*; measure it again"):
        on_h200(str(tmp_path / "text.json"))
    with pytest.raises(ConfigError, match=r"hardware\.tflops: 3\.0, and hardware.measured says"):
        HardwareConfig(gpu="H200", measured="x", tflops=3.0)
