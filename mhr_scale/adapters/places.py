"""Where an adapter lies: in a folder or file here, or, by a name with a revision, on the hub."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import AdapterError, some
from mhr_scale.run import repositories
from mhr_scale.run.repositories import Found, Place

#: What is fetched of a run or adapter folder: adapters of any format, the recipe, trained weights.
FILES = ("adapter*.json", "adapter*.safetensors", "adapter*.bin", "backbone.safetensors")
BESIDE = ("mhr_scale.json", "config.yaml", "result.json")
#: Folders of a run that hold adapters.
FOLDERS = ("", "adapter", "averaged/*")
WAY_OUT = "give a folder, or owner/name@revision:folder of the hub"


def find_place(path: Path | str) -> Found:
    """The folder or file of an adapter; of the hub it is fetched, as it is there now.

    Raises `AdapterError` if the hub does not give it.
    """
    text = str(path)
    return repositories.find(text, lambda place: _fetch(text, place))


def hint(text: str) -> str:
    """What helps if a name that is no path was meant to be one of the hub."""
    place = repositories.parse(text)
    if place is None or "/" not in place.id or repositories.is_here(text):
        return ""
    return f"; of the hub, write {repositories.joined(text, place.revision or repositories.MAIN)}"


def _fetch(text: str, place: Place) -> Found:
    def choose(files: Sequence[str]) -> list[str]:
        chosen = choose_files(files)
        if not chosen:
            deeper = sorted({file.rpartition("/")[0] for file in files if _is_adapter(file)})
            there = f"; its folders {some(deeper)} hold adapters" if deeper else ""
            raise AdapterError(f"{text}: no adapter in that repository's folder{there}; {WAY_OUT}")
        return chosen

    return repositories.fetch(place, choose, what=text, error=AdapterError, way_out=WAY_OUT)


def choose_files(files: Sequence[str]) -> list[str]:
    """The files to fetch of a folder that holds an adapter, or a run that does; none of another.

    Of tensors in two formats the pickled ones are left.
    """
    patterns = [f"{folder}/{name}" if folder else name for folder in FOLDERS for name in FILES]
    chosen = [file for file in files if any(_fits(file, pattern) for pattern in patterns)]
    safe = {file.replace(".safetensors", ".bin") for file in chosen if file.endswith("s")}
    chosen = [file for file in chosen if file not in safe]
    if not any(map(_is_adapter, chosen)):
        return []
    own = {file.rpartition("/")[0] for file in chosen}
    beside = [f"{folder}/{name}" if folder else name for folder in {*own, ""} for name in BESIDE]
    return [*chosen, *sorted(set(files) & set(beside))]


def _fits(file: str, pattern: str) -> bool:
    """Whether a name fits a pattern, of which `*` is no more than one folder."""
    return file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern)


def _is_adapter(file: str) -> bool:
    return file.rpartition("/")[2] in ("adapter.json", "adapter_config.json")
