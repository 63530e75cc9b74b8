"""What tells backbones apart by content, without reading all of it."""

import json
from collections.abc import Iterator
from pathlib import Path

from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.errors import BackboneError
from mhr_scale.run.files import hash_parts, read_object

BLOCK, N_BLOCKS = 4096, 256
#: Fields of a configuration that depend on who wrote it, and when.
WRITER = ("_name_or_path", "transformers_version")


def identify(blueprint: Blueprint) -> str:
    """A hash of a backbone's configuration and of samples of its weights.

    Of every file of weights count its size and blocks at equal distances: another checkpoint
    differs in all of them; one in which few numbers were changed by hand may not.
    """
    if blueprint.folder is None:
        parts: list[str | bytes] = [json.dumps(blueprint.facts, sort_keys=True, default=str)]
        return hash_parts(parts)[:16]
    config = read_object(blueprint.folder / "config.json", BackboneError)
    fields = {name: value for name, value in config.items() if name not in WRITER}
    parts = [json.dumps(fields, sort_keys=True)]
    source = blueprint.source
    files = {file for name in source.names() if (file := source.file(name)) is not None}
    for file in sorted(files):
        parts += [file.name, *_samples(file)]
    return hash_parts(parts)[:16]


def _samples(file: Path) -> Iterator[str | bytes]:
    size = file.stat().st_size
    yield str(size)
    with file.open("rb", buffering=0) as opened:
        for number in range(N_BLOCKS):
            opened.seek(size * number // N_BLOCKS)
            yield opened.read(BLOCK)
