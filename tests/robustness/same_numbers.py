"""Numbers of every toy recipe, for a change that should leave them alone.

    python tests/robustness/same_numbers.py before.json     # in a checkout of the old commit
    python tests/robustness/same_numbers.py after.json --compare before.json       # of the new one

Runs the toy recipes, those of `make demo`, `toy.yaml` on two processes and the quick reproduction,
in a folder of its own, and keeps hashes of all tensors, every line of losses and scores, and
results, but for times, rates and sizes. The second form names what differs, and leaves with code 1
if anything does. About ten minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

RECIPES = {
    "toy": "pretrain",
    "toy_average": "average",
    "toy_evaluate": "evaluate",
    "toy_analyse": "analyse",
    "toy_adapt": "adapt",
    "toy_export": "export",
    "toy_finetune": "finetune",
    "toy_convert": "convert",
    "demo/mhr": "pretrain",
    "demo/lora": "pretrain",
    "demo/average": "average",
    "demo/zero_shot": "evaluate",
    "demo/few_shot": "adapt",
    "demo/analyse": "analyse",
}
TWO_PROCESSES = (
    "deepspeed --num_gpus 2 launch/pretrain.py launch/recipes/toy.yaml run.folder=runs/toy2 "
    "schedule.steps=100"
)
QUICK_STUDY = "python launch/reproduce.py toy --quick --workers 2"

RESULTS = ("analysis.json", "summary.json", "result.json", "claims.json", "results.json")
#: Parts of the names of values that belong to a machine, a moment or a place.
PASSING = ("second", "time", "memory", "mib", "rate", "eta", "commit", "bytes", "provenance")


ROOT = Path(__file__).parents[2]


def run(command: str, folder: Path) -> None:
    """Run a command in a folder, with this interpreter's environment; raises if it fails."""
    print(command, flush=True)
    words = [str(ROOT / word) if word.startswith("launch/") else word for word in command.split()]
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": os.pathsep.join((binaries, os.environ["PATH"])),
    }
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def hash_tensors(file: Path) -> str:
    """Hash names, types, shapes and bytes of a file's tensors."""
    found = hashlib.sha256()
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).contiguous()
            found.update(name.encode())
            found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            if tensor.numel():
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def lasting(values: Any) -> Any:
    """Values without those that another machine or moment would change."""
    if isinstance(values, dict):
        names = [name for name in values if not any(word in name.lower() for word in PASSING)]
        return {name: lasting(values[name]) for name in names}
    return [lasting(value) for value in values] if isinstance(values, list) else values


def collect(folder: Path) -> dict[str, Any]:
    """The numbers of all files below a folder, by path."""
    numbers: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder.parent))
        if file.suffix == ".safetensors":
            numbers[name] = hash_tensors(file)
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            numbers[name] = [lasting(json.loads(line)) for line in lines if line.strip()]
        elif file.name in RESULTS:
            numbers[name] = lasting(json.loads(file.read_text(encoding="utf-8")))
    return numbers


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of files whose numbers differ, or that one side lacks."""
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name))


def main() -> int:
    """Run everything, write the numbers, compare them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    commands = [
        f"python launch/{verb}.py launch/recipes/{name}.yaml" for name, verb in RECIPES.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        for command in (*commands, TWO_PROCESSES, QUICK_STUDY):
            run(command, Path(folder))
        numbers = collect(Path(folder) / "runs")
    options.file.write_text(json.dumps(numbers, indent=0, sort_keys=True))
    print(f"{len(numbers)} files with numbers")
    if options.compare is None:
        return 0
    found = differences(json.loads(options.compare.read_text()), numbers)
    print("\n".join(found) or "all the same")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
