"""A run's folder: where it may be, the recipe it keeps, and what may change when it goes on."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import as_written, load, to_yaml
from mhr_scale.run.files import write_text
from mhr_scale.run.runlog import record_provenance

T = TypeVar("T")

RECIPE, PROVENANCE, REJECTS = "config.yaml", "provenance.json", "rejects.jsonl"
#: Settings of two recipes that a message names at most.
SHOWN = 3


class RunFolder(Generic[T]):
    """The folder of a run of one verb, whose recipes are of the type `schema`.

    `free` are settings that may differ when the run goes on: where and how fast, not what; a name
    that ends with a dot stands for all below it.
    """

    def __init__(self, path: Path | str, schema: type[T], *, free: Collection[str] = ()) -> None:
        self.path = Path(path)
        self.schema = schema
        self._free = tuple(free)

    @property
    def recipe_file(self) -> Path:
        """Where the recipe is kept."""
        return self.path / RECIPE

    def check_writable(self) -> None:
        """Raise `RunError` if the folder cannot be made or written to."""
        path = self.path
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise RunError(f"run.folder: no permission to write in {parent}; name another folder")
        if path.exists() and not path.is_dir():
            raise RunError(f"run.folder: {path} is a file; name a folder")

    def read_recipe(self) -> T | None:
        """The recipe that is kept, if one is; raises `RunError` if it cannot be read."""
        if not self.recipe_file.exists():
            return None
        try:
            return load(self.schema, self.recipe_file)
        except ConfigError as error:
            raise RunError(f"{error}; use another run.folder") from error

    def check(
        self,
        recipe: T,
        *,
        is_begun: bool,
        holds: str,
        more: Collection[str] = (),
        way_out: str = "use another run.folder to start anew",
    ) -> None:
        """Raise `RunError` unless this recipe may go on here.

        It may where nothing `is_begun`, or all that is not free is as the kept recipe has it.
        `holds` is what errors call the content, `more` are differences that were found besides.
        """
        self.check_writable()
        kept = self.read_recipe()
        if kept is None:
            if is_begun:
                raise RunError(
                    f"{self.path}: holds {holds}, but no {RECIPE}; use another run.folder"
                )
            return
        changed = [
            difference for name, difference in differences(kept, recipe) if not self._is_free(name)
        ]
        changed += more
        if changed and is_begun:
            listed = "; ".join(changed[:SHOWN]) + ("; ..." if len(changed) > SHOWN else "")
            raise RunError(f"{self.path}: holds {holds} of other settings ({listed}); {way_out}")

    def _is_free(self, name: str) -> bool:
        return any(
            name.startswith(free) if free.endswith(".") else name == free for free in self._free
        )

    def keep_recipe(self, recipe: T) -> None:
        """Make the folder and write the recipe; raises `RunError` if that cannot be."""
        write_recipe(self.recipe_file, recipe)

    def record_start(self, **facts: Any) -> None:
        """Add this start to the provenance of the run's numbers."""
        record_provenance(self.path / PROVENANCE, **facts)


def write_recipe(file: Path, recipe: Any) -> None:
    """Write a recipe, into a new folder if need be; raises `RunError` if that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_yaml(recipe))
    except OSError as error:
        raise RunError(
            f"run.folder: cannot write to {file.parent} ({error.strerror}); name another folder"
        ) from error


def differences(before: Any, now: Any) -> list[tuple[str, str]]:
    """The settings in which two recipes differ, by their dotted names, and what to say of each."""
    old, new = (dotted(yaml.safe_load(to_yaml(recipe))) for recipe in (before, now))
    return [
        (key, f"{key} was {as_written(old.get(key))}, is {as_written(new.get(key))}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
