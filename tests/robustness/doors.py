"""Kinds of input: which files are damaged, and the code of the verbs that then reads them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from originals import (
    Originals,
    adaptation_config,
    evaluation_config,
    interrupted_config,
    open_cached,
)
from toy_exports import BASE

from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    AverageConfig,
    BackboneConfig,
    BatchConfig,
    ConvertConfig,
    CrossFitTasks,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    JsonlTasks,
    PretrainConfig,
    SuperNITasks,
)
from mhr_scale.engine import opened
from mhr_scale.engine.ds_config import deepspeed_config, read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.recipe.reading import load, parse, to_yaml
from mhr_scale.rows.tokens import open_tokens
from mhr_scale.run.files import hash_file
from mhr_scale.run.folders import DONE
from mhr_scale.tasks.t0.prompts import Prompter, load_templates
from mhr_scale.training import opening
from mhr_scale.verbs import adapt, average, convert, evaluate, export, finetune, pretrain
from mhr_scale.verbs.summarise import summarise_runs

TOY = BackboneConfig(name="builtin:toy", dtype="float32")


class Reached(Exception):
    """A verb found everything good and went for its engine, its training or its weights."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of input: `original` is copied into the case's folder and files of it are damaged."""

    original: str
    files: tuple[str, ...]
    door: Callable[[Originals], None]
    """Reads `./<original>`."""
    beside: tuple[str, ...] = ()
    """Other originals the door needs beside it, whole."""
    reseal: Callable[[Path], None] | None = None
    """Makes hashes right again, so that a damage gets past them."""
    results: tuple[str, ...] = ()
    """What must not exist after a refusal."""


# --- recipes


@contextmanager
def at_the_door() -> Iterator[None]:
    """Verbs stop where they would start an engine, train or convert."""

    def reached(*arguments: Any, **options: Any) -> Any:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        for place in (opened, finetune):
            patch.setattr(place, "Engine", reached)
        patch.setattr(average, "opened_training", reached)
        patch.setattr(convert.conversion, "write_weights", reached, raising=False)
        yield


def recipe(schema: Any, verb: Callable[[Any], Any]) -> Callable[[Originals], None]:
    """Read a recipe, print it, read what was printed, and run its verb up to the engine."""

    def door(originals: Originals) -> None:
        folder = next(Path().glob("* recipe"))
        config = parse(schema, [str(folder / "recipe.yaml")], about="a verb RECIPE").config
        printed = Path("printed.yaml")
        printed.write_text(to_yaml(config), encoding="utf-8")
        assert load(schema, printed) == config
        with at_the_door():
            try:
                verb(config)
            except Reached:
                return

    return door


def prepared(config: PretrainConfig) -> None:
    """Everything `pretrain` does before its first step, with an engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "Engine", Engine)
        with opening.opened_training(config):
            pass


# --- the other readers


def rows(originals: Originals) -> None:
    """JSONL rows, tokenised."""
    _tokenised(JsonlTasks(suite="jsonl", folder="rows"))


def superni(originals: Originals) -> None:
    """SuperNI tasks with examples, tokenised."""
    config = SuperNITasks(
        suite="superni",
        folder="superni",
        train_examples=2,
        validation_examples=2,
        positive_examples=2,
    )
    _tokenised(config)


def crossfit(originals: Originals) -> None:
    """CrossFit's training tasks, tokenised."""
    config = CrossFitTasks(
        suite="crossfit",
        folder="crossfit/data",
        partition="crossfit/partition.json",
        seeds=(13, 21),
    )
    _tokenised(config)


def _tokenised(config: Any) -> None:
    blueprint = read_blueprint(TOY)
    open_tokens(config, load_tokenizer(TOY, blueprint), BatchConfig(), blueprint.family)


def tokens(originals: Originals) -> None:
    """A token cache."""
    open_cached(Path("tokens"))


def templates(originals: Originals) -> None:
    """Promptsource templates on two rows."""
    prompter = Prompter()
    for template in load_templates(Path("templates"), "pets", None):
        for label in range(2):
            row = {"text": "It purrs.", "label": label, "names": ["Tom", "Kit"]}
            prompter.render(template, row, row_id=f"pets:{label}")


def placement(originals: Originals) -> None:
    """A DeepSpeed file."""
    json.dumps(deepspeed_config(read_ds_config("placement/ds.json"), dtype="bfloat16"))


def subject(**settings: str) -> Callable[[Originals], None]:
    """Evaluate an adapter or a backbone, from reading to scores."""

    def door(originals: Originals) -> None:
        evaluate.evaluate(evaluation_config("scored", **settings))

    return door


def went_on(originals: Originals) -> None:
    """An interrupted run goes on to its end."""
    pretrain.pretrain(interrupted_config("interrupted"))


def evaluation(originals: Originals) -> None:
    """An interrupted evaluation goes on, and its table is printed again."""
    evaluate.evaluate(evaluation_config("evaluation"))
    summarise_runs(["evaluation"])


def summary(originals: Originals) -> None:
    """The table of an evaluation, from its scores alone."""
    summarise_runs(["evaluation"])


def adaptation(originals: Originals) -> None:
    """Interrupted few-shot jobs go on to their table."""
    adapt.adapt(adaptation_config(originals, "adaptation"))


# --- hashes made right


def reseal_adapter(folder: Path) -> None:
    """`adapter.json` gets the hash of the tensors beside it."""
    card = json.loads((folder / "adapter.json").read_text())
    card["sha256"] = hash_file(folder / "adapter.safetensors")
    (folder / "adapter.json").write_text(json.dumps(card))


def reseal_steps(folder: Path) -> None:
    """Saved steps get the hashes of what lies in them."""
    for done in folder.rglob(DONE):
        step = done.parent
        progress = json.loads((step / "resume" / "progress.json").read_text())
        progress["sha256"] = hash_file(step / "resume" / "optimizer.safetensors")
        (step / "resume" / "progress.json").write_text(json.dumps(progress))
        reseal_adapter(step)
        files = [path for path in step.rglob("*") if path.is_file() and path != done]
        facts = {
            str(file.relative_to(step)): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            for file in files
        }
        done.write_text(json.dumps({"files": facts}))


def reseal_backbone(folder: Path) -> None:
    """`mhr_scale.json` gets sizes and hashes of the files beside it."""
    manifest = json.loads((folder / "mhr_scale.json").read_text())
    for name, facts in manifest["files"].items():
        file = folder / name
        facts |= {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    (folder / "mhr_scale.json").write_text(json.dumps(manifest))


BARE = "{{name: {0}, dtype: float32}}"
VERBS = {
    "pretrain": (PretrainConfig, prepared, ()),
    "evaluate": (EvaluateConfig, evaluate.evaluate, ("run",)),
    "adapt": (AdaptConfig, adapt.adapt, ("run", "rows")),
    "average": (AverageConfig, average.average, ("run",)),
    "export": (ExportConfig, export.export, ("run",)),
    "finetune": (FinetuneConfig, finetune.finetune, ("lora",)),
    "convert": (ConvertConfig, convert.convert, ()),
}
KINDS: dict[str, Kind] = {
    **{
        f"{name} recipe": Kind(
            original=f"{name} recipe",
            files=("recipe.yaml",),
            door=recipe(schema, verb),
            beside=beside,
            results=(f"runs/{name}",),
        )
        for name, (schema, verb, beside) in VERBS.items()
    },
    "DeepSpeed file": Kind(original="placement", files=("ds.json",), door=placement),
    "JSONL rows": Kind(original="rows", files=("*/*.jsonl", "tasks.yaml"), door=rows),
    "SuperNI": Kind(original="superni", files=("tasks/*.json", "splits/*/*.txt"), door=superni),
    "CrossFit": Kind(
        original="crossfit", files=("data/*/*_train.tsv", "partition.json"), door=crossfit
    ),
    "templates": Kind(original="templates", files=("pets/templates.yaml",), door=templates),
    "token cache": Kind(original="tokens", files=("**/*",), door=tokens),
    "adapter": Kind(
        original="adapter",
        files=("*",),
        door=subject(adapter="adapter"),
        reseal=reseal_adapter,
        results=("scored/summary.json",),
    ),
    **{
        f"PEFT {name}": Kind(
            original=name,
            files=("*",),
            door=subject(adapter=name),
            results=("scored/summary.json",),
        )
        for name in ("lora", "ia3", "poly")
    },
    "published checkpoint": Kind(
        original="published",
        files=("*",),
        door=subject(adapter="published/checkpoint.pt", backbone_moved_to=str(BASE)),
        results=("scored/summary.json",),
    ),
    **{
        f"{name} backbone": Kind(
            original=original,
            files=("*",),
            door=subject(backbone=BARE.format(original)),
            reseal=reseal_backbone if original == "converted" else None,
            results=("scored/summary.json",),
        )
        for name, original in (
            ("safetensors", "backbone"),
            ("pickled", "pickled"),
            ("converted", "converted"),
        )
    },
    "interrupted run": Kind(
        original="interrupted",
        files=("*", "steps/*/*", "steps/*/resume/*"),
        door=went_on,
        reseal=reseal_steps,
        results=("interrupted/steps/000004",),
    ),
    "interrupted evaluation": Kind(
        original="evaluation",
        files=("*",),
        door=evaluation,
        results=("evaluation/summary.json",),
    ),
    "scores": Kind(original="evaluation", files=("scores.jsonl",), door=summary),
    "interrupted jobs": Kind(
        original="adaptation",
        files=("*", "jobs/*/*/*/*", "jobs/**/steps/*/*", "jobs/**/resume/*", "jobs/**/best/*/*"),
        door=adaptation,
        reseal=reseal_steps,
        results=("adaptation/summary.json",),
    ),
}
