"""Known traps of ZeRO-3 under a frozen backbone, measured on every rank.

Run by test_traps.py under the launcher: traps.py CHECKPOINT_FOLDER OUT_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from mhr_scale.adapters import Adapter, attach
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdapterConfig, BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import EngineError
from mhr_scale.passes.losses import language_model
from mhr_scale.verbs.launching import guarded

TIMEOUT = 77.0
MAX_LIVE = 20_000
CONTENT = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": MAX_LIVE,
        "stage3_max_reuse_distance": 10_000,
        "stage3_prefetch_bucket_size": 3_000,
        "memory_efficient_linear": False,
    }
}
ADAPTER = AdapterConfig(layout="full", rank=2, n_skills=3, n_splits=4)
TASKS = ("a", "b", "c", "d")


class Counter:
    """Counts the elements that all-gathers bring together, and how many are there at once."""

    def __init__(self) -> None:
        import deepspeed.comm as comm

        self.numel = self.most = 0
        self.model: Any = None
        inner = comm.allgather_fn

        def counted(output: torch.Tensor, *rest: Any, **options: Any) -> Any:
            self.numel += output.numel()
            if self.model is not None:
                gone = "NOT_AVAILABLE"
                here = [p for p in self.model.parameters() if p.ds_status.name != gone]
                self.most = max(self.most, sum(p.ds_numel for p in here))
            return inner(output, *rest, **options)

        comm.allgather_fn = counted


def build(engine: Engine, folder: str, recompute: str) -> tuple[Any, Any, Adapter]:
    config = BackboneConfig(name=folder, dtype="float32", recompute=recompute)
    blueprint = read_blueprint(config)
    model = engine.build(config, blueprint)
    adapter = attach(model, ADAPTER, tasks=TASKS)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, engine.prepare(model, blueprint.family, config), adapter


def step(engine: Engine, module: Any, adapter: Adapter, rank: int) -> None:
    """One micro-step on rows and tasks that differ between ranks."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(2, 60, (4, 9 + rank), generator=generator)
    y = torch.randint(2, 60, (4, 5), generator=generator)
    tasks = [[0, 1, 1, 2], [3, 3, 0, 3]][rank]
    module.train()
    with adapter.slots(tasks) as slots:
        loss = language_model(module(input_ids=x, labels=y, use_cache=False).logits, y)
        slots.backward(loss.sum.sum())
        engine.after_backward()


def gradients(adapter: Adapter) -> list[torch.Tensor]:
    return [p.grad.clone() for p in adapter.parameters()]


def resident_numel(model: nn.Module) -> int:
    """Numbers of sharded weights that are whole on this rank at this moment."""
    parameters = model.parameters()
    return sum(p.ds_numel for p in parameters if p.ds_status.name == "AVAILABLE")


def measure(engine: Engine, folder: str, recompute: str, counter: Counter) -> dict[str, Any]:
    """Gather volume, residency and gradients of a sharded backbone against a replicated one."""
    model, module, adapter = build(engine, folder, recompute)
    total = sum(p.ds_numel for p in model.parameters())
    largest = max(p.ds_numel for p in model.parameters())
    peak = [0]
    for inner in model.modules():
        inner.register_forward_hook(
            lambda *_: peak.__setitem__(0, max(peak[0], resident_numel(model)))
        )
    counter.model, counter.most = model, 0
    for _ in range(3):
        adapter.zero_grad()
        counter.numel = 0
        step(engine, module, adapter, engine.rank)
    counter.model = None
    plain = Engine({}, timeout_seconds=TIMEOUT)
    _, plain_module, plain_adapter = build(plain, folder, "none")
    step(plain, plain_module, plain_adapter, engine.rank)
    pairs = zip(gradients(adapter), gradients(plain_adapter), strict=True)
    return {
        "gathered_per_step": counter.numel / total,
        "shard_share": sum(p.ds_tensor.numel() for p in model.parameters()) / total,
        "shard_bytes": sum(p.ds_tensor.nbytes for p in model.parameters()),
        "most_at_once": counter.most,
        "peak": peak[0],
        "peak_bound": MAX_LIVE + 2 * largest,
        "total": total,
        "resident_after_backward": resident_numel(model),
        "gradient_error": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "zero_gradients": sum(not bool(g.any()) for g in gradients(adapter)),
        "adapters_known_to_deepspeed": sum(hasattr(p, "ds_id") for p in adapter.parameters()),
        "adapter_dtypes": sorted({str(p.dtype) for p in adapter.parameters()}),
    }


def untied(engine: Engine, folder: str) -> dict[str, Any]:
    """Logits of an untied checkpoint against those of a plain load, stored beside it."""
    model, module, adapter = build(engine, folder, "none")
    golden = load_file(Path(folder) / "golden" / "logits.safetensors")
    module.eval()
    with torch.no_grad(), adapter.off():
        logits = module(
            input_ids=golden["input_ids"],
            decoder_input_ids=golden["decoder_input_ids"],
            use_cache=False,
        ).logits
    error = (logits - golden["logits"]).norm() / golden["logits"].norm()
    return {"error": float(error), "is_tied": model.lm_head.weight is model.shared.weight}


def other_modules(engine: Engine, folder: str) -> str:
    """Rank 1 runs two blocks in another order: equal sizes, so no collective notices."""
    model, _, adapter = build(engine, folder, "none")
    hidden = torch.zeros(1, 3, 32)
    order = (0, 1) if engine.rank == 0 else (1, 0)
    with torch.no_grad(), adapter.off():
        for number in order:
            model.encoder.block[number].layer[1](hidden)
    try:
        engine.check_same_modules()
    except EngineError as error:
        return str(error)
    return ""


def unequal_tensors(engine: Engine) -> str:
    try:
        engine.check_equal([torch.full((3,), float(engine.rank))], what="tensors")
    except EngineError as error:
        return str(error)
    return ""


def main() -> None:
    folder, out = sys.argv[-2:]
    engine = Engine(CONTENT, timeout_seconds=TIMEOUT)
    import deepspeed

    counter = Counter()
    results: dict[str, Any] = {
        mode: measure(engine, folder, mode, counter)
        for mode in ("none", "reentrant", "non_reentrant")
    }
    results["content"] = CONTENT
    results["untied"] = untied(engine, folder)
    results["other_modules"] = other_modules(engine, folder)
    results["unequal_tensors"] = unequal_tensors(engine)
    results["shm_op"] = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    results["timeouts"] = sorted(
        {
            group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for group in dist.distributed_c10d._world.pg_map
        }
    )
    Path(out, f"rank{engine.rank}.json").write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    guarded(main)
