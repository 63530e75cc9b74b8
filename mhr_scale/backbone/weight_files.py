"""The files of a backbone's weights: which of those that are there, and what an index says of them.

What is read is what transformers reads: safetensors before `.bin`, one file before shards.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mhr_scale.backbone.shards import INDEX as SAFETENSORS_INDEX
from mhr_scale.backbone.weights import AGAIN, PickledSource, SafetensorsSource, WeightSource
from mhr_scale.errors import BackboneError, some
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import log

BOTH = "fetch both again"
#: Endings of files in which weights of any kind lie.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
#: Files of these endings that hold no weights: what trainers write beside them.
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a format calls its one file, its shards and their index, and what reads them."""

    single: str
    index: str
    shard: re.Pattern[str]
    """Its groups are the number of the shard and of all shards."""
    reader: type[SafetensorsSource | PickledSource]


#: The preferred format first.
FORMATS = (
    Format(
        single="model.safetensors",
        index=SAFETENSORS_INDEX,
        shard=re.compile(r"model-(\d+)-of-(\d+)\.safetensors"),
        reader=SafetensorsSource,
    ),
    Format(
        single="pytorch_model.bin",
        index="pytorch_model.bin.index.json",
        shard=re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin"),
        reader=PickledSource,
    ),
)


def choose_weights(names: Collection[str]) -> tuple[Format, list[str]] | None:
    """The format and the files to read of those in a folder; an index is the first of its files.

    None if there are none: variants (`model.fp16.safetensors`) and adapters are no backbone.
    """
    for form in FORMATS:
        if form.single in names:
            return form, [form.single]
        shards = sorted(name for name in names if form.shard.fullmatch(name))
        if form.index in names:  # which may call its files otherwise
            suffix = Path(form.single).suffix
            return form, [form.index, *(shards or [n for n in names if n.endswith(suffix)])]
        if shards:
            return form, shards
    return None


def open_weights(folder: Path) -> WeightSource:
    """The weights of a folder; the log names files of weights that are not read.

    Raises `BackboneError` if files are missing, damaged, or not what the index says.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    others = sorted(name for name in names if name.endswith(SUFFIXES) and name not in NO_WEIGHTS)
    chosen = choose_weights(names)
    if chosen is None:
        known = ", ".join(name for form in FORMATS for name in (form.single, form.index))
        seen = f" ({some(others)}: rename the one that is the backbone)" if others else "; fetch it"
        raise BackboneError(f"{folder}: no weights by a name that is read, {known}{seen}")
    form, files = chosen
    if files[0] == form.index:
        source = _open_indexed(folder / form.index, form)
    else:
        _check_shards(folder, files, form)
        source = form.reader([folder / file for file in files])
    if not source.names():
        raise BackboneError(f"{folder / files[0]}: holds no tensor; {AGAIN}")
    read = {source.file(name) for name in source.names()}
    passed_over = [name for name in others if folder / name not in read]
    if passed_over:
        log.info("%s: weights from %s; not read: %s", folder, files[0], some(passed_over))
    return source


def _check_shards(folder: Path, files: list[str], form: Format) -> None:
    """Raise `BackboneError` unless shards without an index are all those of one backbone."""
    found = [match.groups() for match in map(form.shard.fullmatch, files) if match]
    numbers = [(int(number), int(total)) for number, total in found]
    n_shards = max((total for _, total in numbers), default=0)
    complete = all(pair == (number, n_shards) for number, pair in enumerate(numbers, 1))
    if not complete or len(numbers) != n_shards:
        raise BackboneError(
            f"{folder}: {some(files)} are not the {n_shards} shards of one backbone; fetch all of "
            "them, and keep no others"
        )


def _open_indexed(index: Path, form: Format) -> WeightSource:
    """The files that an index names, after checking that each tensor is in the file it names."""
    places = read_index(index)
    for name, file in places.items():
        if not (index.parent / file).is_file():
            n_more = sum(other == file for other in places.values()) - 1
            raise BackboneError(
                f"{index.parent / file}: missing, and {index.name} puts {name} and {n_more} more "
                "tensors there; fetch it"
            )
    source = form.reader([index.parent / file for file in sorted(set(places.values()))])
    for name in sorted(source.names() | places.keys()):
        if name not in source.names():
            file_path = index.parent / places[name]
            raise BackboneError(
                f"{file_path}: {name} is missing, which {index.name} puts there; {BOTH}"
            )
        holder = source.file(name)
        if name not in places:
            raise BackboneError(f"{holder}: holds {name}, which {index.name} does not know; {BOTH}")
        if holder.name != places[name]:
            raise BackboneError(
                f"{holder}: holds {name}, which {index.name} puts in {places[name]}; {BOTH}"
            )
    return source


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index as transformers writes it.

    Raises `BackboneError` if it is not an index, or names a file outside its folder.
    """
    places = read_object(index, BackboneError).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BackboneError(
            f"{index}: no weight_map here, which names the file of each tensor; {AGAIN}"
        )
    for name, file in places.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise BackboneError(
                f"{index}: {name} is in {file!r}, which is no file beside the index; {AGAIN}"
            )
    return places
