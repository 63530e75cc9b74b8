"""One recipe on one process, two replicated and two sharded ones: the same numbers.

Real tasks and a real backbone, six steps, through the real launcher, which starts once.
"""

import json
from pathlib import Path

import pytest
from processes import ROOT, read_metrics, succeed_together
from safetensors.torch import load_file

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUNS = {
    "alone": (0, ["run.ds_config=null"]),
    "alone_accumulating": (0, ["run.ds_config=null", "batch.micro_batch_size=4"]),
    "alone_padded": (0, ["run.ds_config=null", "batch.packing=false"]),
    "alone_sharded": (0, ["run.ds_config=ds_configs/cpu.json"]),
    "two_replicated": (2, ["run.ds_config=ds_configs/replicated.json"]),
    "two_sharded": (2, ["run.ds_config=ds_configs/cpu.json"]),
    "two_offloaded": (2, ["run.ds_config={offload}"]),
    "two_recomputing": (2, ["run.ds_config=ds_configs/cpu.json", "backbone.recompute=reentrant"]),
}


def write_offload(path: Path) -> Path:
    """The shipped file, its threshold low enough for this backbone's linears to be offloaded."""
    content = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("placements")
    offload = write_offload(folder / "zero3_offload.json")
    settings = (
        f"tasks.folder={shared / 'data' / 'superni_sample'}",
        f"backbone.name={shared / 'backbones' / 't5_mini_text'}",
        "schedule.steps=6",
        "run.log_every=1",
        "tasks.fold=test",
        "tasks.train_examples=10",
        "tasks.validation_examples=1",
        "batch.max_input_tokens=32",
    )
    commands: dict[int, list[tuple[str, ...]]] = {0: [], 2: []}
    for name, (ranks, overrides) in RUNS.items():
        changes = (override.format(offload=offload) for override in overrides)
        words = (*settings, f"run.folder={folder / name}", *changes)
        commands[ranks].append(("launch/pretrain.py", "launch/recipes/superni_tiny.yaml", *words))
    for ranks, together in commands.items():
        succeed_together(together, folder, ranks=ranks)
    return {name: folder / name for name in RUNS}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def validations(folder: Path) -> list[float]:
    return [line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


EXACT = ("alone_sharded", "two_replicated", "two_sharded", "two_offloaded")
#: Other shapes or kernels: the sums are the same, their rounding is not.
CLOSE = ("alone_accumulating", "two_recomputing")


@pytest.mark.parametrize("name", EXACT)
def test_losses_of_all_steps_are_equal_bit_for_bit(runs: dict[str, Path], name: str) -> None:
    assert losses(runs[name]) == losses(runs["alone"])


@pytest.mark.parametrize("name", EXACT)
def test_adapters_in_the_end_are_equal_bit_for_bit(runs: dict[str, Path], name: str) -> None:
    assert adapter_bytes(runs[name]) == adapter_bytes(runs["alone"])


@pytest.mark.parametrize("name", EXACT)
def test_validation_losses_are_equal(runs: dict[str, Path], name: str) -> None:
    assert validations(runs[name]) == pytest.approx(validations(runs["alone"]), rel=1e-9)


@pytest.mark.parametrize("name", CLOSE)
def test_accumulation_and_recomputation_do_not_change_the_losses(
    runs: dict[str, Path], name: str
) -> None:
    assert losses(runs[name]) == pytest.approx(losses(runs["alone"]), rel=1e-5)


def test_packed_rows_train_as_padded_ones(runs: dict[str, Path]) -> None:
    """The losses do. Adafactor moves numbers whose gradients are rounding alone as far as others:
    the adapters differ as those of other micro batches do (docs/method.md 15)."""
    packed, padded = runs["alone"], runs["alone_padded"]
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-6)
    assert validations(packed) == pytest.approx(validations(padded), rel=1e-6)
    shares = {
        name: [line["padding_share"] for line in read_metrics(run) if "loss" in line]
        for name, run in runs.items()
    }
    assert min(shares.pop("alone_padded")) > 0.05
    assert {share for of_run in shares.values() for share in of_run} == {0.0}


def test_all_steps_were_logged(runs: dict[str, Path]) -> None:
    assert len(losses(runs["alone"])) == 6


def test_training_moved_the_adapter(runs: dict[str, Path]) -> None:
    tensors = load_file(runs["alone"] / "adapter" / "adapter.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if name.endswith(".B"))
