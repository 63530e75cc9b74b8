"""LoRA, Poly and MHR on the 100 real SuperNI tasks with SmolLM2: what they reach on others.

python tests/benchmarks/smollm2_study.py BACKBONE FOLDER [--minutes 60 | --steps N] [--ranks 2]

BACKBONE is a folder of SmolLM2-135M (or another model), `MHR_SHARED` names the folder with
data/superni_sample; the recipes are launch/recipes/superni_smollm2*.yaml. Every method trains for
as many steps as MHR takes in the minutes. Then, on the 20 test tasks: nats per target token and
Rouge-L of the backbone, of the averages, and of these after extra steps; few-shot Rouge-L of MHR,
MHR-z and MHR-mu on five of them. The same command goes on after an interruption;
FOLDER/results.json holds what is done, FOLDER/logs what verbs say.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mhr_scale.adapters import artefact
from mhr_scale.config import BatchConfig, EvaluateConfig
from mhr_scale.engine.opened import open_backbone
from mhr_scale.passes import validation
from mhr_scale.recipe.reading import load
from mhr_scale.rows.batching import cut_batches, number_rows
from mhr_scale.rows.encode import Encoder
from mhr_scale.tasks.suites import read_evaluation

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "pretrain": "superni_smollm2",
    "average": "superni_smollm2_average",
    "evaluate": "superni_smollm2_evaluate",
    "adapt": "superni_smollm2_few_shot",
}
METHODS = {
    "LoRA": ("adapter.n_skills=1", "adapter.n_splits=1"),
    "Poly": ("adapter.n_skills=8", "adapter.n_splits=1"),
    "MHR": ("adapter.n_skills=8", "adapter.n_splits=8"),
}
PROBE = 8
TARGET_TOKENS = 24


class Study:
    """The stages of a study and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.folder).resolve()
        self.backbone = f"backbone.name={Path(options.backbone).resolve()}"
        data = Path(os.environ["MHR_SHARED"]).resolve() / "data" / "superni_sample"
        self.tasks = f"tasks.folder={data}"
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.exists() else {}
        )
        sizes = {n: v for n, v in vars(options).items() if n not in ("folder", "ranks", "backbone")}
        before = self.results.setdefault("sizes", sizes)
        if before != sizes:
            raise SystemExit(f"{self.folder} holds a study of {before}; use another folder")

    # -- verbs -------------------------------------------------------------------------------------

    def run(self, verb: str, name: str, *settings: str) -> Path:
        """Run a verb's recipe with other settings into a folder of this name, unless it is done."""
        place = self.folder / "runs" / name
        if name in self.results.setdefault("done", []):
            return place
        ranks, command = self.options.ranks, [sys.executable]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", port]
        recipe = ROOT / "launch" / "recipes" / f"{RECIPES[verb]}.yaml"
        program = [str(ROOT / "launch" / f"{verb}.py"), str(recipe)]
        print(f"{verb} {name}", flush=True)
        with (self.folder / "logs" / f"{name}.log").open("a") as log:
            subprocess.run(
                [*command, *program, *settings, f"run.folder={place}"],
                env={**os.environ, "DS_ACCELERATOR": "cpu"},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        self.results["done"].append(name)
        self.keep()
        return place

    def keep(self) -> None:
        """Write the results so far."""
        self.file.write_text(json.dumps(self.results, indent=1) + "\n")

    def pretrain(self, method: str, name: str, steps: int) -> Path:
        """Train a method on the training tasks."""
        return self.run(
            "pretrain",
            name,
            *(self.backbone, self.tasks, *METHODS[method]),
            "tasks.validation_examples=2",
            f"schedule.steps={steps}",
            f"run.seed={self.options.seed}",
            f"run.token_cache={self.folder / 'tokens'}",
        )

    def evaluate(self, name: str, *subject: str) -> None:
        """Zero-shot loss and Rouge-L of an adapter or a backbone alone."""
        examples = f"scoring.examples={self.options.examples}"
        place = self.run("evaluate", name, self.tasks, examples, *subject)
        found = self.results.setdefault("zero-shot", {}).setdefault(name, {})
        if "nats" not in found:
            summary = json.loads((place / "summary.json").read_text())
            found["rougeL"] = summary["mean_over_tasks"]
            found["nats"] = self.loss(load(EvaluateConfig, place / "config.yaml"))
            self.keep()

    @torch.no_grad()
    def loss(self, config: EvaluateConfig) -> float:
        """Nats per target token (first reference) of what `evaluate` scored, each row its own task.

        Over all rows together, not over tasks.
        """
        o = self.options
        torch.set_num_threads(o.ranks)
        adapter = None if config.adapter is None else artefact.load(config.adapter)
        lengths = BatchConfig(
            max_input_tokens=config.scoring.max_input_tokens,
            max_target_tokens=TARGET_TOKENS,
            cut=config.scoring.cut,
        )
        backbone = load(EvaluateConfig, self.folder / "runs" / "bare" / "config.yaml").backbone
        assert backbone is not None
        opened = open_backbone(backbone, ds_config=None, timeout_seconds=600.0, recipe=config)
        tasks, _ = read_evaluation(config.tasks, examples=o.examples)
        encoded = [
            Encoder(task, opened.tokenizer, lengths, opened.family).rows(task.test)
            for task in tasks
        ]
        rows = [replace(row, task=0) for row in number_rows(encoded)]
        total = count = 0.0
        with opened.placed(() if adapter is None else adapter.sites) as placed:
            placed.model.eval()
            if adapter is not None:
                adapter.bind(placed.adapted)
            for batch in cut_batches(rows, max_tokens=2048):
                with nullcontext() if adapter is None else adapter.slots([0]):
                    found = validation.forward(placed, placed.pack(batch))
                total += found.sum.sum().item()
                count += found.count.sum().item()
        return total / count

    # -- the whole ---------------------------------------------------------------------------------

    def few_shot(self, source: Path) -> None:
        """The variants of MHR on five of the test tasks."""
        o = self.options
        place = self.run(
            "adapt",
            "few_shot",
            self.tasks,
            *(f"variants.{name}.adapter={source}" for name in ("MHR", "MHR-z", "MHR-mu")),
            f"protocol.steps={o.few_shot_steps}",
            f"scoring.examples={o.examples}",
            "selection={on: last}",
        )
        self.results["few-shot"] = json.loads((place / "summary.json").read_text())["variants"]
        self.keep()

    def all(self) -> None:
        """All stages, in the order in which their results are wanted."""
        o = self.options
        self.evaluate(
            "bare",
            *("adapter=null", "routing=own", self.backbone, "backbone.dtype=bfloat16"),
        )
        steps = self.results.get("steps") or o.steps
        if steps is None:
            probe = self.pretrain("MHR", "probe", PROBE)
            steps = max(1, round(60 * o.minutes / seconds_per_step(probe)))
        self.results["steps"] = steps
        self.keep()
        for method in METHODS:
            run = self.pretrain(method, method, steps)
            curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [line["validation_loss"] for line in curve if "validation_loss" in line]
            facts = {"seconds_per_step": seconds_per_step(run), "held_out_nats": losses}
            self.results.setdefault("pretrain", {})[method] = facts
            extra = max(1, round(steps * o.extra))
            averaging = (f"source={run}", f"steps=[0, {extra}]", f"run.seed={o.seed}")
            mean = self.run("average", f"{method}_average", *averaging)
            for k in (0, extra):
                self.evaluate(f"{method}_{k}", f"adapter={mean / 'averaged' / f'{k:06d}'}")
        self.few_shot(self.folder / "runs" / "MHR")


def seconds_per_step(run: Path) -> float:
    """The median over the lines of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines if "seconds" in line)


def main() -> None:
    """Run what is left of a study and print its results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backbone")
    parser.add_argument("folder")
    parser.add_argument("--minutes", type=float, default=60.0, help="of pre-training per method")
    parser.add_argument("--steps", type=int, help="of pre-training per method, whatever they take")
    parser.add_argument("--extra", type=float, default=0.1, help="extra steps, as a share of these")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--examples", type=int, default=10, help="per test task")
    parser.add_argument("--few-shot-steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    study = Study(parser.parse_args())
    study.all()
    results = study.results
    print(f"\n{results['steps']} steps a method")
    for method, facts in results["pretrain"].items():
        curve = " -> ".join(f"{loss:.3f}" for loss in facts["held_out_nats"])
        print(f"{method:<12}{facts['seconds_per_step']:7.2f} s a step, training tasks {curve}")
    print("zero-shot on the test tasks        nats   Rouge-L")
    for name, found in results["zero-shot"].items():
        print(f"  {name:<30}{found['nats']:8.3f}{found['rougeL']:10.2f}")
    print("few-shot, on some of them")
    for name, found in results["few-shot"].items():
        print(f"  {name:<38}{found['mean']:10.2f}")


if __name__ == "__main__":
    main()
