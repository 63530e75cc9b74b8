"""A run's folder: whether it can be written, its stored recipe, and what may change on resuming."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from mhr_scale.errors import ConfigError, RunError
from mhr_scale.recipe.reading import load, to_yaml
from mhr_scale.recipe.settings import as_written
from mhr_scale.run.files import read_object, write_json, write_text
from mhr_scale.run.folders import nearest_folder
from mhr_scale.run.ownership import LOCK, owned
from mhr_scale.run.repositories import COMMIT_OF, name_of
from mhr_scale.run.runlog import log, record_provenance

T = TypeVar("T")

RECIPE, PROVENANCE, REJECTS = "config.yaml", "provenance.json", "rejects.jsonl"
#: What the run has read, by name, as texts that tell contents apart.
INPUTS = "inputs.json"
#: Changes the numbers of a run on a GPU, wherever the other settings of its part are free.
NEVER_FREE = ("run.deterministic",)
#: What marks a folder without a recipe as something else than the place for a new run: a backbone,
#: an adapter, other programs' results, or a run that has lost its recipe.
NOT_OURS = (
    "*.safetensors",
    "*.bin",
    "*.jsonl",
    "adapter*.json",
    "config.json",
    "export.yaml",
    "average.yaml",
    *("adapter", "averaged", "best", "jobs", "steps"),
    *("deepspeed.json", "inputs.json", "provenance.json"),
    *("analysis.json", "result.json", "summary.json"),
)
#: How many differing settings a message lists at most.
SHOWN = 3


class RunFolder(Generic[T]):
    """The folder of a run of one verb, whose recipes are of the type `schema`.

    `free` are settings that may differ when the run resumes: where and how fast, not what; a name
    that ends with a dot covers everything below it. `last` is the file that a run writes last,
    `recipe` the one that holds its recipe.
    """

    def __init__(
        self,
        path: Path | str,
        schema: type[T],
        *,
        free: Collection[str] = (),
        last: str | None = None,
        recipe: str = RECIPE,
    ) -> None:
        self.path = Path(path)
        self.schema = schema
        self.recipe_file = self.path / recipe
        self._free, self._last = tuple(free), last

    @property
    def is_complete(self) -> bool:
        """Whether the run has written its last file."""
        return self._last is not None and (self.path / self._last).is_file()

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

        It may in a new folder, and in its own one if nothing `is_begun` there, or if all settings
        that are not free equal the stored ones.
        `holds` is what errors call the folder's content; `more` are further differences.
        """
        check_writable(self.path)
        stored = self.read_recipe()
        if stored is None:
            foreign = sorted(name for pattern in NOT_OURS for name in self._names(pattern))
            if foreign:
                raise RunError(
                    f"{self.path}: holds {foreign[0]}, but no {self.recipe_file.name}: it is the "
                    "folder of something else; use another run.folder"
                )
            return
        changed = [
            difference
            for name, difference in differences(stored, recipe)
            if not self._is_free(name)
        ]
        changed += more
        if changed and is_begun:
            raise RunError(
                f"{self.path}: holds {holds} of other settings ({_listed(changed)}); {way_out}"
            )

    def _names(self, pattern: str) -> list[str]:
        return [path.name for path in self.path.glob(pattern)]

    def _is_free(self, name: str) -> bool:
        return name not in NEVER_FREE and any(
            name.startswith(free) if free.endswith(".") else name == free for free in self._free
        )

    def keep_recipe(self, recipe: T) -> None:
        """Make the folder and write the recipe; raises `RunError` if that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, to_yaml(recipe))
        except OSError as error:
            raise RunError(
                f"run.folder: cannot write to {self.path} ({error.strerror}); name another folder"
            ) from error

    def check_inputs(self, inputs: Mapping[str, str], *, is_begun: bool, holds: str) -> None:
        """Raise `RunError` if what a begun run has read is not what it would read now.

        `inputs` say what a run reads and what tells its content, both as text. Names that the run
        has not read before may be new, and another commit of the hub may hold the same content.
        """
        before = self._read_inputs() if is_begun else {}
        if before is None:
            log.warning(
                "%s: an earlier version, which did not write down what it read, began it; whether "
                "adapter, rows and backbone are still the same is not known",
                self.path,
            )
            return
        names = sorted(before.keys() & inputs.keys())
        changed = {
            name: f"{name} was {before[name]}, is {inputs[name]}"
            for name in names
            if before[name] != inputs[name]
        }
        if not changed:
            return
        told = _listed([*changed.values()])
        if all(name.startswith(COMMIT_OF) for name in changed):
            log.info("%s: %s, of the same content", self.path, told)
            return
        has_moved = any(name.startswith(COMMIT_OF) for name in changed)
        way_out = "name the commit that it was" if has_moved else "put back what it was made from"
        raise RunError(
            f"{self.path}: holds {holds} made from other content ({told}); use another run.folder, "
            f"or {way_out}"
        )

    def keep_inputs(self, inputs: Mapping[str, str], *, is_begun: bool) -> None:
        """Write down what the run reads, beside what it has read before if it `is_begun`."""
        before = (self._read_inputs() or {}) if is_begun else {}
        write_json(self.path / INPUTS, {**before, **inputs})

    def _read_inputs(self) -> dict[str, Any] | None:
        file = self.path / INPUTS
        way_out = "use another run.folder"
        return read_object(file, RunError, way_out=way_out) if file.exists() else None

    def record_start(self, **facts: Any) -> None:
        """Append this start to the run's provenance."""
        record_provenance(self.path / PROVENANCE, **facts)


def _listed(changed: Sequence[str]) -> str:
    return "; ".join(changed[:SHOWN]) + ("; ..." if len(changed) > SHOWN else "")


@contextmanager
def owned_folder(path: Path | str, *, way_out: str = "use another run.folder") -> Iterator[None]:
    """Own a run's folder inside the block; raises `RunError` naming another process that does."""
    folder = Path(path)
    check_writable(folder)
    with owned(folder / LOCK, way_out=way_out):
        yield


def check_writable(path: Path) -> None:
    """Raise `RunError` if the folder cannot be made, read or written to."""
    if path.exists() and not path.is_dir():
        raise RunError(f"run.folder: {path} is a file; name a folder")
    parent = path if path.exists() else nearest_folder(path)
    if not os.access(parent, os.W_OK):
        raise RunError(f"run.folder: no permission to write in {parent}; name another folder")
    if not os.access(parent, os.R_OK | os.X_OK):
        raise RunError(f"run.folder: no permission to read {parent}; name another folder")


def differences(before: Any, now: Any) -> list[tuple[str, str]]:
    """The settings in which two recipes differ: dotted names, each with a description.

    Revisions on the hub do not count: what was read is compared by content (`check_inputs`).
    """
    old, new = (dotted(yaml.safe_load(to_yaml(recipe))) for recipe in (before, now))
    return [
        (key, f"{key} was {as_written(old.get(key))}, is {as_written(new.get(key))}")
        for key in sorted(old.keys() | new.keys())
        if _without_revision(key, old) != _without_revision(key, new)
    ]


def _without_revision(key: str, settings: Mapping[str, Any]) -> Any:
    """A setting; of a place on the hub its name alone, for what it holds is compared by content."""
    value = settings.get(key)
    if key.rpartition(".")[2] == "revision":
        return None
    return name_of(value) if isinstance(value, str) else value


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
