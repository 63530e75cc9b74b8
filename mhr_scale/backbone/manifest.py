"""`mhr_scale.json` in a converted backbone's folder: its files, and checks of them.

Names and sizes are checked whenever the folder is opened, which reads headers only; hashes on
request.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhr_scale.backbone.shards import FileFacts, first_cut
from mhr_scale.backbone.weights import WeightSource
from mhr_scale.errors import BackboneError, describe_fault
from mhr_scale.run.files import hash_file, read_object, write_json
from mhr_scale.run.runlog import ByteProgress

MANIFEST = "mhr_scale.json"
SCHEMA = 2
WAY_OUT = "copy the folder again, or convert anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Some logits of a backbone, computed in float32 from the weights as they are stored.

    Shape letters: B rows, L tokens, V entries of the vocabulary.
    """

    inputs: list[list[int]]
    targets: list[list[int]]
    """What follows each input; no logit depends on its last token."""
    vocabulary: list[int]
    """The entries of the vocabulary whose logits are kept."""
    logits: list[list[list[float]]]
    """(B, L, V), for every row and target position."""
    norms: list[list[float]]
    """(B, L), over the whole vocabulary."""
    noise: float
    """How far a computation in bfloat16 is from these logits, as a share of their spread; of
    quantised weights, one by bitsandbytes."""
    distance: float = 0.0
    """How far that computation is from the logits of the weights before they were quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of a converted folder, and what it was converted from."""

    schema: int
    source: dict[str, Any]
    """Name, revision and folder of what was converted, and the sizes of its weight files."""
    dtype: str
    """Data type of the weights, apart from quantised ones."""
    tied: dict[str, str]
    """Tied names, and the name that their tensor is stored under."""
    left_out: list[str]
    """Tensors of the source that the model does not use."""
    files: dict[str, FileFacts]
    fingerprint: Fingerprint
    quantise: str = "none"
    """How the linears in the blocks are stored: `none`, `int8` or `nf4`."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `mhr_scale.json`."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """A folder's `mhr_scale.json`, if it has one; raises `BackboneError` if it cannot be used."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    raw = read_object(file, BackboneError, way_out=WAY_OUT)
    schema = raw.get("schema")
    if schema != SCHEMA:
        raise BackboneError(
            f"{file}: schema {schema!r}, this version reads {SCHEMA}; convert the backbone anew"
        )
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Manifest).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        description = describe_fault(fault, fault["loc"])
        raise BackboneError(f"{file}: {description}; {WAY_OUT}") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise `BackboneError` if a file is missing or has another size than it was written with."""
    for name, facts in manifest.files.items():
        file = folder / name
        if name != Path(name).name:
            raise BackboneError(f"{folder / MANIFEST}: {name!r} is no file beside it; {WAY_OUT}")
        if not file.is_file():
            raise BackboneError(f"{file}: missing, and {MANIFEST} lists it; {WAY_OUT}")
        size = file.stat().st_size
        if size != facts.bytes:
            cut = first_cut(file) if file.suffix == ".safetensors" else None
            raise BackboneError(
                f"{file}: {size} bytes, {MANIFEST} says {facts.bytes}"
                f"{f' ({cut})' if cut else ''}; {WAY_OUT}"
            )


def check_weights(
    folder: Path, manifest: Manifest, source: WeightSource, ties: dict[str, str], kind: str
) -> None:
    """Raise `BackboneError` if the weights are not what was written: names, files, ties, data type.

    `ties` and `kind`, how linears are quantised, are those found in the weights themselves.
    """
    if kind != manifest.quantise:
        raise BackboneError(
            f"{folder / MANIFEST}: says quantise {manifest.quantise}, weights and config.json "
            f"{kind}; {WAY_OUT}"
        )
    for name in sorted(source.names()):
        file = source.file(name)
        assert file is not None
        if file.name not in manifest.files:
            raise BackboneError(f"{file}: holds {name}, and {MANIFEST} does not know the file")
        if name in manifest.tied:
            raise BackboneError(
                f"{file}: holds {name}, which {MANIFEST} says is {manifest.tied[name]}; {WAY_OUT}"
            )
        dtype = str(source.dtype(name)).removeprefix("torch.")
        if dtype != manifest.dtype:
            raise BackboneError(
                f"{file}: {name} is {dtype}, {MANIFEST} says {manifest.dtype}; {WAY_OUT}"
            )
    for name, target in manifest.tied.items():
        if target not in source.names():
            raise BackboneError(f"{folder}: {name} is {target}, which is missing; {WAY_OUT}")
    for name in sorted(ties.keys() ^ manifest.tied.keys()):
        if name not in source.names() | manifest.tied.keys():
            raise BackboneError(
                f"{folder}: {name} is missing, and {MANIFEST} ties it to no other; {WAY_OUT}"
            )
        recorded = manifest.tied.get(name, "a tensor of its own")
        raise BackboneError(
            f"{folder / MANIFEST}: says that {name} is {recorded}, the weights say "
            f"{ties.get(name, 'a tensor of its own')}; {WAY_OUT}"
        )


def hash_files(files: dict[str, Path], *, what: str) -> dict[str, FileFacts]:
    """Sizes and hashes of files by name; every byte is read, under a progress bar."""
    total = sum(file.stat().st_size for file in files.values())
    progress = ByteProgress(total, what=what)
    facts = {
        name: FileFacts(bytes=file.stat().st_size, sha256=hash_file(file, advance=progress.add))
        for name, file in files.items()
    }
    progress.close()
    return facts


def verify_hashes(folder: Path, manifest: Manifest) -> None:
    """Raise `BackboneError` if a file is not, bit for bit, what was written."""
    actual = hash_files({name: folder / name for name in manifest.files}, what="verify")
    for name, facts in manifest.files.items():
        if actual[name] != facts:
            raise BackboneError(
                f"{folder / name}: its bytes are not those that were written (sha256 "
                f"{actual[name].sha256[:12]}..., {MANIFEST} says {facts.sha256[:12]}...); {WAY_OUT}"
            )
