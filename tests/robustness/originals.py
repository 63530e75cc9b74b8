"""Valid inputs of every kind, made on the spot: what the mutations start from."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfit_files import write_crossfit
from processes import ROOT
from small_runs import SHORT, TOY, VariantConfig, make_config, write_rows
from toy_exports import BASE, make, save_run

from mhr_scale.adapters import artefact, peft_folders
from mhr_scale.adapters.collapse import average
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    BackboneConfig,
    BatchConfig,
    ConvertConfig,
    EvaluateConfig,
    PretrainConfig,
    ToyTasks,
    WavesConfig,
)
from mhr_scale.jobs import runner
from mhr_scale.recipe.reading import load, to_yaml
from mhr_scale.rows.tokens import open_tokens
from mhr_scale.tasks import toy
from mhr_scale.verbs.adapt import adapt
from mhr_scale.verbs.convert import convert
from mhr_scale.verbs.evaluate import evaluate
from mhr_scale.verbs.pretrain import pretrain

_FOLDER = Path(os.environ.get("MHR_SHARED", ROOT.parent / "shared"))
#: The folder of real data; None where there is none.
SHARED = _FOLDER if _FOLDER.is_dir() else None
RUN = (*SHORT, "run.save_every=2", "run.log_every=1")
TASKS = {"suite": "toy", "n_tasks": 4, "train_examples": 10, "validation_examples": 2}
TEMPLATES = """dataset: pets
subset: null
templates:
  11111111-0000-0000-0000-000000000000: !Template
    answer_choices: no ||| yes
    id: 11111111-0000-0000-0000-000000000000
    jinja: '{{ text }} Is it a cat? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: is_it_a_cat
    reference: ''
  22222222-0000-0000-0000-000000000000: !Template
    answer_choices: '{{ names | join("|||") }}'
    id: 22222222-0000-0000-0000-000000000000
    jinja: |-
      {% if label == 1 %}
      Name {{ ["this", "that"] | choice }} cat: {{ text | upper }}
      |||
      {{ names[0] }}
      {% endif %}
    metadata: !TemplateMetadata
      original_task: null
    name: name
    reference: a comment
"""
RECIPES: dict[str, Any] = {
    "evaluate": {
        "adapter": "run",
        "tasks": TASKS,
        "scoring": {"metric": "accuracy", "length_norm": 1.0, "examples": 1},
        "run": {"folder": "runs/evaluate"},
    },
    "adapt": {
        "variants": {
            "MHR": {"adapter": "run"},
            "LoRA": {"fresh": {"layout": "attention", "n_skills": 1, "rank": 2}},
        },
        "tasks": {"suite": "jsonl", "folder": "rows", "intake": {"on_bad": "error"}},
        "shots": {"seeds": [0, 1], "count": 4},
        "protocol": {"steps": 4, "batch_size": 2, "max_input_tokens": 32},
        "selection": {"on": "last"},
        "waves": {"size": 2},
        "run": {"folder": "runs/adapt"},
    },
    "average": {"source": "run", "steps": [0], "run": {"folder": "runs/average", "seed": 0}},
    "export": {"adapter": "run", "what": "average", "format": "native", "folder": "runs/export"},
    "finetune": {
        "adapter": "lora",
        "backbone": {"name": "builtin:toy", "dtype": "float32"},
        "tasks": {"suite": "toy", "fold": "held_out"},
        "task": "sort.plus4.after",
        "shots": {"seed": 0, "count": 4},
        "protocol": {"steps": 2, "batch_size": 2},
        "run": {"folder": "runs/finetune"},
    },
    "convert": {
        "backbone": {"name": "builtin:toy"},
        "dtype": "float32",
        "folder": "runs/convert",
        "fingerprint": {"prompts": ["a b c"], "compare": False},
    },
}


class Originals:
    """Folders of valid inputs below `root`, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True)
        self.root = root
        self.get = cache(self._get)

    def _get(self, name: str) -> Path:
        folder = self.root / name
        MAKERS[name](self, folder)
        return folder


def _run(originals: Originals, folder: Path) -> None:
    """A run with an adapter and every saved step."""
    pretrain(load(PretrainConfig, TOY, [*RUN, f"run.folder={folder}"]))


def interrupted_config(folder: str) -> PretrainConfig:
    """The recipe of the run that was interrupted after two of its four steps."""
    return load(PretrainConfig, TOY, [*RUN, f"run.folder={folder}"])


def _interrupted(originals: Originals, folder: Path) -> None:
    """The same run as it was after two of four steps."""
    shutil.copytree(originals.get("run"), folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "steps" / "000004")
    (folder / "config.yaml").write_text(to_yaml(interrupted_config("run")))


def _recipe(name: str) -> Callable[[Originals, Path], None]:
    """A recipe, alone in its folder; what it names lies beside it (`Kind.beside`)."""

    def write(originals: Originals, folder: Path) -> None:
        folder.mkdir()
        config = load(PretrainConfig, TOY, [*SHORT, "run.folder=runs/pretrain"])
        text = to_yaml(config) if name == "pretrain" else json.dumps(RECIPES[name], indent=1)
        (folder / "recipe.yaml").write_text(text)

    return write


def _rows(originals: Originals, folder: Path) -> None:
    write_rows(folder)
    names = sorted(path.name for path in folder.iterdir())
    options = {names[0]: {"cap": 5, "weight": 2.0, "metric": "accuracy", "max_input_tokens": 20}}
    (folder / "tasks.yaml").write_text(to_yaml_text(options))


def to_yaml_text(values: Any) -> str:
    """Plain values as YAML of a line each."""
    import yaml

    return str(yaml.safe_dump(values))


def _superni(originals: Originals, folder: Path) -> None:
    """One real task where there is real data, and two of our own."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for number in range(2):
        instances = [
            {"id": f"task{number}-{n}", "input": f"the {n}th word", "output": [f"word {n}", "x"]}
            for n in range(6)
        ]
        examples = [{"input": "one", "output": "two", "explanation": "it follows"}] * 2
        task = {"Definition": ["Count on"], "Positive Examples": examples, "Instances": instances}
        (folder / "tasks" / f"task{number}_count.json").write_text(json.dumps(task, indent=1))
    if SHARED is not None:
        files = (SHARED / "data" / "superni_sample" / "tasks").glob("*.json")
        file = min(files, key=lambda path: (path.stat().st_size, path.name))
        shutil.copyfile(file, folder / "tasks" / file.name)
    names = sorted(path.stem for path in (folder / "tasks").iterdir())
    (folder / "splits" / "default" / "train_tasks.txt").write_text("\n".join(names) + "\n")


def _crossfit(originals: Originals, folder: Path) -> None:
    """Four tasks in CrossFit's format, and a partition of them."""
    write_crossfit(folder)


def _templates(originals: Originals, folder: Path) -> None:
    (folder / "pets").mkdir(parents=True)
    (folder / "pets" / "templates.yaml").write_text(TEMPLATES)


def _adapter(originals: Originals, folder: Path) -> None:
    save_run(folder.parent / ".adapter", make("MHR", tasks=toy_names()))
    shutil.copytree(folder.parent / ".adapter" / "adapter", folder)


def toy_names() -> list[str]:
    """The tasks that `TASKS` names."""
    return [task.name for task in toy.make_tasks(ToyTasks(**TASKS))]


def _peft(kind: str) -> Callable[[Originals, Path], None]:
    def write(originals: Originals, folder: Path) -> None:
        if kind == "lora":
            peft_folders.write_peft_lora(average(make("MHR")), folder, base_model=str(BASE))
        elif kind == "ia3":
            peft_folders.write_peft_ia3(make("IA3"), folder, base_model=str(BASE))
        else:
            peft_folders.write_peft_poly(
                make("MHR", tasks=toy_names()), folder, base_model=str(BASE)
            )

    return write


def _published(originals: Originals, folder: Path) -> None:
    """The checkpoint of a plain LoRA under the reference implementation's names."""
    folder.mkdir()
    tensors = {}
    for name, tensor in artefact.named_tensors(average(make("MHR"))).items():
        linear, _, side = name.rpartition(".")
        tensors[f"{linear}.lora_{side.lower()}"] = tensor[0, 0].detach().clone()
    torch.save(tensors, folder / "checkpoint.pt")


def _backbone(originals: Originals, folder: Path) -> None:
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("README.md"))


def _pickled(originals: Originals, folder: Path) -> None:
    """The toy backbone as a `.bin`."""
    from safetensors.torch import load_file

    _backbone(originals, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _converted(originals: Originals, folder: Path) -> None:
    made = {**RECIPES["convert"], "folder": str(folder), "max_shard_bytes": 200_000}
    recipe = folder.parent / "convert.yaml"
    recipe.write_text(json.dumps(made))
    convert(load(ConvertConfig, recipe))


def evaluation_words(folder: str, **subject: str) -> list[str]:
    """What follows `launch/evaluate.py` for the toy backbone, or for what `subject` says."""
    subject = subject or {"backbone": '{name: "builtin:toy", dtype: float32}'}
    changes = [f"{name}={value}" for name, value in {"adapter": "null", **subject}.items()]
    changes += [f"tasks.{name}={value}" for name, value in TASKS.items()]
    return [str(Path(TOY).with_name("toy_evaluate.yaml")), *changes, f"run.folder={folder}"]


def evaluation_config(folder: str, **subject: str) -> EvaluateConfig:
    """The recipe of these words."""
    recipe, *changes = evaluation_words(folder, **subject)
    return load(EvaluateConfig, recipe, changes)


def _evaluation(originals: Originals, folder: Path) -> None:
    """An evaluation that stopped in the middle of a line."""
    evaluate(evaluation_config(str(folder)))
    (folder / "summary.json").unlink()
    scores = folder / "scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:5]))
    (folder / "config.yaml").write_text(to_yaml(evaluation_config("evaluation")))


def adaptation_config(originals: Originals, folder: str) -> AdaptConfig:
    """Two jobs of four steps, saved every second."""
    variants = {"MHR": VariantConfig(adapter=str(originals.get("run")))}
    made = make_config(Path(folder), originals.get("rows"), variants)
    protocol = replace(made.protocol, steps=4)
    return replace(made, protocol=protocol, waves=WavesConfig(save_every=2))


def _adaptation(originals: Originals, folder: Path) -> None:
    """Few-shot jobs of which one is finished and one is all but finished."""
    calls: list[Any] = []
    write_result = runner.write_result

    def interrupt(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        write_result(*arguments)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(runner, "write_result", interrupt)
        adapt(adaptation_config(originals, str(folder)))
    stored = adaptation_config(originals, "adaptation")
    (folder / "config.yaml").write_text(to_yaml(stored))


def _placement(originals: Originals, folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(ROOT / "ds_configs" / "zero3_offload.json", folder / "ds.json")


def open_cached(folder: Path) -> None:
    """Open a token cache of the toy tasks, or fill it."""
    toy = BackboneConfig(name="builtin:toy", dtype="float32")
    blueprint = read_blueprint(toy)
    tokenizer = load_tokenizer(toy, blueprint)
    tokens = open_tokens(
        ToyTasks(**TASKS), tokenizer, BatchConfig(), blueprint.family, cache=str(folder)
    )
    assert sum(row.n_answer_tokens for rows in tokens.train for row in rows) > 0


def _tokens(originals: Originals, folder: Path) -> None:
    """A token cache of the toy tasks."""
    open_cached(folder)


MAKERS: dict[str, Callable[[Originals, Path], None]] = {
    "run": _run,
    "interrupted": _interrupted,
    **{f"{verb} recipe": _recipe(verb) for verb in ("pretrain", *RECIPES)},
    "rows": _rows,
    "superni": _superni,
    "crossfit": _crossfit,
    "templates": _templates,
    "adapter": _adapter,
    "lora": _peft("lora"),
    "ia3": _peft("ia3"),
    "poly": _peft("poly"),
    "published": _published,
    "backbone": _backbone,
    "pickled": _pickled,
    "converted": _converted,
    "evaluation": _evaluation,
    "adaptation": _adaptation,
    "placement": _placement,
    "tokens": _tokens,
}
