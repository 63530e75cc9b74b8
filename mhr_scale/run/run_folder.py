"""A run's folder: the recipe it keeps, and what may change when the run goes on."""

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import as_written, load, to_yaml
from mhr_scale.run.files import write_text

T = TypeVar("T")


def read_recipe(schema: type[T], path: Path) -> T:
    """A run folder's own recipe; raises `RunError` if it cannot be read."""
    try:
        return load(schema, path)
    except ConfigError as error:
        raise RunError(f"{error}; use another run.folder") from error


def differences(before: Any, now: Any) -> list[tuple[str, str]]:
    """The settings in which two recipes differ, by their dotted names, and what to say of each."""
    old, new = (dotted(yaml.safe_load(to_yaml(recipe))) for recipe in (before, now))
    return [
        (key, f"{key} was {as_written(old.get(key))}, is {as_written(new.get(key))}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def listed(changed: list[str]) -> str:
    """The first of what `differences` says."""
    return "; ".join(changed[:3]) + ("; ..." if len(changed) > 3 else "")


def write_recipe(file: Path, recipe: Any) -> None:
    """Make a run folder and write a recipe into it; raises `RunError` if that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_yaml(recipe))
    except OSError as error:
        raise RunError(
            f"run.folder: cannot write to {file.parent} ({error.strerror}); name another folder"
        ) from error


def check_writable(path: Path) -> None:
    """Raise `RunError` if a run folder cannot be made or written to."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise RunError(f"run.folder: no permission to write in {parent}; name another folder")
    if path.exists() and not path.is_dir():
        raise RunError(f"run.folder: {path} is a file; name a folder")


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
