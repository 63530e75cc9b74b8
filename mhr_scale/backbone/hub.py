"""Finding a backbone's files: built in, in a folder, or downloaded from the hub."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mhr_scale.backbone.weight_files import SUFFIXES, choose_weights
from mhr_scale.errors import BackboneError
from mhr_scale.run import repositories
from mhr_scale.run.repositories import Found

BUILTIN = {"builtin:toy": Path(__file__).parents[1] / "tasks" / "toy_backbone"}
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
WAY_OUT = f"give a folder, a hub id or {', '.join(BUILTIN)}"
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.bin")


def find_folder(
    name: str,
    revision: str | None,
    *,
    setting: str = "backbone.name",
    files: Sequence[str] = HUB_FILES,
) -> Path:
    """Local folder of a builtin, a path or a place on the hub (`repositories.parse`).

    Of the hub, those of its `files` are downloaded that are not here yet. `setting` is the name of
    the setting in errors.
    """
    return find(name, revision, setting=setting, files=files).path


def find(
    name: str,
    revision: str | None,
    *,
    setting: str = "backbone.name",
    files: Sequence[str] = HUB_FILES,
) -> Found:
    """The same with the commit at which the hub gave it."""
    if name in BUILTIN:
        return Found(BUILTIN[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return repositories.here(name, path if path.name else path.absolute())  # "." names nothing
    if path.is_file():
        raise BackboneError(f"{setting}: {name} is a file; give the folder that it lies in")
    place = None if name.startswith((".", "/", "~")) else repositories.parse(name)
    if place is None:
        raise BackboneError(f"{setting}: no folder '{name}' (looked in {Path.cwd()}); {WAY_OUT}")
    found = repositories.fetch(
        replace(place, revision=place.revision or revision),
        partial(choose_files, patterns=files),
        what=setting,
        error=BackboneError,
        way_out=WAY_OUT,
    )
    return repositories.remember(name, found)


def choose_files(repo_files: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files of a hub id to download: those that match a pattern, and weights in one format.

    Most hub ids hold their weights in several formats, some in several precisions.
    """
    top = [file for file in repo_files if "/" not in file]
    _, weights = choose_weights(top) or (None, [])
    return [
        file
        for file in top
        if (file in weights or not file.endswith(SUFFIXES))
        and any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]
