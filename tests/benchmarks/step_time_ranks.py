"""Tokens per second through the launcher, on one rank and two; start-up and loading."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mhr_scale.run.runlog import log

ROOT = Path(__file__).parents[2]
#: First steps, which do not count: DeepSpeed learns the order of the modules.
WARM = 4
PLACEMENTS = {"replicated": "ds_configs/replicated.json", "ZeRO-3": "ds_configs/cpu.json"}
#: What a process does before its first step, timed from the inside.
LOADING = """
import json, sys, time
begun = time.perf_counter()
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.config import AdapterConfig, BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.adapters import attach
found = {"imports": time.perf_counter() - begun}
settings = json.loads(sys.argv[1])
def timed(name, run):
    begun = time.perf_counter()
    result = run()
    found[name] = time.perf_counter() - begun
    return result
config = BackboneConfig(dtype="bfloat16", **settings)
engine = timed("engine", lambda: Engine({}, timeout_seconds=600))
blueprint = timed("reading the blueprint", lambda: read_blueprint(config))
model = timed("building and filling the backbone", lambda: engine.build(config, blueprint))
timed("attaching an adapter of 313 tasks", lambda: attach(
    model, AdapterConfig(n_skills=8, n_splits=8), tasks=[str(number) for number in range(313)]))
found["weights"] = sum(parameter.numel() for parameter in model.parameters())
print("FOUND " + json.dumps(found))
"""


def environment() -> dict[str, str]:
    """Of a process that has a CPU thread to itself and joins no group but its own."""
    binaries = Path(sys.executable).parent
    found = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    path = f"{binaries}{os.pathsep}{found['PATH']}"
    own = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    return {**found, **own, "PYTHONPATH": str(ROOT)}


def recipe(shared: str | None) -> list[str]:
    """A short run: SuperNI over a tiny real T5 where there is data, else the toy suite."""
    if shared is None:
        return ["launch/recipes/toy.yaml"]
    return [
        "launch/recipes/superni_tiny.yaml",
        f"tasks.folder={shared}/data/superni_sample",
        f"backbone.name={shared}/backbones/t5_mini_text",
        "backbone.dtype=bfloat16",
    ]


def throughput(shared: str | None, *, steps: int) -> list[dict[str, Any]]:
    """Tokens/s of `launch/pretrain.py` by ranks and placement, and the run's whole time."""
    rows = []
    for placement, file in PLACEMENTS.items():
        for ranks in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                load, begun = os.getloadavg()[0], time.perf_counter()
                _pretrain(ranks, f"{folder}/run", [*recipe(shared), f"run.ds_config={file}"], steps)
                whole = time.perf_counter() - begun
                lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
            logged = [row for row in map(json.loads, lines.splitlines()) if "seconds" in row]
            timed = logged[WARM:]
            log.info("%s, %d ranks: %.0f s", placement, ranks, whole)
            rows.append(
                {
                    "placement": placement,
                    "ranks": ranks,
                    "recipe": Path(recipe(shared)[0]).name,
                    "tokens_per_second": statistics.median(r["tokens_per_second"] for r in timed),
                    "run_seconds": whole,
                    "load": load,
                    "steps": steps,
                }
            )
    return rows


def _pretrain(ranks: int, folder: str, words: list[str], steps: int) -> None:
    short = [
        f"schedule.steps={steps}",
        "run.log_every=1",
        "run.validate_every=-1",
        f"run.folder={folder}",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    command = [*launcher, "--master_port", port, "launch/pretrain.py", *words, *short]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: {result.stdout[-2000:]}{result.stderr[-2000:]}")


def start_up(shared: str | None, *, turns: int = 3) -> list[dict[str, Any]]:
    """Seconds of a process before its first step, by what it does; medians of `turns` processes."""
    name = f"{shared}/backbones/t5_mini_text" if shared else "builtin:toy"
    found: list[dict[str, float]] = []
    for _ in range(turns):
        command = [sys.executable, "-c", LOADING, json.dumps({"name": name})]
        begun = time.perf_counter()
        result = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        )
        line = next(one for one in result.stdout.splitlines() if one.startswith("FOUND "))
        whole = time.perf_counter() - begun
        found.append({**json.loads(line.removeprefix("FOUND ")), "whole process": whole})
    weights = found[0].pop("weights")
    return [
        {
            "backbone": Path(name).name,
            "weights": weights,
            "what": what,
            "seconds": statistics.median(one[what] for one in found),
        }
        for what in found[0]
    ]
