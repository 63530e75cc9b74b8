"""Run folders of every kind, written as the verbs write them but without training anything."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import ROOT

from mhr_scale.config import PretrainConfig
from mhr_scale.recipe.reading import load, to_yaml
from mhr_scale.run.runlog import record_provenance

TOY = ROOT / "launch" / "recipes" / "toy.yaml"
LORA = ("adapter.n_skills=1", "adapter.n_splits=1")


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def pretraining(
    folder: Path,
    *overrides: str,
    steps: int = 40,
    tasks: Sequence[str] = ("sort", "copy", "reverse"),
    is_finished: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A pre-training run, logged at every step."""
    words = [f"schedule.steps={steps}", f"run.folder={folder}", *overrides]
    write_text(folder / "config.yaml", to_yaml(load(PretrainConfig, TOY, words)))
    last = steps if is_finished else steps // 2
    lines = [validation(0, 9.0, tasks)]
    lines += [
        {
            "step": step,
            "loss": 3.0 * math.exp(-step / steps),
            "grad_norm": 1.0,
            "lr_inventory": 0.01,
            "tokens_per_second": 1e4,
            **(extra or {}),
        }
        for step in range(1, last + 1)
    ]
    if is_finished:
        lines.append(validation(steps, 1.5, tasks))
        card = {"tensors": {"a.A": [2, 3], "a.routing_logits": [4]}}
        write_text(folder / "adapter" / "adapter.json", json.dumps(card))
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "rejects.jsonl", [{"line": 3, "reason": "no target"}])
    record_provenance(folder / "provenance.json", world_size=1, device="cpu")
    return folder


def validation(step: int, loss: float, tasks: Sequence[str]) -> dict[str, Any]:
    by_task = {task: loss + 0.01 * number for number, task in enumerate(tasks)}
    return {"step": step, "validation_loss": loss, "validation_loss_by_task": by_task}


def average(folder: Path, source: Path, steps: Sequence[int] = (0, 20)) -> Path:
    """An averaged run without the lines of its extra steps."""
    text = f"source: {source}\nsteps: {list(steps)}\ntrainable: mean\nrun: {{folder: {folder}}}\n"
    write_text(folder / "average.yaml", text)
    for k in steps:
        write_text(folder / "averaged" / f"{k:06d}" / "adapter.json", "{}")
    return folder


def evaluation(
    folder: Path,
    adapter: Path | None,
    points: Mapping[str, float],
    *,
    prompts: Sequence[str] = ("",),
    is_finished: bool = True,
) -> Path:
    """Scores around the given means, two examples per task and prompt."""
    subject = f"adapter: {adapter}" if adapter else "backbone: {name: 'builtin:toy'}"
    write_text(folder / "config.yaml", f"{subject}\ntasks: {{suite: toy}}\nscoring: {{beams: 1}}\n")
    write_lines(
        folder / "scores.jsonl",
        [
            {
                "id": f"{task}/{number}/{prompt}",
                "task": task,
                "example": f"{task}/{number}",
                "prompt": prompt,
                "metric": "accuracy",
                "points": mean + shift + 2 * place,
            }
            for task, mean in points.items()
            for place, prompt in enumerate(prompts)
            for number, shift in enumerate((-5.0, 5.0))
        ],
    )
    if is_finished:
        write_text(folder / "summary.json", "{}")
    return folder


#: Adaptation parameters and mean score of the few-shot variants.
VARIANTS = {"LoRA": (6144, 40.0), "MHR-z": (768, 50.0), "MHR": (25344, 53.0)}


def few_shot(
    folder: Path,
    *,
    tasks: Sequence[str] = ("sort", "copy"),
    seeds: Sequence[int] = (0, 1),
    missing: int = 0,
) -> Path:
    """Results of every task, seed and variant; the last few may be missing."""
    variants = "".join(f"  {name}: {{adapter: runs/x}}\n" for name in VARIANTS)
    write_text(
        folder / "config.yaml", f"variants:\n{variants}shots: {{seeds: {list(seeds)}, count: 8}}\n"
    )
    jobs = [(task, seed, name) for name in VARIANTS for seed in seeds for task in tasks]
    for number, (task, seed, name) in enumerate(jobs):
        job = folder / "jobs" / task.replace("<", "%3C").replace("/", "%2F") / str(seed) / name
        job.mkdir(parents=True)
        result = {
            "task": task,
            "seed": seed,
            "variant": name,
            "score": VARIANTS[name][1] + 2.0 * seed + tasks.index(task),
            "metric": "exact_match",
            "kind": "full",
            "adapter": "runs/x",
            "trained_numbers": VARIANTS[name][0],
            "source_numbers": 24576,
        }
        if number < len(jobs) - missing:
            write_text(job / "result.json", json.dumps(result))
    if not missing:
        write_text(folder / "summary.json", "{}")
    return folder


def analysis(folder: Path, *, n_tasks: int = 4, n_groups: int = 3, n_skills: int = 2) -> Path:
    """An analysis with made-up numbers."""
    names = [f"task_{number}" for number in range(n_tasks)]
    order = list(range(n_tasks))[::-1]
    matrix = [
        [1.0 if r == c else round(math.cos(r + c), 3) for c in range(n_tasks)]
        for r in range(n_tasks)
    ]
    shares = [1.0 / n_skills] * n_skills
    figures = {"sparsity": 0.25, "discreteness": 0.5, "entropy": 0.75}
    found = {
        "schema": 1,
        "method": "MHR",
        "task_names": names,
        "parameters": {
            "multi_task": 24576,
            "variants": {"full": 25344, "routing": 768, "average": 6144},
        },
        "routing": {
            **figures,
            "effective_skills": 1.9,
            "groups": [
                {"name": f"encoder.block.{n}.layer.0.SelfAttention.q", "usage": shares, **figures}
                for n in range(n_groups)
            ],
            "usage": shares,
            "similarity": {"order": order, "matrix": matrix},
        },
        "inventory": {
            "linears": [
                {"name": f"linear_{n}", "norms": [1.0] * n_skills, "overlap": 0.125}
                for n in range(n_groups)
            ],
            "overlap": [
                [1.0 if r == c else 0.125 for c in range(n_skills)] for r in range(n_skills)
            ],
            "norms": [1.0] * n_skills,
        },
        "alignment": {
            "tasks": names,
            "rows": 16,
            "mean": 0.321,
            "order": order,
            "matrix": matrix,
            "layers": [{"name": "encoder.block.0", "mean": 0.321}],
        },
    }
    write_text(folder / "analysis.json", json.dumps(found))
    return folder


def everything(folder: Path) -> list[Path]:
    """One run of every kind, and two seeds of what has seeds."""
    made = []
    for seed in (0, 1):
        source = pretraining(folder / f"mhr_{seed}", f"run.seed={seed}")
        mean = average(folder / f"mean_{seed}", source)
        scored = [
            evaluation(
                folder / f"zero_shot_{seed}_{k}",
                mean / "averaged" / f"{k:06d}",
                {"sort": 20.0 + k + seed, "copy": 30.0 + k},
                prompts=("p", "q"),
            )
            for k in (0, 20)
        ]
        made += [source, mean, *scored]
    made.append(pretraining(folder / "lora", *LORA, is_finished=False))
    return [*made, few_shot(folder / "few_shot"), analysis(folder / "analysis")]


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
