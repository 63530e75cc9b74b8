"""Finding a backbone's files: built in, in a folder, or downloaded from the hub."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from mhr_scale.errors import BackboneError, first_line

BUILTIN = {"builtin:toy": Path(__file__).parents[1] / "tasks" / "toy_backbone"}
TOKENIZER_FILES = ("*.json", "*.model", "*.txt")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
HUB_FILES = (*TOKENIZER_FILES, *WEIGHT_FILES)


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
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ":" in name:
        raise BackboneError(
            f"{setting}: no folder '{name}' (looked in {Path.cwd()}); "
            f"give a folder, a hub id or {', '.join(BUILTIN)}"
        )
    from huggingface_hub import snapshot_download

    try:
        chosen = choose_files(name, revision, files)
        return Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
    except Exception as error:
        raise BackboneError(
            f"{setting}: '{name}' is no local folder and the hub does not give it "
            f"({type(error).__name__}: {first_line(error)}); "
            f"give a folder, a hub id or {', '.join(BUILTIN)}"
        ) from error


def choose_files(name: str, revision: str | None, patterns: Sequence[str]) -> list[str]:
    """The files of a hub id to download: those that match a pattern, weights in one format only.

    Most hub ids hold their weights in several formats. If the hub cannot be reached the patterns
    themselves are returned, and files in the local cache are used.
    """
    from huggingface_hub import list_repo_files

    try:
        repo_files = list_repo_files(name, revision=revision)
    except Exception:
        return list(patterns)
    chosen = [
        file
        for file in repo_files
        if "/" not in file and any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]
    if any(file.endswith(".safetensors") for file in chosen):
        chosen = [file for file in chosen if ".bin" not in file]
    return chosen
