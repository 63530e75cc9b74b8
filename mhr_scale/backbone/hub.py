"""Finding a backbone's files: built in, in a folder, or downloaded from the hub."""

import fnmatch
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mhr_scale.backbone.weight_files import SUFFIXES, choose_weights
from mhr_scale.errors import BackboneError, first_line

BUILTIN = {"builtin:toy": Path(__file__).parents[1] / "tasks" / "toy_backbone"}
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.bin")


def find_folder(
    name: str,
    revision: str | None,
    *,
    setting: str = "backbone.name",
    files: Sequence[str] = HUB_FILES,
) -> Path:
    """Local folder of a builtin, a path or a hub id, whose `files` are downloaded if needed.

    `setting` is the name of the setting in errors.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path if path.name else path.absolute()  # "." would be no name in errors
    if path.is_file():
        raise BackboneError(f"{setting}: {name} is a file; give the folder that it lies in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ":" in name:
        raise BackboneError(
            f"{setting}: no folder '{name}' (looked in {Path.cwd()}); "
            f"give a folder, a hub id or {', '.join(BUILTIN)}"
        )
    return _fetch(name, revision, setting=setting, patterns=files)


def _fetch(name: str, revision: str | None, *, setting: str, patterns: Sequence[str]) -> Path:
    """The local copy of a hub id, after downloading what it lacks.

    The hub is asked once, and in vain for `HF_HUB_ETAG_TIMEOUT` seconds at most; what was fetched
    before counts then. Downloads have the hub's own patience.
    """
    from huggingface_hub import (
        constants,
        get_cached_repo_tree,
        model_info,
        snapshot_download,
    )

    refusal: Exception | None = None
    repo_files: list[str] | None = None
    try:
        info = model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        repo_files = [file.rfilename for file in info.siblings or ()]
    except Exception as error:
        refusal = error
        with suppress(Exception):  # fetched by an earlier version of the hub's library
            repo_files = [file.path for file in get_cached_repo_tree(name, revision=revision)]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if repo_files is None else choose_files(repo_files, patterns),
                local_files_only=refusal is not None,
            )
        )
    except Exception as error:
        reason = refusal or error
        raise BackboneError(
            f"{setting}: '{name}' is no local folder and the hub does not give it "
            f"({type(reason).__name__}: {first_line(reason)}); "
            f"give a folder, a hub id or {', '.join(BUILTIN)}"
        ) from error


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
