"""PEFT folders: writing and reading LoRA, (IA)3 and Poly; and one loader for every format.

Shape letters: T tasks, Q splits, S skills, I and O features of one split, R rank.

Tensors are named and shaped as stock PEFT writes and loads them (`peft_files`): lora_A.weight
(R, I), lora_B.weight (O, R); ia3_l (O, 1), or (1, I) where it scales inputs; poly_lora_A
(Q, S, I, R), poly_lora_B (Q, S, R, O), poly_router.module_logits (T, Q * S).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import artefact
from mhr_scale.adapters.layouts import Layout
from mhr_scale.adapters.library import check_fixed
from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.peft_files import (
    CONFIG,
    NOTE,
    PREFIX,
    TENSORS,
    base_of,
    find_tensors,
    read_config,
    read_note,
    read_stored,
    refusal,
    rename,
    split_base,
)
from mhr_scale.adapters.peft_singles import (
    check_targets,
    complete_pairs,
    to_outputs,
    to_pairs,
)
from mhr_scale.adapters.places import find_place, hint
from mhr_scale.adapters.rebuilding import (
    FindSizes,
    fill,
    find_layout,
    local_sizes,
    name_tasks,
    precision_of,
    widths_of,
)
from mhr_scale.adapters.reference_checkpoints import PICKLED, open_published
from mhr_scale.adapters.sites import Site, backbone_width, family_of_sites
from mhr_scale.errors import AdapterError
from mhr_scale.families.linear_names import are_transposed
from mhr_scale.families.table import family_of_linears
from mhr_scale.run import repositories
from mhr_scale.run.files import put_in_place, read_object, write_json
from mhr_scale.run.tensors import save_tensors

SINGLE = "average it or collapse one task, and write that as a single adapter"

#: Policies that PEFT's Poly evaluates as we do.
PEFT_POLICIES = ("learned", "noisy")


# --- writing


def write_peft_lora(adapter: Adapter, folder: Path | str, *, base_model: str | None) -> Path:
    """Write a single LoRA as a stock PEFT LoRA folder, float32, and return the folder.

    Raises `AdapterError` if the adapter is anything but one low-rank pair per linear.
    """
    _check_single(adapter, folder, kind="lora")
    alpha = float(adapter.config.alpha)
    tensors = {
        f"{PREFIX}{linear}.lora_{side}.weight": tensor[0, 0].T
        for linear, side, tensor in _stored(adapter)
    }
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": family_of_sites(adapter.sites).peft_task_type,
        "r": adapter.config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "fan_in_fan_out": are_transposed(site.name for site in adapter.sites),
    }
    return _write(adapter, folder, tensors, settings, base_model)


def write_peft_ia3(adapter: Adapter, folder: Path | str, *, base_model: str | None) -> Path:
    """Write a single (IA)3 adapter as a stock PEFT IA3 folder, float32, and return the folder.

    Our vectors scale outputs, so no module is a feed-forward one in PEFT's sense.
    """
    _check_single(adapter, folder, kind="ia3")
    tensors = {
        f"{PREFIX}{linear}.ia3_l": tensor[0, 0][:, None] for linear, _, tensor in _stored(adapter)
    }
    settings: dict[str, Any] = {
        "peft_type": "IA3",
        "task_type": family_of_sites(adapter.sites).peft_task_type,
        "feedforward_modules": [],
        "fan_in_fan_out": are_transposed(site.name for site in adapter.sites),
    }
    return _write(adapter, folder, tensors, settings, base_model)


def write_peft_poly(adapter: Adapter, folder: Path | str, *, base_model: str | None) -> Path:
    """Write an inventory and its routing as a stock PEFT Poly folder, and return the folder.

    PEFT scales by 1 / rank: alpha is folded into B. Its training draws noise whatever the policy
    here was; in evaluation its logits equal ours. Raises `AdapterError` for what PEFT's Poly
    lacks: other policies than learned and noisy, routing shared between linears, (IA)3.
    """
    config = adapter.config
    shared = f"routing tables are shared by {config.granularity}, PEFT has one per linear"
    reasons = {
        "PEFT has one inventory for all tasks": config.private,
        "PEFT mixes low-rank pairs only": config.kind != "lora",
        "there is nothing to route": not config.is_routed,
        f"PEFT has no policy '{config.policy}'": config.policy not in PEFT_POLICIES,
        shared: config.granularity != "linear",
        "PEFT adapts usual linears only, no Conv1D": are_transposed(s.name for s in adapter.sites),
    }
    for reason, applies in reasons.items():
        if applies:
            raise AdapterError(
                f"cannot write {config.method} to {folder} as PEFT Poly: {reason}; {SINGLE}"
            )
    tensors = {}
    for linear, side, tensor in _stored(adapter):
        if side == "routing_logits":
            tensors[f"{PREFIX}{linear}.poly_router.module_logits"] = tensor.flatten(1)
        else:
            scaled = tensor * config.alpha if side == "B" else tensor
            tensors[f"{PREFIX}{linear}.poly_lora_{side}"] = scaled
    settings: dict[str, Any] = {
        "peft_type": "POLY",
        "task_type": family_of_sites(adapter.sites).peft_task_type,
        "r": config.rank,
        "n_tasks": len(adapter.task_names),
        "n_skills": config.n_skills,
        "n_splits": config.n_splits,
        "poly_type": "poly",
    }
    return _write(adapter, folder, tensors, settings, base_model)


def _check_single(adapter: Adapter, folder: Path | str, *, kind: str) -> None:
    """Raise `AdapterError` unless the adapter is one pair, or one vector, per linear."""
    check_fixed(adapter)
    config = adapter.config
    target = {"lora": "a PEFT LoRA", "ia3": "a PEFT IA3"}[kind]
    if config.private or config.is_routed:
        raise AdapterError(
            f"cannot write {config.method} to {folder} as {target}: it is no single adapter; "
            f"{SINGLE}"
        )
    if config.kind != kind:
        writer = {"lora": "write_peft_lora", "ia3": "write_peft_ia3"}[config.kind]
        raise AdapterError(
            f"cannot write {config.method} to {folder} as {target}; {writer} writes this kind"
        )


def _stored(adapter: Adapter) -> Iterator[tuple[str, str, Tensor]]:
    """Linear (or routing group), side and float32 tensor of everything the adapter stores."""
    for name, tensor in artefact.named_tensors(adapter).items():
        linear, _, side = name.rpartition(".")
        yield linear, side, tensor.detach().to("cpu", torch.float32)


def _write(
    adapter: Adapter,
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    base_model: str | None,
) -> Path:
    """Write the three files; the configuration last, since it makes the folder an adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    partial = folder / f".{TENSORS}.tmp"
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, partial, metadata={"format": "pt"})
    put_in_place(partial, folder / TENSORS)
    width = backbone_width(adapter.sites)
    base, base_folder = split_base(base_model)
    note = {
        **base_folder,
        "task_names": list(adapter.task_names),
        "policy": adapter.config.policy,
        "temperature": float(adapter.config.temperature),
        **({} if width is None else {"width": width}),
        "blocks": adapter.config.blocks,
        **_reads(adapter),
    }
    config = {
        **settings,
        **base,
        "inference_mode": True,
        "target_modules": [site.name for site in adapter.sites],
    }
    write_json(folder / NOTE, note)
    write_json(folder / CONFIG, config)
    return folder


def _reads(adapter: Adapter) -> dict[str, dict[str, int]]:
    """How much linears read that have a vector, which tells how much they write alone."""
    if adapter.config.kind == "lora":
        return {}
    return {"reads": {site.name: site.in_features for site in adapter.sites}}


# --- reading


def read_peft_lora(folder: Path | str, *, sizes: FindSizes = local_sizes) -> Adapter:
    """Read a stock PEFT LoRA folder; raises `AdapterError` for what one LoRA cannot express.

    Ranks and scales may differ between linears, and linears be left out (`peft_singles`), where
    `sizes` finds the backbone.
    """
    return _read_lora(Path(folder), sizes)[0]


def _read_lora(folder: Path, sizes: FindSizes) -> tuple[Adapter, dict[str, Any]]:
    """The LoRA of a folder, and what its card has to say of its origin."""
    config = read_config(folder, "LORA", numbers=("r", "lora_alpha"))
    stored, file = read_stored(folder), find_tensors(folder)
    tensors = rename(stored, r"lora_(?P<side>[AB])\.weight", file)
    pairs = to_pairs(tensors, config, folder)
    pairs, layout = complete_pairs(pairs, config, folder, sizes)
    fields = {"rank": pairs.rank, "alpha": pairs.alpha, "n_skills": 1}
    adapter = _build(folder, pairs.tensors, fields, layout=layout)
    check_targets(tensors, config, folder)
    return adapter, {"dtype": precision_of(stored), **pairs.facts}


def read_peft_ia3(
    folder: Path | str, *, width: int | None = None, sizes: FindSizes = local_sizes
) -> Adapter:
    """Read a stock PEFT IA3 folder; vectors that scale inputs move to the outputs they scale.

    The vectors do not tell the width of the backbone: it comes from `width`, from `mhr_scale.json`,
    or from the configuration of the backbone that `sizes` finds.
    """
    return _read_ia3(Path(folder), width, sizes)[0]


def _read_ia3(folder: Path, width: int | None, sizes: FindSizes) -> tuple[Adapter, dict[str, Any]]:
    config = read_config(folder, "IA3")
    stored, file = read_stored(folder), find_tensors(folder)
    note = read_note(folder)
    width = width or note.get("width")
    raw = sizes(base_of(config, folder), is_needed=width is None)
    tensors = to_outputs(rename(stored, r"ia3_(?P<side>l)", file), config, folder, raw)
    reads = note.get("reads", {})
    if raw is not None:
        family = family_of_linears((n.removesuffix(".l") for n in tensors), raw)
        width = width or family.width_of(raw)
        found = family.linears_of(raw)
        reads = reads or {name: pair[0] for name, pair in (found[1] if found else {}).items()}
    fields = {"kind": "ia3", "n_skills": 1}
    adapter = _build(folder, tensors, fields, width=width, reads=reads)
    return adapter, {"dtype": precision_of(stored)}


def read_peft_poly(folder: Path | str, *, task_names: Sequence[str] | None = None) -> Adapter:
    """Read a stock PEFT Poly folder; alpha is 1, as PEFT's scale is 1 / rank.

    Tasks are named by `task_names`, else by `mhr_scale.json`, else by number. Without that file the
    policy is noisy, which is how PEFT trains.
    """
    return _read_poly(Path(folder), task_names)[0]


def _read_poly(
    folder: Path, task_names: Sequence[str] | None = None
) -> tuple[Adapter, dict[str, Any]]:
    numbers = ("r", "n_tasks", "n_skills", "n_splits")
    config = read_config(folder, "POLY", numbers=numbers)
    if config.get("poly_type", "poly") != "poly":
        raise refusal(folder, f"poly_type '{config['poly_type']}'")
    note = read_note(folder)
    stored = read_stored(folder)
    pattern = r"poly_(?:lora_(?P<side>[AB])|router\.(?P<table>module_logits))"
    shape = (config["n_splits"], config["n_skills"])
    tensors = {}
    for name, tensor in rename(stored, pattern, find_tensors(folder)).items():
        is_table = name.endswith(".routing_logits") and tensor.ndim == 2
        fits = is_table and tensor.shape[1] == math.prod(shape)
        tensors[name] = tensor.unflatten(1, shape) if fits else tensor
    fields = {
        "rank": config["r"],
        "n_splits": config["n_splits"],
        "n_skills": config["n_skills"],
        "policy": policy if (policy := note.get("policy")) in PEFT_POLICIES else "noisy",
        "temperature": note.get("temperature", 1.0),
    }
    n_tasks = config["n_tasks"]
    adapter = _build(folder, tensors, fields, task_names=task_names, n_tasks=n_tasks)
    return adapter, {"dtype": precision_of(stored)}


def open_adapter(
    path: Path | str, *, sizes: FindSizes = local_sizes
) -> tuple[artefact.Card, Adapter]:
    """Open an adapter of any known format; its card says what is known of its backbone.

    `path` is a run folder, an adapter folder, a PEFT LoRA, IA3 or Poly folder, or the file of a
    published checkpoint; or a place on the hub that holds one of these, which is fetched. `sizes`
    finds what their backbone alone tells.
    """
    given, path = str(path), find_place(path).path
    if any((folder / artefact.CARD).is_file() for folder in (path, path / "adapter")):
        return artefact.read(path)
    backbone: dict[str, Any] = {}
    if (path / "adapter" / CONFIG).is_file():  # the run folder of a fine-tuning
        path = path / "adapter"
    if (path / CONFIG).is_file():
        config = read_object(path / CONFIG, AdapterError)
        kind = config.get("peft_type")
        if kind == "LORA":
            adapter, facts = _read_lora(path, sizes)
        elif kind == "IA3":
            adapter, facts = _read_ia3(path, None, sizes)
        elif kind == "POLY":
            adapter, facts = _read_poly(path)
        else:
            raise refusal(path, f"peft_type {kind!r} is none of LORA, IA3, POLY")
        source = f"PEFT {kind}"
        if base := base_of(config, path):
            name, revision = repositories.split(base)
            backbone = {"name": name, **({"revision": revision} if revision else {})}
    elif path.is_file() and path.suffix in (".safetensors", *PICKLED):
        (adapter, facts), source = open_published(path, sizes=sizes), "published checkpoint"
    else:
        raise AdapterError(
            f"{path}: no adapter here; looked for a run or adapter folder ({artefact.CARD}), a "
            f"PEFT folder ({CONFIG}) and a checkpoint file (.safetensors, {', '.join(PICKLED)})"
            f"{hint(given)}"
        )
    card = artefact.Card(
        adapter=adapter.config,
        sites=adapter.sites,
        task_names=adapter.task_names,
        backbone=backbone,
        origin={"format": source, "path": repositories.pinned(given), **facts},
    )
    return card, adapter


def _build(
    folder: Path,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    *,
    task_names: Sequence[str] | None = None,
    n_tasks: int | None = None,
    width: int | None = None,
    reads: Mapping[str, int] | None = None,
    layout: tuple[Layout, tuple[Site, ...]] | None = None,
) -> Adapter:
    """The adapter of a PEFT folder's tensors, under our names and in our shapes."""
    place, n_splits = str(find_tensors(folder)), fields.get("n_splits", 1)
    if layout is None:
        widths = widths_of(tensors, n_splits=n_splits, place=place, width=width, reads=reads)
        blocks = read_note(folder).get("blocks")
        layout = find_layout(widths, place=place, blocks=blocks)
    found, sites = layout
    given = read_note(folder).get("task_names") if task_names is None else task_names
    names = name_tasks(given, n_tasks, place=place)
    return fill({**found.settings, **fields}, sites, tensors, task_names=names, place=place)
