"""`export.json` of an exported folder: what was exported from what, and which files it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhr_scale.config import ExportConfig
from mhr_scale.errors import ConfigError, RunError, some
from mhr_scale.exchange.model_card import NAME as CARD
from mhr_scale.recipe.reading import load
from mhr_scale.recipe.typed import check_fields
from mhr_scale.run.files import hash_file, read_object, write_json, write_text
from mhr_scale.run.run_folder import differences

RECIPE, RECORD = "export.yaml", "export.json"
#: Settings that do not change what is exported.
FREE = ("hub", "licence", "check", "folder", "backbone_moved_to")
WAY_OUT = "name another folder, or empty it to export anew"
FIELDS = {"adapter": str, "content": str, "backbone": dict, "files": dict, "card": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The contents of `export.json`."""

    adapter: str
    """The adapter that was exported from; of the hub with its commit."""
    content: str
    """What tells its content (`artefact.digest`)."""
    backbone: dict[str, Any]
    files: dict[str, int]
    """Bytes of every file but the card and this one."""
    card: str
    """sha256 of the model card, as it was written: a changed one is the user's own."""


def write_record(
    folder: Path, *, adapter: str, content: str, backbone: Mapping[str, Any], card: str
) -> None:
    """Write the model card, and the record of what lies in the folder."""
    write_text(folder / CARD, card)
    own = (CARD, RECORD)
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    record = {
        "adapter": adapter,
        "content": content,
        "backbone": dict(backbone),
        "files": {name: p.stat().st_size for name, p in files.items() if name not in own},
        "card": hash_file(folder / CARD),
    }
    write_json(folder / RECORD, record)


def read_record(config: ExportConfig) -> Record | None:
    """The record of a folder that the recipe has filled before; None if there is nothing to push.

    Raises `RunError` if other settings have filled it, or if it is not whole any more.
    """
    folder = Path(config.folder)
    if config.hub is None or not (folder / RECORD).is_file():
        return None
    raw = read_object(folder / RECORD, RunError, way_out=WAY_OUT)
    try:
        check_fields(raw, FIELDS, name="export")
        before = load(ExportConfig, folder / RECIPE)
    except (TypeError, ConfigError) as error:
        raise RunError(f"{folder / RECORD}: not a record of an export ({error})") from error
    record = Record(**{name: raw[name] for name in FIELDS})
    changed = [said for name, said in differences(before, config) if not name.startswith(FREE)]
    if changed:
        raise RunError(
            f"folder: {folder} was exported with other settings ({some(changed, shown=3)}); "
            f"{WAY_OUT}"
        )
    for name, n_bytes in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != n_bytes:
            raise RunError(f"{file}: not what was exported ({n_bytes} bytes); {WAY_OUT}")
    return record


def renew_card(folder: Path, record: Record, card: str) -> None:
    """Write the card anew, where it is still the one that was written."""
    if not (folder / CARD).is_file() or hash_file(folder / CARD) == record.card:
        write_text(folder / CARD, card)
        raw = read_object(folder / RECORD, RunError)
        write_json(folder / RECORD, {**raw, "card": hash_file(folder / CARD)})
