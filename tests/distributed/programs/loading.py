"""What ranks read of a converted backbone, and what they make of a wrong one.

Run by test_loading_ranks.py under the launcher: loading.py FOLDER OUT_FOLDER
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.of_adapter import find_sites_of
from mhr_scale.config import AdapterConfig, BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import place
from mhr_scale.errors import BackboneError
from mhr_scale.families.t5 import EMBEDDING, HEAD
from mhr_scale.verbs.launching import guarded

SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
Change = Callable[[Blueprint], Blueprint]


class CountingSource:
    """A source that notes the ranges read of it."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def view(self, name: str) -> Tensor | None:
        return None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        self.reads.append((name, start, stop))
        return self.source.read(name, start, stop)


def tie_head(blueprint: Blueprint) -> Blueprint:
    """As transformers ties it under ZeRO-3."""
    return replace(blueprint, ties={**blueprint.ties, HEAD: EMBEDDING})


def check(engine: Engine, folder: str, dtype: str, change: Change = lambda same: same) -> str:
    """What the check says of a backbone that is placed, its linears wrapped."""
    config = BackboneConfig(name=folder, dtype=dtype)  # type: ignore[arg-type]
    blueprint = change(read_blueprint(config))
    sites = find_sites_of(blueprint, AdapterConfig(n_skills=2, n_splits=2))
    try:
        place(engine, config, blueprint, sites)
    except BackboneError as error:
        return str(error)
    return "right"


def main() -> None:
    folder, out = sys.argv[-2:]
    sharded = Engine(SHARDED, timeout_seconds=60)
    replicated = Engine({}, timeout_seconds=60)
    source = CountingSource(None)

    def count(blueprint: Blueprint) -> Blueprint:
        source.source = blueprint.source
        return replace(blueprint, source=source)

    def tie_on_one(blueprint: Blueprint) -> Blueprint:
        return tie_head(blueprint) if replicated.rank == 1 else blueprint

    found = {
        "float32": check(sharded, folder, "float32", count),
        "bfloat16": check(sharded, folder, "bfloat16"),
        "tied": check(sharded, folder, "float32", tie_head),
        "tied bfloat16": check(sharded, folder, "bfloat16", tie_head),
        "replicated": check(replicated, folder, "float32"),
        "tied on one rank": check(replicated, folder, "float32", tie_on_one),
        "reads": source.reads,
    }
    (Path(out) / f"rank{sharded.rank}.json").write_text(json.dumps(found))
    sharded.close()


if __name__ == "__main__":
    guarded(main)
