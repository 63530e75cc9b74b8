"""Reading and checking the DeepSpeed file, and the dictionary handed to DeepSpeed."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mhr_scale.errors import EngineError, describe_fault, did_you_mean
from mhr_scale.recipe import shipped
from mhr_scale.run.files import read_object
from mhr_scale.run.runlog import log

#: Keys that a DeepSpeed file may have: placement and communication.
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "aio",
)


#: Keys that belong to the recipe, and the settings to use instead.
OWNED = {
    "train_batch_size": "batch.batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.batch_size and batch.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "backbone.dtype",
    "fp16": "backbone.dtype",
    "data_types": "backbone.dtype",
}


def read_ds_config(name: str | None, *, asks_deepspeed: bool = True) -> dict[str, Any]:
    """Read and check a DeepSpeed file; None: replicated.

    A file of the current folder, or a shipped one by its path or name (`recipe.shipped`). Raises
    `EngineError` for a key that is unknown, repeated or owned by the recipe, for "auto", for what
    DeepSpeed itself refuses (which is to be imported, and asked, only if `asks_deepspeed`), and for
    a ZeRO stage other than 0 and 3: frozen weights have neither gradients nor optimizer states.
    """
    if name is None:
        return {"zero_optimization": {"stage": 0}}
    path = _find(name)
    content = read_object(path, EngineError, hook=_no_key_twice)
    for key in content:
        if key in OWNED:
            raise EngineError(
                f"{path}: '{key}' belongs to the recipe ({OWNED[key]}); remove it here"
            )
        if key not in ALLOWED:
            hint = did_you_mean(key, ALLOWED)
            raise EngineError(f"{path}: unknown key '{key}'{hint}; allowed: {', '.join(ALLOWED)}")
    _refuse_auto(content, path, ())
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise EngineError(f"{path}: zero_optimization is an object, got {json.dumps(zero)}")
    stage = zero.get("stage", 0)
    if stage not in (0, 3):
        raise EngineError(
            f"{path}: zero_optimization.stage {stage!r}: frozen weights have no gradients and no "
            "optimizer states to shard; use 0 (replicated) or 3 (sharded)"
        )
    if stage == 3 and asks_deepspeed:
        _check_zero(zero, path)
    return content


def _find(name: str) -> Path:
    """The file of this name; raises `EngineError` if there is none."""
    path = shipped.find(name, shipped.DS_CONFIGS, ".json")
    if path is not None:
        return path
    looked_at = shipped.candidates(name, shipped.DS_CONFIGS, ".json")[:2]
    tried = ", ".join(dict.fromkeys(str(candidate.resolve()) for candidate in looked_at))
    known = shipped.names(shipped.DS_CONFIGS, ".json")
    raise EngineError(
        f"run.ds_config: no file '{name}' (looked at {tried})"
        f"{did_you_mean(Path(name).stem, known)}; known by name: {', '.join(known)}"
    )


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key '{key}' stands twice")
        content[key] = value
    return content


def _check_zero(zero: dict[str, Any], path: Path) -> None:
    """Raise `EngineError` for a key or a value that DeepSpeed refuses in its ZeRO section."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["type"] == "extra_forbidden":
            name = ".".join(str(step) for step in fault["loc"])
            known = DeepSpeedZeroConfig.model_fields if len(fault["loc"]) == 1 else ()
            hint = did_you_mean(name, known)
            raise EngineError(f"{path}: unknown key 'zero_optimization.{name}'{hint}") from error
        place = ("zero_optimization", *fault["loc"])
        raise EngineError(f"{path}: {describe_fault(fault, place)}") from error


def _refuse_auto(value: Any, path: Path, keys: tuple[str, ...]) -> None:
    if value == "auto":
        raise EngineError(
            f'{path}: {".".join(keys)}: "auto" is a convention of another trainer and would be '
            "taken for DeepSpeed's default; give a value or leave the key out"
        )
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_auto(inner, path, (*keys, str(key)))


def deepspeed_config(content: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed: the file plus the recipe's data type. A pure function.

    DeepSpeed requires a batch size but does no accumulation here, so it gets 1.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bfloat16"},
        **content,
    }


def is_sharded(content: dict[str, Any]) -> bool:
    """Whether a DeepSpeed file shards the frozen weights (ZeRO-3)."""
    return bool(content.get("zero_optimization", {}).get("stage", 0) == 3)


def import_deepspeed() -> Any:
    """Import DeepSpeed, quietly, with its compiled CPU collective switched off.

    That extension has to be compiled, and a run killed meanwhile leaves a lock on which every later
    run on the machine hangs.
    """
    import deepspeed

    # DeepSpeed 0.19 still calls a collective by the name that torch 2.13 deprecates
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not log.isEnabledFor(logging.DEBUG):
        deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
