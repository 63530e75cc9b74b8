"""The files of a PEFT folder: its configuration, its tensors, and our note beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (or `adapter_model.bin`), as
stock PEFT writes and loads them. What PEFT has no field for (names of tasks, the policy, the
backbone's width) is stored in `mhr_scale.json`, which PEFT does not read and which is optional for
our readers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mhr_scale.adapters.config import AdapterConfig, block_ranges
from mhr_scale.adapters.rebuilding import check_tensors, read_pickled, read_safetensors
from mhr_scale.errors import AdapterError, ConfigError, shortened
from mhr_scale.run import repositories
from mhr_scale.run.files import read_object

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED_TENSORS = "adapter_model.bin"
NOTE = "mhr_scale.json"
PREFIX = "base_model.model."

#: LoRA initialisations that leave the backbone's weights unchanged.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
#: Settings that are read here, or that do not change what the stored tensors compute.
UNDERSTOOD = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    runtime_config target_modules exclude_modules layers_to_transform layers_pattern
    r lora_alpha rank_pattern alpha_pattern lora_dropout use_rslora init_lora_weights eva_config
    megatron_core qalora_group_size feedforward_modules init_ia3_weights
    n_tasks n_skills n_splits poly_type init_weights fan_in_fan_out
    """.split()  # noqa: SIM905
)
#: What a setting makes of a LoRA, where its name alone does not say it.
MEANINGS = {
    "use_dora": "DoRA, which scales the rows of the backbone's own weights",
    "modules_to_save": "whole modules trained beside the adapter",
}
MERGE = "merge it into the backbone with PEFT (merge_and_unload) and use that as the backbone"


def refusal(folder: Path, what: str) -> AdapterError:
    """The error for a folder that one of our adapters cannot express."""
    return AdapterError(
        f"{folder / CONFIG}: {what}: no adapter of ours can express that; {MERGE}, or train without"
    )


def read_config(folder: Path, kind: str, *, numbers: Sequence[str] = ()) -> dict[str, Any]:
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
        named = (
            f"{key}: {value}{f' ({MEANINGS[key]})' if key in MEANINGS else ''}"
            for key, value in sorted(unsupported.items())
        )
        raise refusal(folder, ", ".join(named))
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None):
            raise AdapterError(f"{folder / CONFIG}: {name} is {config[name]!r}, no text")
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise refusal(folder, f"init_lora_weights '{start}', which changes the backbone's weights")
    for name in numbers:
        check_number(folder, name, config.get(name), is_integer=name != "lora_alpha")
    return config


def split_base(name: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """What a configuration and our note say of the backbone: PEFT has no field for a folder."""
    rest, revision = repositories.split(name or "")
    place = repositories.parse(rest)
    if revision is None or place is None:
        return {"base_model_name_or_path": name}, {}
    note = {"backbone_folder": place.folder} if place.folder else {}
    return {"base_model_name_or_path": place.id, "revision": revision}, note


def base_of(config: Mapping[str, Any], folder: Path) -> str | None:
    """The backbone that a folder names, with its revision where that is named."""
    name = config.get("base_model_name_or_path")
    if not name:
        return None
    inside = read_note(folder).get("backbone_folder")
    return repositories.joined(f"{name}:{inside}" if inside else name, config.get("revision"))


def check_number(folder: Path, name: str, value: Any, *, is_integer: bool) -> None:
    """Raise `AdapterError` for a setting that is no number."""
    if isinstance(value, bool) or not isinstance(value, int if is_integer else (int, float)):
        raise AdapterError(f"{folder / CONFIG}: {name} is {value!r}, not a number")


def find_tensors(folder: Path) -> Path:
    """The file of the tensors: safetensors if it is there, as PEFT chooses."""
    if not (folder / TENSORS).is_file() and (folder / PICKLED_TENSORS).is_file():
        return folder / PICKLED_TENSORS
    return folder / TENSORS


def read_stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under PEFT's names; code in a pickled file is never run."""
    file = find_tensors(folder)
    if file.suffix == ".bin":
        return check_tensors(read_pickled(file), file)
    return read_safetensors(file)


def rename(stored: Mapping[str, Tensor], pattern: str, file: Path) -> dict[str, Tensor]:
    """Tensors under our names where `pattern` matches what follows the linear's name."""
    form = re.compile(rf"{re.escape(PREFIX)}(?P<linear>.+)\.{pattern}")
    tensors = {}
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


def read_note(folder: Path) -> dict[str, Any]:
    """Our note, empty if there is none; raises `AdapterError` if it is broken."""
    note = read_object(folder / NOTE, AdapterError) if (folder / NOTE).is_file() else {}
    kinds = {
        "task_names": list,
        "policy": str,
        "temperature": float,
        "width": int,
        "blocks": str,
        "reads": dict,
        "backbone_folder": str,
    }
    for name, kind in kinds.items():
        if not isinstance(note.get(name, kind()), kind):
            raise AdapterError(f"{folder / NOTE}: {name} is {note[name]!r}")
    for linear, size in note.get("reads", {}).items():
        if type(size) is not int or size < 1:
            raise AdapterError(f"{folder / NOTE}: reads.{linear} is {size!r}")
    return note


def is_target(linear: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts a linear under this configuration."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not _is_named(linear, targets) or _is_named(linear, config.get("exclude_modules")):
        return False
    if layers is None or isinstance(targets, str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbers = [match[1] for p in patterns if (match := re.match(rf".*?\.{p}\.(\d+)\.", linear))]
    wanted = [layers] if isinstance(layers, int) else layers
    return bool(numbers) and int(numbers[0]) in wanted


def _is_named(linear: str, names: Any) -> bool:
    """Whether PEFT's pattern, or one of its names or ends of names, is that of a linear."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, linear) is not None
    return any(linear == name or linear.endswith(f".{name}") for name in names or ())


def blocks_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The blocks that have adapters, as a folder says: our note, or PEFT's own field.

    None where neither does. Raises `AdapterError` if it says none.
    """
    said = read_note(folder).get("blocks")
    layers = config.get("layers_to_transform")
    if said is not None:
        try:
            AdapterConfig(blocks=said)
        except ConfigError as error:
            raise AdapterError(f"{folder / NOTE}: {error}") from error
        return str(said)
    numbers = [layers] if type(layers) is int else layers or []
    if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
        raise refusal(folder, f"layers_to_transform {shortened(str(layers))}")
    return block_ranges(numbers) or None
