"""T0-11B as the hub has it, run for real on one small machine: every verb, with what it takes.

python tests/benchmarks/eleven/eleven_billion.py FOLDER [--size xxl] [--parts make convert ...]

Random weights of T0's shapes; 70 GB of disk for xxl. A part that is done is not done again: figures
are in FOLDER/figures.json. Rows are those of MHR_SHARED (default ../shared): T0's training rows and
its held-out sets.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from random_t0 import SIZES, write
from safetensors.torch import load_file
from watching import ROOT, Watched, run

SHARED = Path(os.environ.get("MHR_SHARED", ROOT.parent / "shared")).resolve()
PYTHON = sys.executable
ADAPTER = "adapter/adapter.safetensors"
STEPS = 3


class Bench:
    """The folder of one size, its recipes and its figures."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder.resolve(), size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "figures.json"
        self.figures: dict[str, Any] = {}
        if self.file.is_file():
            self.figures = json.loads(self.file.read_text())

    def note(self, part: str, figures: dict[str, Any]) -> None:
        """Keep the figures of a part."""
        self.figures[part] = figures
        self.file.write_text(json.dumps(self.figures, indent=1))
        print(f"{part}: {json.dumps(figures)}", flush=True)

    def path(self, name: str) -> str:
        """A place below the folder."""
        return str(self.folder / name)

    def recipe(self, name: str, content: dict[str, Any]) -> str:
        """Write a recipe and return its path."""
        file = self.folder / "recipes" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(file)

    def verb(
        self,
        verb: str,
        recipe: str,
        *settings: str,
        ranks: int = 1,
        stop_when: Callable[[], bool] | None = None,
    ) -> Watched:
        """Run a verb on a recipe, under DeepSpeed's launcher for several ranks."""
        start = [PYTHON]
        if ranks > 1:
            start = [str(Path(PYTHON).with_name("deepspeed")), "--num_gpus", str(ranks)]
        return run([*start, f"launch/{verb}.py", recipe, *settings], stop_when=stop_when)


# -- recipes ---------------------------------------------------------------------------------------


def backbone(kind: str) -> str:
    """The folder of the converted backbone."""
    return {"bf16": "t0_bf16", "int8": "t0_int8"}[kind]


def pretraining(bench: Bench, kind: str, folder: str) -> dict[str, Any]:
    """T0's recipe with rows from files, and short ones."""
    recipe = yaml.safe_load((ROOT / "launch/recipes/t0_11b_p3_mhr8.yaml").read_text())
    return {
        **recipe,
        "backbone": {"name": bench.path(backbone(kind)), "dtype": "bfloat16"},
        "tasks": {"suite": "jsonl", "folder": str(SHARED / "data/t0_open_sample")},
        "mixture": {"cap": 500},
        "schedule": {"steps": STEPS, "warmup_fraction": 0.0, "decay": "constant"},
        "batch": {"batch_size": 4, "micro_batch_size": 2, "max_input_tokens": 64,
                  "max_target_tokens": 16},
        "run": {"folder": bench.path(folder), "seed": 42, "save_every": 1, "log_every": 1,
                "validate_every": -1, "token_cache": bench.path("token_cache")},
    }  # fmt: skip


def held_out() -> dict[str, Any]:
    """T0's held-out tasks of which there are files, a prompt drawn per row."""
    return {
        "suite": "t0_eval",
        "folder": str(SHARED / "data/t0_eval_sets"),
        "templates": str(SHARED / "data/promptsource_templates/templates"),
        "templates_mode": "draw",
        "anli_split": "dev",
        "missing": "skip",
    }


def evaluation(bench: Bench, kind: str, folder: str) -> dict[str, Any]:
    """50 rows of the held-out sets under the averaged adapter."""
    return {
        "adapter": bench.path("averaged"),
        "backbone_moved_to": bench.path(backbone(kind)),
        "tasks": held_out(),
        "scoring": {"metric": "accuracy", "examples": 7, "max_input_tokens": 128,
                    "max_tokens": 1024},
        "run": {"folder": bench.path(folder)},
    }  # fmt: skip


def adaptation(bench: Bench, kind: str, folder: str, *, size: int) -> dict[str, Any]:
    """Four jobs of two steps: one task, four seeds."""
    return {
        "variants": {"MHR": {"adapter": bench.path("one")}},
        "backbone_moved_to": bench.path(backbone(kind)),
        "tasks": {**held_out(), "tasks": ["rte"]},
        "shots": {"seeds": [42, 1024, 0, 1], "folder": str(SHARED / "data/tfew_few_shot")},
        "protocol": {"steps": 2, "batch_size": 2, "max_input_tokens": 64, "max_target_tokens": 16},
        "selection": {"on": "last"},
        "scoring": {"metric": "accuracy", "examples": 4, "max_input_tokens": 64,
                    "max_tokens": 1024},
        "waves": {"size": size},
        "run": {"folder": bench.path(folder)},
    }  # fmt: skip


# -- parts -----------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Texts to train a tokenizer on."""
    for file in sorted((SHARED / "data/t0_open_sample/train").glob("*.jsonl")):
        with file.open() as lines:
            for line in itertools.islice(lines, 300):
                row = json.loads(line)
                yield f"{row['input'][:2000]} {row['target']}".replace("\n", " ")


def make(bench: Bench) -> dict[str, Any]:
    """The checkpoint, as the hub has it."""
    target = bench.folder / "hub"
    shutil.rmtree(target, ignore_errors=True)
    write(target, bench.size, texts())
    file = target / "pytorch_model.bin"
    return {"GB": round(file.stat().st_size / 1e9, 1)}


def convert(bench: Bench) -> dict[str, Any]:
    """float32 in one file to bfloat16, with the comparison."""
    name = backbone("bf16")
    recipe = {"backbone": {"name": bench.path("hub")}, "folder": bench.path(name)}
    watched = bench.verb("convert", bench.recipe("convert", recipe))
    assert any("logits are those of transformers' reading" in line for line in watched.lines)
    return {**watched.figures(), "verdict": watched.lines[-3:]}


def drop(bench: Bench) -> dict[str, Any]:
    """Make room: the original is not needed any more."""
    shutil.rmtree(bench.folder / "hub", ignore_errors=True)
    return {"free GB": round(shutil.disk_usage(bench.folder).free / 1e9, 1)}


def quantise(bench: Bench) -> dict[str, Any]:
    """bfloat16 to int8."""
    recipe = {
        "backbone": {"name": bench.path(backbone("bf16"))},
        "quantise": "int8",
        "folder": bench.path(backbone("int8")),
    }
    watched = bench.verb("convert", bench.recipe("quantise", recipe))
    return {**watched.figures(), "verdict": watched.lines[-3:]}


def train(bench: Bench, kind: str = "bf16", folder: str = "one") -> dict[str, Any]:
    """Three steps, one process."""
    recipe = bench.recipe(f"pretrain_{folder}", pretraining(bench, kind, folder))
    watched = bench.verb("pretrain", recipe)
    return {**watched.figures(), "seconds of a step": step_seconds(bench, folder)}


def step_seconds(bench: Bench, folder: str) -> list[float]:
    """What metrics.jsonl says of each step."""
    lines = (bench.folder / folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [round(row["seconds"], 1) for row in rows if "seconds" in row and "loss" in row]


def train_two(bench: Bench) -> dict[str, Any]:
    """The same on two processes, killed once a step is saved, and resumed; compared bit for bit."""
    recipe = bench.recipe("pretrain_two", pretraining(bench, "bf16", "two"))
    saved = bench.folder / "two/steps/000001"
    killed = bench.verb("pretrain", recipe, ranks=2, stop_when=saved.is_dir)
    assert killed.returncode, "it was not killed in time"
    watched = bench.verb("pretrain", recipe, ranks=2)
    one, two = (load_file(bench.folder / run / ADAPTER) for run in ("one", "two"))
    same = all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert same, "two processes, killed and resumed, give another adapter than one"
    return {
        **watched.figures(),
        "seconds until killed": round(killed.seconds, 1),
        "seconds of a step": step_seconds(bench, "two"),
        "same bits as one process": same,
    }


def average(bench: Bench) -> dict[str, Any]:
    """The averaged adapter, and one extra step."""
    recipe = {"source": bench.path("one"), "steps": [0, 1],
              "run": {"folder": bench.path("averaged"), "seed": 0, "log_every": 1,
                      "validate_every": -1}}  # fmt: skip
    return bench.verb("average", bench.recipe("average", recipe)).figures()


def export(bench: Bench) -> dict[str, Any]:
    """The average as a stock PEFT folder, loaded by PEFT and compared."""
    shutil.rmtree(bench.folder / "peft", ignore_errors=True)
    recipe = {"adapter": bench.path("one"), "what": "average", "format": "peft",
              "folder": bench.path("peft")}  # fmt: skip
    watched = bench.verb("export", bench.recipe("export", recipe))
    verdict = next(line.strip() for line in watched.lines if "the original's" in line)
    return {**watched.figures(), "verdict": verdict}


def finetune(bench: Bench) -> dict[str, Any]:
    """Two steps of the exported average on one held-out task, with stock PEFT."""
    recipe = {
        "adapter": bench.path("peft"),
        "backbone": {"name": bench.path(backbone("bf16")), "dtype": "bfloat16"},
        "tasks": held_out(),
        "task": "rte",
        "shots": {"seed": 42, "folder": str(SHARED / "data/tfew_few_shot")},
        "protocol": {"steps": 2, "batch_size": 2, "max_input_tokens": 64, "max_target_tokens": 16},
        "micro_batch_size": 2,
        "scoring": {"metric": "accuracy", "examples": 4, "max_input_tokens": 64,
                    "max_tokens": 1024},
        "run": {"folder": bench.path("finetuned")},
    }  # fmt: skip
    return bench.verb("finetune", bench.recipe("finetune", recipe)).figures()


def evaluate(bench: Bench, kind: str = "bf16") -> dict[str, Any]:
    """About 50 rows of T0's held-out sets."""
    folder = f"evaluated_{kind}"
    recipe = bench.recipe(folder, evaluation(bench, kind, folder))
    watched = bench.verb("evaluate", recipe)
    rows = sum(
        len(file.read_text().splitlines()) for file in (bench.folder / folder).rglob("scores.jsonl")
    )
    return {**watched.figures(), "rows": rows}


def adapt(bench: Bench, kind: str = "bf16") -> dict[str, Any]:
    """Four jobs in one wave, and one by one: the same bits, and how much faster."""
    found, figures = {}, {}
    for name, size in (("wave", 4), ("alone", 1)):
        folder = f"jobs_{kind}_{name}"
        recipe = bench.recipe(folder, adaptation(bench, kind, folder, size=size))
        watched = bench.verb("adapt", recipe)
        found[name] = {
            str(file.relative_to(bench.folder / folder)): load_file(file)
            for file in sorted((bench.folder / folder / "jobs").rglob("adapter.safetensors"))
        }
        figures[name] = watched.figures()
    assert len(found["wave"]) == 4
    same = all(
        torch.equal(tensor, found["alone"][file][name])
        for file, tensors in found["wave"].items()
        for name, tensor in tensors.items()
    )
    ratio = figures["alone"]["seconds"] / figures["wave"]["seconds"]
    return {**figures, "alone / wave": round(ratio, 2), "same bits": same}


def zero3(bench: Bench) -> dict[str, Any]:
    """ZeRO-3 on two processes: what each of them takes, and the same bits as one."""
    recipe = bench.recipe("pretrain_zero3", pretraining(bench, "bf16", "zero3"))
    watched = bench.verb("pretrain", recipe, "run.ds_config=zero3", "schedule.steps=1", ranks=2)
    return watched.figures()


def nvme(bench: Bench) -> dict[str, Any]:
    """Two processes whose shards lie on a disk."""
    content = json.loads((ROOT / "ds_configs/zero3_nvme.json").read_text())
    largest = SIZES[bench.size]["vocab_size"] * SIZES[bench.size]["d_model"]
    offload = {"nvme_path": bench.path("nvme"), "buffer_size": -(-largest // 2)}
    content["zero_optimization"]["offload_param"] |= offload
    file = bench.folder / "zero3_nvme.json"
    file.write_text(json.dumps(content))
    (bench.folder / "nvme").mkdir(exist_ok=True)
    recipe = bench.recipe("pretrain_nvme", pretraining(bench, "bf16", "nvme_run"))
    watched = bench.verb("pretrain", recipe, f"run.ds_config={file}", "schedule.steps=1", ranks=2)
    shutil.rmtree(bench.folder / "nvme")
    return {**watched.figures(), "seconds of a step": step_seconds(bench, "nvme_run")}


def plan(bench: Bench) -> dict[str, Any]:
    """What `plan` says of the memory of the runs above, beside what they took."""
    found = {}
    for part, name in {"train": "pretrain_one", "evaluate": "evaluated_bf16",
                       "adapt": "jobs_bf16_wave"}.items():  # fmt: skip
        recipe = bench.folder / "recipes" / f"{name}.yaml"
        watched = run([PYTHON, "launch/plan.py", str(recipe), "--json"])
        text = "\n".join(watched.lines)
        planned = json.loads(text[text.index("{\n") :])
        found[part] = {"seconds": round(watched.seconds, 1), "placements": [
            {"placement": row["placement"], "bytes": row["bytes"], "fits": row["fits"]}
            for row in planned["placements"]
        ], "use": (planned["use"] or {}).get("placement")}  # fmt: skip
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "make": make,
    "convert": convert,
    "drop": drop,
    "train": train,
    "train_two": train_two,
    "average": average,
    "export": export,
    "finetune": finetune,
    "evaluate": evaluate,
    "adapt": adapt,
    "quantise": quantise,
    "train_int8": lambda bench: train(bench, "int8", "one_int8"),
    "evaluate_int8": lambda bench: evaluate(bench, "int8"),
    "adapt_int8": lambda bench: adapt(bench, "int8"),
    "zero3": zero3,
    "nvme": nvme,
    "plan": plan,
}
#: Those that take more of a machine than the others, and run only where they are asked for.
BY_NAME_ONLY = ("zero3", "nvme")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="xxl")
    usual = [name for name in PARTS if name not in BY_NAME_ONLY]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual)
    given = parser.parse_args()
    bench = Bench(given.folder, given.size)
    for part in given.parts:
        if part not in bench.figures:
            bench.note(part, PARTS[part](bench))


if __name__ == "__main__":
    main()
