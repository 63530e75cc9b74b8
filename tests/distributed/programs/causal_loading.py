"""What decoder-only backbones compute over two sharded ranks, against a plain load.

Run by test_loading_ranks.py under the launcher: causal_loading.py FOLDER_OF_FOLDERS OUT_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import AdapterConfig, BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place
from mhr_scale.verbs.launching import guarded

sys.path[:0] = [str(Path(__file__).parents[2])]

from causal_folders import adapter_gradients  # noqa: E402
from small_causal import furthest, packed_logits, plain_logits  # noqa: E402

SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

#: Families whose gradients are compared bit for bit.
SAME = ("llama", "qwen3", "qwen3 moe", "mixtral", "gpt2")


def measure(engine: Engine, folder: Path, dtype: str) -> dict[str, Any]:
    """How far logits are from a plain load's, and whether buffers are its own, bit for bit."""
    config = BackboneConfig(name=str(folder), dtype=dtype)  # type: ignore[arg-type]
    blueprint = read_blueprint(config)
    sites = find_sites_of(blueprint, AdapterConfig(layout="attention", n_skills=2, n_splits=2))
    placed = place(engine, config, blueprint, sites)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    theirs = dict(stock.named_buffers())
    mine = dict(placed.model.named_buffers())
    with adapters_off(placed.model):
        ours = packed_logits(placed.model, placed.family)
    return {
        "difference": furthest(ours, plain_logits(plain)),
        "same buffers": mine.keys() == theirs.keys()
        and all(b.dtype == theirs[n].dtype and b.equal(theirs[n]) for n, b in mine.items()),
    }


def main() -> None:
    """Every folder in float32, and one in bfloat16 too."""
    folders, out = map(Path, sys.argv[-2:])
    transformers.utils.logging.disable_progress_bar()
    engine = Engine(SHARDED, timeout_seconds=60)
    replicated = Engine({}, timeout_seconds=60)

    def has_same_gradients(name: str) -> bool:
        ours, _ = adapter_gradients(engine, folders / name, "reentrant")
        theirs, _ = adapter_gradients(replicated, folders / name, "none")
        return len(ours) > 2 and all(map(torch.equal, ours, theirs))

    found = {
        "same gradients": {name: has_same_gradients(name) for name in SAME},
        "float32": {
            path.name: measure(engine, path, "float32") for path in sorted(folders.iterdir())
        },
        "bfloat16": {
            name: measure(engine, folders / name, "bfloat16") for name in ("llama", "gemma3")
        },
    }
    (out / f"causal{engine.rank}.json").write_text(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    guarded(main)
