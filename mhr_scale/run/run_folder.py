"""A run's folder: whether it can be written, its stored recipe, and what may change on resuming."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import as_written, load, to_yaml
from mhr_scale.run.files import write_text
from mhr_scale.run.folders import nearest_folder
from mhr_scale.run.runlog import record_provenance

T = TypeVar("T")

RECIPE, PROVENANCE, REJECTS = "config.yaml", "provenance.json", "rejects.jsonl"
#: How many differing settings a message lists at most.
SHOWN = 3


class RunFolder(Generic[T]):
    """The folder of a run of one verb, whose recipes are of the type `schema`.

    `free` are settings that may differ when the run resumes: where and how fast, not what; a name
    that ends with a dot covers everything below it. `last` is the file that a run writes last.
    """

    def __init__(
        self,
        path: Path | str,
        schema: type[T],
        *,
        free: Collection[str] = (),
        last: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.schema = schema
        self._free, self._last = tuple(free), last

    @property
    def is_complete(self) -> bool:
        """Whether the run has written its last file."""
        return self._last is not None and (self.path / self._last).is_file()

    @property
    def recipe_file(self) -> Path:
        """The file of the stored recipe."""
        return self.path / RECIPE

    def _check_writable(self) -> None:
        """Raise `RunError` if the folder cannot be made or written to."""
        path = self.path
        parent = path if path.exists() else nearest_folder(path)
        if not os.access(parent, os.W_OK):
            raise RunError(f"run.folder: no permission to write in {parent}; name another folder")
        if path.exists() and not path.is_dir():
            raise RunError(f"run.folder: {path} is a file; name a folder")

    def read_recipe(self) -> T | None:
        """The stored recipe, if there is one; raises `RunError` if it cannot be read."""
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
        """Raise `RunError` unless a run of this recipe may start or resume here.

        It may if nothing `is_begun`, or if all settings that are not free equal the stored ones.
        `holds` is what errors call the folder's content; `more` are further differences.
        """
        self._check_writable()
        stored = self.read_recipe()
        if stored is None:
            if is_begun:
                raise RunError(
                    f"{self.path}: holds {holds}, but no {RECIPE}; use another run.folder"
                )
            return
        changed = [
            difference
            for name, difference in differences(stored, recipe)
            if not self._is_free(name)
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
        """Make the folder and write the recipe; raises `RunError` if that fails."""
        write_recipe(self.recipe_file, recipe)

    def record_start(self, **facts: Any) -> None:
        """Append this start to the run's provenance."""
        record_provenance(self.path / PROVENANCE, **facts)


def write_recipe(file: Path, recipe: Any) -> None:
    """Write a recipe, making its folder if needed; raises `RunError` if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, to_yaml(recipe))
    except OSError as error:
        raise RunError(
            f"run.folder: cannot write to {file.parent} ({error.strerror}); name another folder"
        ) from error


def differences(before: Any, now: Any) -> list[tuple[str, str]]:
    """The settings in which two recipes differ: dotted names, each with a description."""
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
