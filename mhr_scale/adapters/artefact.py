"""The artefact: `adapter.safetensors` (unsharded float32 tensors, strict names) and `adapter.json`.

Tensors are stored per linear, `<linear>.A`, `<linear>.B` or `<linear>.l`, and per routing group,
`<group>.routing_logits` of shape (T, Q, S). The JSON file holds what is needed to rebuild the
adapter without the recipe, and the hash of the tensor file, so that files of different saves are
never read as a pair.
"""

import filecmp
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mhr_scale.adapters import CARD
from mhr_scale.adapters.config import AdapterConfig
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.methods import Adapter, attach
from mhr_scale.adapters.places import find_place, hint
from mhr_scale.adapters.sites import Site, find_sites
from mhr_scale.adapters.wrapping import check_bare, detach
from mhr_scale.errors import AdapterError, LayoutError, UserError
from mhr_scale.recipe import typed
from mhr_scale.run.files import as_json, flush, hash_file, hash_parts, read_object
from mhr_scale.run.tensors import save_tensors

SCHEMA = 1
TENSORS = "adapter.safetensors"
#: Far longer than a save takes to move its second file into place after the first.
SAVING_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The contents of `adapter.json`."""

    adapter: AdapterConfig
    sites: tuple[Site, ...]
    task_names: tuple[str, ...]
    step: int = 0
    backbone: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The data types in which the adapter's numbers were stored before they were read here.

        They are held in float32 all the same; what an earlier rounding has lost is lost.
        """
        return str(self.origin.get("dtype", "float32"))


def named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All stored tensors by name; views into the adapter's parameters."""
    tensors = dict(adapter.inventory.named_tensors())
    if adapter.routing_logits is not None:
        for number, group in enumerate(adapter.groups):
            tensors[f"{group}.routing_logits"] = adapter.routing_logits.data[:, number]
    return tensors


def save(
    adapter: Adapter,
    folder: Path | str,
    *,
    step: int = 0,
    backbone: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Write the artefact into `folder` (made if missing) and return the folder.

    Each file is replaced atomically, the card right after the tensors, whose hash it has. There is
    one metadata entry, because the order of several would vary: the same adapter gives the same
    bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in named_tensors(adapter).items()
    }
    partial = folder / f".{TENSORS}.tmp"
    save_tensors(tensors, partial, metadata={"schema": f"mhr_scale {SCHEMA}"})
    digest = hash_file(partial)
    card = {
        "schema": SCHEMA,
        "method": adapter.config.method,
        "step": step,
        "adapter": asdict(adapter.config),
        "task_names": list(adapter.task_names),
        "backbone": dict(backbone or {}),
        "origin": dict(origin or {}),
        "sites": [asdict(site) for site in adapter.sites],
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
        "sha256": digest,
    }
    (folder / f".{CARD}.tmp").write_text(as_json(card), encoding="utf-8")
    put_pair_in_place(folder)
    return folder


def put_pair_in_place(folder: Path) -> None:
    """Move both partial files into place, one right after the other."""
    partials = {name: folder / f".{name}.tmp" for name in (TENSORS, CARD)}
    for partial in partials.values():
        flush(partial)
    for name, partial in partials.items():
        os.replace(partial, folder / name)


def copy(source: Path, target: Path) -> None:
    """Copy an artefact into another folder, as atomically as `save`; a no-op if it is there."""
    names = (TENSORS, CARD)
    if all(
        (target / name).is_file() and filecmp.cmp(source / name, target / name, shallow=False)
        for name in names
    ):
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / f".{name}.tmp")
    put_pair_in_place(target)


def find(path: Path | str) -> Path:
    """Return the folder that holds the artefact: `path` itself, or a run folder's `adapter/`.

    `path` may be a place on the hub (`find_place`), which is then fetched.
    """
    path = find_place(path).path
    for folder in (path, path / "adapter"):
        if (folder / CARD).is_file():
            return folder
    way_out = f"name a run or an adapter{hint(str(path))}"
    raise AdapterError(f"{path}: no {CARD} here or in {path / 'adapter'}; {way_out}")


def read_card(path: Path | str) -> Card:
    """Read `adapter.json`; raises `AdapterError` if it is missing, broken or of another schema."""
    file = find(path) / CARD
    return _make_card(read_object(file, AdapterError), file)


def _make_card(card: dict[str, Any], file: Path) -> Card:
    """The card in parsed JSON; raises `AdapterError` if it is none, or of another schema."""
    try:
        if card["schema"] != SCHEMA:
            raise AdapterError(f"{file}: schema {card['schema']}, this version reads {SCHEMA}")
        return _build_card(card)
    except AdapterError:
        raise
    except UserError as error:
        raise AdapterError(f"{file}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file}: not a readable adapter card ({error!r})") from error


def _build_card(card: dict[str, Any]) -> Card:
    """Build the card from parsed JSON; raises `KeyError`, `TypeError` or `ConfigError`."""
    sites = [typed.build(Site, site, name=f"sites.{n}") for n, site in enumerate(card["sites"])]
    names, origin = card["task_names"], card["origin"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("task_names are no list of names")
    if type(card["step"]) is not int:
        raise TypeError(f"step is {card['step']!r}")
    for key in ("backbone", "origin"):
        if not isinstance(card[key], dict):
            raise TypeError(f"{key} is {card[key]!r}, no object")
    for key in ("format", "backbone", "dtype"):
        if not isinstance(origin.get(key, ""), str):
            raise TypeError(f"origin.{key} is {origin[key]!r}")
    return Card(
        adapter=typed.build(AdapterConfig, card["adapter"], name="adapter"),
        sites=tuple(sites),
        task_names=tuple(names),
        step=card["step"],
        backbone=card["backbone"],
        origin=origin,
    )


def load(path: Path | str, *, model: nn.Module | None = None) -> Adapter:
    """Load an artefact strictly; with `model`, attach it there.

    `path` is an adapter folder or a run folder, or `owner/name@revision` of the hub, a folder in it
    after a `:`. Raises `AdapterError` if a tensor is missing,
    extra, of another shape or not finite, if the files do not belong together, or if the
    adapter was made for a backbone with other linears.
    """
    return read(path, model=model)[1]


def read(path: Path | str, *, model: nn.Module | None = None) -> tuple[Card, Adapter]:
    """An artefact's card and its adapter, of the same save, as `load` loads it."""
    folder = find(path)
    card, tensors = _read_pair(folder)
    place = str(folder / TENSORS)
    check_size(card.adapter, card.sites, len(card.task_names), tensors, place=str(folder / CARD))
    if model is None:
        try:
            adapter = Adapter(card.adapter, card.sites, task_names=card.task_names)
        except UserError as error:
            raise AdapterError(f"{folder / CARD}: {error}") from error
        load_tensors(adapter, tensors, place=place)
        return card, adapter
    check_bare(model)
    check_backbone(folder, card, model)
    adapter = attach(model, card.adapter, tasks=card.task_names)
    try:
        load_tensors(adapter, tensors, place=place)
    except AdapterError:
        detach(model)
        raise
    return card, adapter


def digest(adapter: Adapter) -> str:
    """What tells adapters apart by content: a hash of settings, names of tasks and tensors."""
    settings = [asdict(adapter.config), [asdict(site) for site in adapter.sites]]
    tensors = named_tensors(adapter)
    parts: list[str | bytes] = [json.dumps([*settings, list(adapter.task_names)], sort_keys=True)]
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        parts += [name, tensor.numpy().tobytes()]
    return hash_parts(parts)[:16]


def check_size(
    config: AdapterConfig,
    sites: Sequence[Site],
    n_tasks: int,
    tensors: Mapping[str, Tensor],
    *,
    place: str,
) -> None:
    """Raise `AdapterError` if a card describes an adapter far larger than its stored tensors.

    Called before the adapter is allocated, so that a damaged card cannot exhaust the memory.
    """
    widths = sum(abs(site.in_features) + abs(site.out_features) for site in sites)
    pairs = config.n_skills * (n_tasks if config.private else 1)
    needed = widths * pairs * config.rank + n_tasks * len(sites) * config.n_splits * config.n_skills
    stored = sum(tensor.numel() for tensor in tensors.values())
    if needed > 1000 * (stored + 1000) or any(
        min(site.in_features, site.out_features) < 1 for site in sites
    ):
        raise AdapterError(
            f"{place}: describes an adapter of up to {needed} numbers, {stored} are stored"
        )


@torch.no_grad()
def load_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], *, place: str) -> None:
    """Copy `tensors` into `adapter`, all or nothing; `place` names their source in errors."""
    targets = named_tensors(adapter)
    faults = [f"missing {name}" for name in targets.keys() - tensors.keys()]
    faults += [f"unknown {name}" for name in tensors.keys() - targets.keys()]
    for name in targets.keys() & tensors.keys():
        if targets[name].shape != tensors[name].shape:
            faults.append(f"{name} is {list(tensors[name].shape)}, not {list(targets[name].shape)}")
        elif not bool(tensors[name].isfinite().all()):
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        listed = "; ".join(sorted(faults)[:5])
        raise AdapterError(f"{place}: {len(faults)} tensor(s) do not fit: {listed}")
    for name, target in targets.items():
        target.copy_(tensors[name])


def _read_pair(folder: Path) -> tuple[Card, dict[str, Tensor]]:
    """Both files of one save, though a run may be saving here meanwhile.

    What does not fit together is damage only where it stays as it is.
    """
    while True:
        before = _state(folder)
        try:
            text = read_object(folder / CARD, AdapterError)
            card, tensors = _make_card(text, folder / CARD), _read_tensors(folder, text)
        except AdapterError:
            time.sleep(SAVING_SECONDS)
            if _state(folder) == before:
                raise
            continue
        if _state(folder) == before:
            return card, tensors


def _state(folder: Path) -> list[tuple[int, ...]]:
    """What changes when a file of the pair is replaced."""
    facts = [(folder / name).stat() for name in (TENSORS, CARD) if (folder / name).exists()]
    return [(fact.st_ino, fact.st_size, fact.st_mtime_ns) for fact in facts]


def _read_tensors(folder: Path, card: Mapping[str, Any]) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        raise AdapterError(f"{file}: missing, though {CARD} is there; copy the folder whole")
    if hash_file(file) != card.get("sha256"):
        raise AdapterError(
            f"{file}: its hash is not the one in {CARD}: it is damaged, or the two files come "
            "from different saves; take both from one complete folder under steps/"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a safetensors file ({error}); copy it again") from error


def check_backbone(folder: Path, card: Card, model: nn.Module) -> None:
    """Raise `AdapterError` if the model's linears are not those the adapter was made for."""
    try:
        sites = find_sites(model, card.adapter.layout, card.adapter.blocks)
    except LayoutError as error:
        raise AdapterError(f"{folder}: made for another backbone: {error}") from error
    if sites == card.sites:
        return
    widths = {site.name: (site.in_features, site.out_features) for site in sites}
    for site in card.sites:
        if widths.get(site.name) != (site.in_features, site.out_features):
            actual = widths.get(site.name, "nothing")
            raise AdapterError(
                f"{folder}: made for another backbone: {site.name} is "
                f"{(site.in_features, site.out_features)} there, {actual} here "
                f"({len(card.sites)} linears there, {len(sites)} here); trained on "
                f"{card.backbone.get('name') or 'random weights'}"
            )
    raise AdapterError(
        f"{folder}: made for another backbone: layout '{Layout.of(card.adapter).text}' has "
        f"{len(card.sites)} linears there, {len(sites)} here"
    )
