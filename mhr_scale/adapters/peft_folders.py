"""PEFT folders: writing and reading LoRA, (IA)3 and Poly; and one loader for every format.

Shape letters: T tasks, Q splits, S skills, I and O features of one split, R rank.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as stock PEFT writes and loads
them: lora_A.weight (R, I), lora_B.weight (O, R); ia3_l (O, 1); poly_lora_A (Q, S, I, R),
poly_lora_B (Q, S, R, O), poly_router.module_logits (T, Q * S). What PEFT has no field for (names of
tasks, the policy, the backbone's width) is stored beside them in `mhr_scale.json`, which PEFT does
not read and which is optional for our readers.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mhr_scale.adapters import artefact
from mhr_scale.adapters.methods import Adapter
from mhr_scale.adapters.reference_checkpoints import (
    PICKLED,
    fill,
    find_layout,
    name_tasks,
    read_published,
    read_safetensors,
    widths_of,
)
from mhr_scale.adapters.sites import backbone_width, family_of_sites
from mhr_scale.errors import AdapterError
from mhr_scale.families.family import Family
from mhr_scale.families.table import family_of_linears
from mhr_scale.run.files import put_in_place, read_object, write_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
NOTE = "mhr_scale.json"
PREFIX = "base_model.model."
SINGLE = "average it or collapse one task, and write that as a single adapter"

#: Policies that PEFT's Poly evaluates as we do.
PEFT_POLICIES = ("learned", "noisy")
#: LoRA initialisations that leave the backbone's weights unchanged.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
#: Settings that are read here, or that do not change what the stored tensors compute.
UNDERSTOOD = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    runtime_config target_modules exclude_modules layers_to_transform layers_pattern
    r lora_alpha lora_dropout use_rslora init_lora_weights eva_config megatron_core
    qalora_group_size feedforward_modules init_ia3_weights
    n_tasks n_skills n_splits poly_type init_weights
    """.split()  # noqa: SIM905
)


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
        "base_model_name_or_path": base_model,
        "r": adapter.config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
    }
    return _write(adapter, folder, tensors, settings)


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
        "base_model_name_or_path": base_model,
        "feedforward_modules": [],
    }
    return _write(adapter, folder, tensors, settings)


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
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "n_tasks": len(adapter.task_names),
        "n_skills": config.n_skills,
        "n_splits": config.n_splits,
        "poly_type": "poly",
    }
    return _write(adapter, folder, tensors, settings)


def _check_single(adapter: Adapter, folder: Path | str, *, kind: str) -> None:
    """Raise `AdapterError` unless the adapter is one pair, or one vector, per linear."""
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
    adapter: Adapter, folder: Path | str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Path:
    """Write the three files; the configuration last, since it makes the folder an adapter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    partial = folder / f".{TENSORS}.tmp"
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    put_in_place(partial, folder / TENSORS)
    note = {
        "task_names": list(adapter.task_names),
        "policy": adapter.config.policy,
        "temperature": float(adapter.config.temperature),
        "width": backbone_width(adapter.sites),
    }
    config = {
        **settings,
        "inference_mode": True,
        "target_modules": [site.name for site in adapter.sites],
    }
    write_json(folder / NOTE, note)
    write_json(folder / CONFIG, config)
    return folder


# --- reading


def read_peft_lora(folder: Path | str) -> Adapter:
    """Read a stock PEFT LoRA folder; raises `AdapterError` for what one LoRA cannot express."""
    folder = Path(folder)
    config = _read_config(folder, "LORA", numbers=("r", "lora_alpha"))
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        start = config["init_lora_weights"]
        raise _refusal(folder, f"init_lora_weights '{start}', which changes the backbone's weights")
    rank, alpha = config["r"], float(config["lora_alpha"])
    stored = _read_tensors(folder, r"lora_(?P<side>[AB])\.weight")
    tensors = {name: t.T[None, None] if t.ndim == 2 else t for name, t in stored.items()}
    fields = {
        "rank": rank,
        "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        "n_skills": 1,
    }
    return _build(folder, tensors, fields)


def read_peft_ia3(folder: Path | str, *, width: int | None = None) -> Adapter:
    """Read a stock PEFT IA3 folder whose vectors all scale outputs.

    The vectors do not tell the width of the backbone: it comes from `mhr_scale.json`, from the
    configuration of a backbone in a local folder, or from `width`.
    """
    folder = Path(folder)
    config = _read_config(folder, "IA3")
    stored = _read_tensors(folder, r"ia3_(?P<side>l)")
    linears = [name.removesuffix(".l") for name in stored]
    family = family_of_linears(linears)
    inputs: Any = config.get("feedforward_modules")
    inputs = family.peft_feed_forward if inputs is None else inputs
    for linear in linears:
        is_pattern = isinstance(inputs, str)
        if re.fullmatch(inputs, linear) if is_pattern else linear.endswith(tuple(inputs)):
            raise _refusal(folder, f"feedforward_modules {inputs}, which scales inputs ({linear})")
    tensors = {
        name: t[:, 0][None, None] if t.ndim == 2 and t.shape[1] == 1 else t
        for name, t in stored.items()
    }
    width = width or _read_note(folder).get("width") or _width_of_backbone(config, family)
    return _build(folder, tensors, {"kind": "ia3", "n_skills": 1}, width=width)


def read_peft_poly(folder: Path | str, *, task_names: Sequence[str] | None = None) -> Adapter:
    """Read a stock PEFT Poly folder; alpha is 1, as PEFT's scale is 1 / rank.

    Tasks are named by `task_names`, else by `mhr_scale.json`, else by number. Without that file the
    policy is noisy, which is how PEFT trains.
    """
    folder = Path(folder)
    numbers = ("r", "n_tasks", "n_skills", "n_splits")
    config = _read_config(folder, "POLY", numbers=numbers)
    if config.get("poly_type", "poly") != "poly":
        raise _refusal(folder, f"poly_type '{config['poly_type']}'")
    note = _read_note(folder)
    stored = _read_tensors(folder, r"poly_(?:lora_(?P<side>[AB])|router\.(?P<table>module_logits))")
    shape = (config["n_splits"], config["n_skills"])
    tensors = {}
    for name, tensor in stored.items():
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
    return _build(folder, tensors, fields, task_names=task_names, n_tasks=config["n_tasks"])


def open_adapter(path: Path | str) -> tuple[artefact.Card, Adapter]:
    """Open an adapter of any known format; its card says what is known of its backbone.

    `path` is a run folder, an adapter folder, a PEFT LoRA, IA3 or Poly folder, or the file of a
    published checkpoint.
    """
    path = Path(path)
    if any((folder / artefact.CARD).is_file() for folder in (path, path / "adapter")):
        return artefact.read(path)
    backbone: dict[str, Any] = {}
    if (path / "adapter" / CONFIG).is_file():  # the run folder of a fine-tuning
        path = path / "adapter"
    if (path / CONFIG).is_file():
        config = read_object(path / CONFIG, AdapterError)
        readers = {"LORA": read_peft_lora, "IA3": read_peft_ia3, "POLY": read_peft_poly}
        kind = config.get("peft_type")
        if kind not in list(readers):
            raise _refusal(path, f"peft_type {kind!r} is none of {', '.join(readers)}")
        adapter = readers[kind](path)
        source = f"PEFT {kind}"
        if config.get("base_model_name_or_path"):
            backbone = {"name": config["base_model_name_or_path"]}
    elif path.is_file() and path.suffix in (".safetensors", *PICKLED):
        adapter, source = read_published(path), "published checkpoint"
    else:
        raise AdapterError(
            f"{path}: no adapter here; looked for a run or adapter folder ({artefact.CARD}), a "
            f"PEFT folder ({CONFIG}) and a checkpoint file (.safetensors, {', '.join(PICKLED)})"
        )
    card = artefact.Card(
        adapter=adapter.config,
        sites=adapter.sites,
        task_names=adapter.task_names,
        backbone=backbone,
        origin={"format": source, "path": str(path)},
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
) -> Adapter:
    """The adapter of a PEFT folder's tensors, under our names and in our shapes."""
    place, n_splits = str(folder / TENSORS), fields.get("n_splits", 1)
    widths = widths_of(tensors, n_splits=n_splits, width=width, place=place)
    layout, sites = find_layout(widths, place=place)
    given = _read_note(folder).get("task_names") if task_names is None else task_names
    names = name_tasks(given, n_tasks, place=place)
    return fill({"layout": layout, **fields}, sites, tensors, task_names=names, place=place)


def _refusal(folder: Path, what: str) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: {what}: no adapter of ours can express that; merge it into the "
        "backbone with PEFT, or train without"
    )


def _read_note(folder: Path) -> dict[str, Any]:
    note = read_object(folder / NOTE, AdapterError) if (folder / NOTE).is_file() else {}
    kinds = {"task_names": list, "policy": str, "temperature": float, "width": int}
    for name, kind in kinds.items():
        if not isinstance(note.get(name, kind()), kind):
            raise AdapterError(f"{folder / NOTE}: {name} is {note[name]!r}")
    return note


def _read_config(folder: Path, kind: str, *, numbers: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a PEFT folder; raises `AdapterError` if we cannot express it."""
    config = read_object(folder / CONFIG, AdapterError)
    if config.get("peft_type") != kind:
        actual = config.get("peft_type")
        raise AdapterError(f"{folder / CONFIG}: peft_type is {actual!r}, not '{kind}'")
    unsupported = {
        key: value
        for key, value in config.items()
        if key not in UNDERSTOOD and value and value != "none"
    }
    if unsupported:
        listed = ", ".join(f"{key}: {value}" for key, value in sorted(unsupported.items()))
        raise _refusal(folder, listed)
    for name in numbers:
        is_integer = name != "lora_alpha"
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int if is_integer else (int, float)):
            raise AdapterError(f"{folder / CONFIG}: {name} is {value!r}, not a number")
    return config


def _read_tensors(folder: Path, pattern: str) -> dict[str, Tensor]:
    """Tensors, under our names where `pattern` matches what follows the linear's name."""
    file = folder / TENSORS
    if not file.is_file() and list(folder.glob("adapter_model.*")):
        names = ", ".join(sorted(path.name for path in folder.glob("adapter_model.*")))
        raise AdapterError(
            f"{file}: missing, there is only {names}, which may hold code; save it as safetensors "
            "(PEFT: model.save_pretrained(folder))"
        )
    form = re.compile(rf"{re.escape(PREFIX)}(?P<linear>.+)\.{pattern}")
    stored, tensors = read_safetensors(file), {}
    for name, tensor in stored.items():
        match = form.fullmatch(name)
        if match:
            side = match.groupdict()["side"] or "routing_logits"
            name = f"{match['linear']}.{side}"
        tensors[name] = tensor
    if not any(form.fullmatch(name) for name in stored):
        raise AdapterError(
            f"{file}: none of its {len(stored)} tensors is named {PREFIX}<linear>.{pattern}"
        )
    return tensors


def _width_of_backbone(config: Mapping[str, Any], family: Family) -> int | None:
    """Width of the backbone that a PEFT folder names, if it is a local folder."""
    name = config.get("base_model_name_or_path")
    file = Path(name or "") / "config.json"
    return family.width_of(read_object(file, AdapterError)) if name and file.is_file() else None
