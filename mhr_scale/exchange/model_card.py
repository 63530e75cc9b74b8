"""README.md of an exported folder: the hub's model card, with lines that load what lies there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mhr_scale.adapters import Adapter
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.sites import family_of_sites
from mhr_scale.config import ExportConfig
from mhr_scale.errors import RunError, counted
from mhr_scale.run import repositories
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import read_metric

NAME = "README.md"
#: The library that loads each format, as the hub calls it.
LIBRARIES = {
    "peft": "peft",
    "peft_poly": "peft",
    "merged": "transformers",
    "native": "mhr_scale",
}
#: As long as a commit is.
COMMIT = 40 * "0"
UNKNOWN_BASE = "FOLDER OF THE BACKBONE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What a card tells of: the adapter in the folder, and what it was made from."""

    config: ExportConfig
    card: Card
    stored: Adapter
    """The adapter that was exported from."""
    adapter: Adapter
    """The one in the folder, or the first of many."""
    folders: Mapping[str, str]
    """Tasks by the folders of their adapters, where each has one."""
    words: str
    """What of the stored adapter it is."""
    base: str | None
    """The backbone as other programs find it; of the hub with its commit."""
    facts: Mapping[str, Any]
    """The `backbone` entry of the adapter's card."""


def write_card(exported: Exported) -> str:
    """The text of a card; raises `RunError` if its metadata are none that the hub knows.

    A base model is named as such where the hub has it, or what it was converted from.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = exported.config
    data = ModelCardData(
        base_model=_id_of_base(exported),
        base_model_relation="finetune" if config.format == "merged" else "adapter",
        library_name=LIBRARIES[config.format],
        license=config.licence,
        license_name=config.licence_name,
        license_link=config.licence_link,
        tags=list(dict.fromkeys(["mhr_scale", *_kinds(exported)])),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(exported)}"
    try:
        read = ModelCard(text).data.to_dict()
    except Exception as error:
        raise RunError(f"licence: makes no model card that the hub reads ({error})") from error
    assert read == data.to_dict()
    return text


def _id_of_base(exported: Exported) -> str | None:
    for facts in (exported.facts, exported.facts.get("converted_from")):
        if not isinstance(facts, Mapping):
            continue
        place = repositories.parse(str(facts.get("name") or ""))
        # cards without a commit say of the hub's copy the commit, of a folder its name
        copy = str(facts.get("commit") or facts.get("folder") or COMMIT)
        if place is not None and "/" in place.id and len(copy) == len(COMMIT):
            return None if repositories.is_here(place.name) else place.id
    return None


def _kinds(exported: Exported) -> list[str]:
    config = exported.stored.config
    tags = [config.kind, config.method.lower()]
    return [*tags, "multi-task"] if len(exported.stored.task_names) > 1 else tags


def _body(exported: Exported) -> str:
    config, stored = exported.config, exported.stored
    place = repositories.parse(config.hub) if config.hub else None
    named = config.folder if place is None else f"{place.id}/{place.folder}"
    rows = {
        "base model": _cell(exported.base, exported.facts),
        "trained as": _settings(stored),
        "numbers trained": f"{sum(p.numel() for p in stored.parameters()):,}",
        "steps": f"{exported.card.step:,}" if exported.card.step else None,
        "backbone computed in": exported.facts.get("dtype"),
    }
    if exported.adapter is not stored and config.format != "merged":
        here = sum(p.numel() for p in exported.adapter.parameters())
        rows["this adapter"] = f"{_settings(exported.adapter)}; {here:,} numbers"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    lines = "\n".join(load_lines(exported, place_of(exported)))
    scores = "".join(f"- {line}\n" for line in scores_of(repositories.last_found(config.adapter)))
    made = f"mhr_scale (`format: {config.format}`); export.yaml is the recipe"
    parts = [
        f"# {Path(named).name}\n",
        f"{exported.words[0].upper()}{exported.words[1:]}, exported by {made}.\n",
        f"| | |\n|---|---|\n{table}",
        f"## Load\n\n```python\n{lines}\n```\n",
        _tasks(exported),
        f"## Scores\n\n{scores}" if scores else "",
        f"## Licence\n\n{_licence(config)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _cell(base: str | None, facts: Mapping[str, Any]) -> str:
    if base is None:
        return "random weights, or not known"
    name, revision = repositories.split(base)
    asked = facts.get("revision")
    at = f", revision `{asked}`" if asked and asked != revision else ""
    return f"`{name}`{at}" + (f", commit `{revision}`" if revision else "")


def _settings(adapter: Adapter) -> str:
    """What an adapter is, in words."""
    config = adapter.config
    sizes = [] if config.kind == "ia3" else [f"rank {config.rank}", f"alpha {config.alpha:g}"]
    if config.n_skills > 1:
        sizes = [counted(config.n_skills, "skill"), counted(config.n_splits, "split"), *sizes]
    layout = Layout.of(config).text
    sizes.append(f"layout {layout} ({counted(len(adapter.sites), 'linear')})")
    return f"{config.method}: {', '.join(sizes)}"


def _tasks(exported: Exported) -> str:
    names = exported.stored.task_names
    if exported.folders:
        listed = "".join(f"- `{f}`: {escape(task)}\n" for f, task in exported.folders.items())
        return f"## Tasks\n\nA folder each:\n\n{listed}"
    listed = "".join(f"- {escape(name)}\n" for name in names)
    summary = f"<summary>{counted(len(names), 'training task')}</summary>"
    return f"## Tasks\n\n<details>{summary}\n\n{listed}\n</details>\n"


def _licence(config: ExportConfig) -> str:
    if config.licence is None:
        return "Not stated. The base model's licence holds for what is made from it."
    link = f" ({config.licence_link})" if config.licence_link else ""
    return f"{config.licence_name or config.licence}{link}."


def scores_of(found: repositories.Found) -> list[str]:
    """What the run that an adapter lies in has measured, a line each; none if it has not."""
    lines = []
    for folder in (found.path, found.path.parent):
        if (folder / "metrics.jsonl").is_file():
            measured = read_metric(folder / "metrics.jsonl", "validation_loss")
            losses = [loss for loss in measured if isinstance(loss, float)]
            if len(losses) > 1:
                lines.append(
                    "loss per target token on held-out rows of the training tasks: "
                    f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
                )
        if (folder / "result.json").is_file():
            result = read_object(folder / "result.json", RunError)
            score, before = result.get("score"), result.get("score_before")
            if isinstance(score, int | float):
                was = f" ({before:.2f} before)" if isinstance(before, int | float) else ""
                lines.append(
                    f"{result.get('task')}: {result.get('metric')} {score:.2f}{was}, "
                    f"{result.get('examples', 'all')} rows"
                )
        if lines:
            break
    return lines


# -- the lines that load it ------------------------------------------------------------------------


def place_of(exported: Exported) -> str:
    """Where the first adapter is found: on the hub if it is pushed there, else in its folder."""
    first = next(iter(exported.folders), "")
    if exported.config.hub is None:
        return str(Path(exported.config.folder) / first)
    place = repositories.parse(exported.config.hub)
    assert place is not None
    inside = "/".join(part for part in (place.folder, first) if part)
    return str(repositories.Place(place.id, place.revision or repositories.MAIN, inside))


def load_lines(exported: Exported, place: str) -> list[str]:
    """Python that loads it with the libraries that it was written for."""
    auto_class = family_of_sites(exported.stored.sites).auto_class
    base = f"model = {auto_class}.from_pretrained({_arguments(exported.base or UNKNOWN_BASE)})"
    imports = f"from transformers import {auto_class}"
    form = exported.config.format
    if form == "merged":
        return [imports, f"model = {auto_class}.from_pretrained({_arguments(place)})"]
    if form == "native":
        load = f"adapter = load_adapter({json.dumps(place)}, model=model)"
        return ["from mhr_scale import load_adapter", imports, base, load]
    load = f"model = PeftModel.from_pretrained(model, {_arguments(place)})"
    lines = ["from peft import PeftModel", imports, base, load]
    if form == "peft_poly":
        lines.append("# model(..., task_ids=...): places in task_names of mhr_scale.json")
    return lines


def _arguments(text: str) -> str:
    """What `from_pretrained` takes for a place: a folder, or a repository of the hub."""
    name, revision = repositories.split(text)
    place = repositories.parse(name)
    if revision is None or place is None:
        return json.dumps(text)
    words: Sequence[str] = [
        json.dumps(place.id),
        *([f"revision={json.dumps(revision)}"] if revision != repositories.MAIN else []),
        *([f"subfolder={json.dumps(place.folder)}"] if place.folder else []),
    ]
    return ", ".join(words)
