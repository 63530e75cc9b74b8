"""A run over shards on NVMe: the losses of a replicated one, bit for bit.

DeepSpeed's operation is compiled for it, in minutes: only where MHR_COMPILE=1 asks for that.
"""

import json
import os
from pathlib import Path

import pytest
from processes import ROOT, read_metrics, succeed

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]

#: Linears of a MiB and more, which is what DeepSpeed moves to NVMe.
BACKBONE = (
    "backbone={config: {d_model: 512, d_ff: 1024, d_kv: 64, num_heads: 8, num_layers: 2, "
    "vocab_size: 384, feed_forward_proj: gated-gelu, tie_word_embeddings: false}, dtype: float32}"
)


def losses(folder: Path, ds_config: str, *overrides: str) -> list[float]:
    succeed(
        "launch/pretrain.py",
        "launch/recipes/toy.yaml",
        BACKBONE,
        f"run.folder={folder}",
        f"run.ds_config={ds_config}",
        "run.log_every=1",
        "tasks.n_tasks=4",
        "tasks.train_examples=10",
        "tasks.validation_examples=1",
        "schedule.steps=3",
        "batch.batch_size=4",
        "batch.micro_batch_size=4",
        *overrides,
        timeout=1500.0,
    )
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_losses_over_shards_on_nvme_are_those_of_a_replicated_backbone(tmp_path: Path) -> None:
    if os.environ.get("MHR_COMPILE") != "1":
        pytest.skip("compiles DeepSpeed's asynchronous I/O for minutes (variable MHR_COMPILE=1)")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio and its headers (libaio-dev)")
    content = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    zero = content["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 1000
    zero["offload_param"] |= {"nvme_path": str(tmp_path), "buffer_size": 600_000}
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(content))
    recomputing = "backbone.recompute=reentrant"
    swapped = losses(tmp_path / "nvme", str(file), recomputing)
    assert len(list(tmp_path.rglob("*.swp"))) == 36
    assert swapped == losses(tmp_path / "replicated", "ds_configs/replicated.json", recomputing)
