"""What `plan` predicts of a training step's memory against what the step takes, run by hand.

python tests/benchmarks/plan_memory.py [--d-model 256 --layers 8 --rows 8 --width 128 --depth 32]

On a GPU the measured peak is the allocator's, on the CPU the profiler's.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measured_steps import pretraining_peak

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import (
    AdapterConfig,
    BackboneConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
)
from mhr_scale.planning.steps import Shape, at_depth, trace_pretraining

ADAPTERS = {
    "LoRA": AdapterConfig(n_skills=1, rank=4),
    "MHR": AdapterConfig(n_skills=8, n_splits=8),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"d-model": 256, "layers": 8, "rows": 8, "width": 128, "depth": 32, "words": 4096}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    shape = Shape(rows=given.rows, width=given.width, depth=given.depth, n_tasks=given.rows)
    fields: dict[str, Any] = {
        "d_model": given.d_model,
        "d_kv": 64,
        "d_ff": given.d_model * 5 // 2,
        "num_heads": given.d_model // 64,
        "num_layers": given.layers,
        "vocab_size": given.words,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
    }
    print(f"{'':34} predicted  measured  ratio  seconds to predict   (MiB)")
    for dtype in ("float32", "bfloat16"):
        for recompute in ("none", "reentrant", "non_reentrant"):
            for name, adapter in ADAPTERS.items():
                frozen: Any = {"config": fields, "dtype": dtype, "recompute": recompute}
                config = PretrainConfig(
                    backbone=BackboneConfig(**frozen),
                    adapter=adapter,
                    tasks=ToyTasks(suite="toy"),
                    schedule=ScheduleConfig(steps=10),
                    run=RunConfig(folder="planned"),
                )
                begun = time.perf_counter()
                predicted = at_depth(
                    read_blueprint(config.backbone),
                    lambda blueprint, config=config: trace_pretraining(
                        config, blueprint, shape, n_tasks=40, accumulates=True, on_gpu=on_gpu
                    ),
                ).peak
                seconds = time.perf_counter() - begun
                measured = pretraining_peak(config, shape, n_tasks=40)
                print(
                    f"{dtype:9} {recompute:14} {name:8} {predicted / 2**20:10.1f} "
                    f"{measured / 2**20:9.1f} {predicted / measured:6.3f} {seconds:9.1f}"
                )


if __name__ == "__main__":
    main()
