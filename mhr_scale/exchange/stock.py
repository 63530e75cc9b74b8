"""A backbone with a LoRA, made of stock parts only, for one process.

transformers loads the backbone, in 8 or 4 bits by bitsandbytes except for modules that an
architecture keeps in the backbone's data type (`wo` in T5). PEFT loads and writes the LoRA; the
optimizer is torch's, transformers' or bitsandbytes'. `map_backbone` is transformers' reading of a
checkpoint of any size, for `convert` to compare with.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from mhr_scale.adapters import Adapter, peft_files
from mhr_scale.adapters.artefact import Card
from mhr_scale.adapters.places import find_place
from mhr_scale.backbone import hub
from mhr_scale.backbone.blueprint import Blueprint, make_model, plan_copies
from mhr_scale.backbone.of_adapter import open_adapter
from mhr_scale.backbone.quantise import kind_of
from mhr_scale.backbone.quantised_parts import import_bitsandbytes, keep_format, settings_of
from mhr_scale.config import BackboneConfig, FinetuneOptimConfig
from mhr_scale.engine.prefetching import read_blocks_ahead
from mhr_scale.errors import AdapterError, BackboneError, ConfigError, RunError, first_line, some
from mhr_scale.families.modes import set_dropout, set_recompute
from mhr_scale.families.table import QUANTISED, read_config
from mhr_scale.run import repositories
from mhr_scale.run.files import read_object, write_json
from mhr_scale.run.folders import sealed
from mhr_scale.run.runlog import log
from mhr_scale.run.tensors import written
from mhr_scale.training import checkpoint, saved_steps

OPTIMIZER = "optimizer.pt"


def open_lora(path: str, moved_to: str | None) -> tuple[Path, Card, Adapter]:
    """The folder of a PEFT LoRA, `path` itself or its `adapter/`, its card, and what it computes.

    `path` may be a place on the hub (`find_place`).
    Raises `AdapterError` if it is another adapter, or one that the other verbs could not read.
    """
    found = find_place(path).path
    folders = [found, found / "adapter"]
    folder = next((path for path in folders if (path / peft_files.CONFIG).is_file()), None)
    if folder is None:
        raise AdapterError(
            f"{path}: no PEFT LoRA folder ({peft_files.CONFIG} is missing); export the adapter "
            "first: mhr_scale export"
        )
    card, adapter = open_adapter(str(folder), moved_to)
    if card.origin["format"] != "PEFT LORA":
        raise AdapterError(
            f"{folder}: a {card.origin['format']}, and finetune trains a LoRA; export one first: "
            "mhr_scale export"
        )
    return folder, card, adapter


def load_model(
    config: BackboneConfig, blueprint: Blueprint, folder: Path, device: torch.device
) -> Any:
    """The backbone with the LoRA of a PEFT folder; its matrices are trained in float32."""
    import_bitsandbytes()  # before PEFT does, which prints remarks
    from peft import PeftModel

    base = load_backbone(config, blueprint, device)
    stored = peft_files.read_stored(folder).keys()
    try:
        with quiet():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except Exception as error:
        raise AdapterError(
            f"{folder}: PEFT does not load it ({first_line(error)}); export it again"
        ) from error
    names = {
        name.replace(".default.", ".") for name, p in model.named_parameters() if p.requires_grad
    }
    if names != stored:
        odd = min(names ^ stored)
        raise AdapterError(
            f"{folder}: not the tensors that PEFT trains, such as {odd}; export it again"
        )
    named = repositories.joined(str(config.name), blueprint.facts.get("commit"))
    base, _ = peft_files.split_base(str(hub.BUILTIN.get(named, named)))
    for name, value in base.items():
        setattr(model.active_peft_config, name, value)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice, its progress bars, and what it deprecates in PEFT's calls."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def load_backbone(config: BackboneConfig, blueprint: Blueprint, device: torch.device) -> Any:
    """The frozen backbone as transformers loads it; on a CPU mapped, where its files allow."""
    import transformers

    if _can_be_mapped(config, blueprint, device):
        model = map_backbone(config, blueprint)
        read_blocks_ahead(model, blueprint.family)
    else:
        model = _load_folder(config, blueprint, device)
    # as our own models answer: what a generation_config.json says is no part of a recipe
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    model.requires_grad_(False)
    keep_format(model)
    set_dropout(model, config.dropout)
    set_recompute(model, config.recompute)
    return model


def _can_be_mapped(config: BackboneConfig, blueprint: Blueprint, device: torch.device) -> bool:
    """Whether all weights are used as their files hold them."""
    source = blueprint.source
    return (
        config.mapped
        and device.type == "cpu"
        and kind_of(config, blueprint) == "none"
        and all(source.dtype(name) == getattr(torch, config.dtype) for name in source.names())
    )


def _load_folder(config: BackboneConfig, blueprint: Blueprint, device: torch.device) -> Any:
    """The backbone as transformers loads its folder, in 8 or 4 bits if that is asked for."""
    import transformers

    if blueprint.arrangement.is_part:
        raise BackboneError(
            f"backbone.name: {config.name} holds other models beside the text model, which "
            "transformers does not load alone; convert it first: mhr_scale convert"
        )
    kind, model_config = kind_of(config, blueprint), _config_for_transformers(blueprint)
    options: dict[str, Any] = {"config": model_config, "device_map": {"": device}}
    if kind != "none":
        how = transformers.BitsAndBytesConfig(**settings_of(kind, getattr(torch, config.dtype)))
        if blueprint.quantise != "none":  # else transformers quantises
            setattr(model_config, QUANTISED, how.to_dict())
        else:
            options[QUANTISED] = how
    auto_class = getattr(transformers, blueprint.family.auto_class)
    return _load(auto_class, blueprint.folder, config, blueprint, options)


class UncastTensor(Tensor):
    """A tensor that stays as its file has it: who asks for a cast gets the tensor itself."""

    def to(self, *arguments: Any, **options: Any) -> "UncastTensor":
        """The tensor itself."""
        return self


def map_backbone(config: BackboneConfig, blueprint: Blueprint) -> Any:
    """The backbone as transformers reads it, every weight a view of its file, as it is stored.

    transformers gets the tensors by their names in the files; which of them fill the model, which
    are tied and which are missing, it decides as for a folder. No weight is read.
    """
    import transformers

    model_config = _config_for_transformers(blueprint)
    with torch.device("meta"):  # the auto class itself takes a folder only
        auto_class = getattr(transformers, blueprint.family.auto_class)
        kind = type(auto_class.from_config(model_config))
    uncast = {n: view.as_subclass(UncastTensor) for n, view in _views(blueprint).items()}
    model = _load(kind, None, config, blueprint, {"config": model_config, "state_dict": uncast})
    plain: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in plain:
                numbers = parameter.detach().as_subclass(Tensor)
                plain[parameter] = nn.Parameter(numbers, requires_grad=False)
            module._parameters[name] = plain[parameter]
    return model


def _views(blueprint: Blueprint) -> dict[str, Tensor]:
    """Weights by their names in the files; of a part of a greater model by its own names."""
    source = blueprint.source
    found: dict[str, Tensor] = {}
    for name in sorted(source.names()):
        view = source.view(name)
        is_own = blueprint.arrangement.is_part and view is not None
        found |= {name: view} if is_own and view is not None else source.views(name)
    return found


def _load(
    kind: Any,
    folder: Path | None,
    config: BackboneConfig,
    blueprint: Blueprint,
    options: Mapping[str, Any],
) -> Any:
    """What a class of transformers makes of a folder, or of the `state_dict` in `options`.

    Raises `BackboneError` if weights are missing, or tied that are not so in the checkpoint.
    """
    try:
        with quiet():  # ties and missing tensors are checked below
            model, info = kind.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"backbone.name: transformers does not load {config.name} ({first_line(error)}); fetch "
            "it again, or use adapt, which reads it itself"
        ) from error
    odd = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if odd:
        raise BackboneError(
            f"backbone.name: {config.name} does not fill the model: {some(odd)}; fetch it again"
        )
    tied = find_foreign_tie(model, blueprint.ties)
    if tied is not None:
        raise BackboneError(
            f"backbone.name: transformers has tied {tied} of {config.name}, which is a tensor of "
            "its own in the checkpoint; use adapt, which reads it as it is"
        )
    return model


def _config_for_transformers(blueprint: Blueprint) -> Any:
    """The configuration to load a folder by.

    Raises `BackboneError` where transformers would read other weights than our own loader, without
    a word: it drops those that it does not know, and loads an adapter that lies beside them.
    """
    with torch.device("meta"):
        plan_copies(make_model(blueprint), blueprint)
    assert blueprint.folder is not None
    adapter = blueprint.folder / peft_files.CONFIG
    if adapter.is_file():
        raise BackboneError(
            f"{adapter}: an adapter beside the backbone, which transformers would load with it; "
            "move it to a folder of its own"
        )
    _, model_config, _ = read_config(blueprint.folder)
    return model_config


def find_foreign_tie(model: nn.Module, ties: Mapping[str, str]) -> str | None:
    """A parameter that is tied to another one, but not in the checkpoint; None without one."""
    owners: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(parameter, name)
        if ties.get(name, name) != ties.get(owner, owner):
            return name
    return None


def write_peft(model: Any, folder: Path, source: Path) -> None:
    """Write the LoRA and our note as a PEFT folder, which appears only when it is complete."""
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    _fill_peft(model, partial, source)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _fill_peft(
    model: Any, folder: Path, source: Path, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write the model's adapter as a PEFT folder; with `tensors` their values, not the model's."""
    with written(folder / peft_files.TENSORS):
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=tensors)
    config = read_object(folder / peft_files.CONFIG, AdapterError)
    if isinstance(config.get("target_modules"), list):  # of a set, in another order every time
        config["target_modules"] = sorted(config["target_modules"])
        write_json(folder / peft_files.CONFIG, config)
    if (source / peft_files.NOTE).is_file():
        shutil.copy(source / peft_files.NOTE, folder / peft_files.NOTE)


def make_optimizer(
    config: FinetuneOptimConfig, parameters: list[nn.Parameter], device: torch.device
) -> Optimizer:
    """The optimizer that the recipe names."""
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "adafactor":
        from transformers import Adafactor

        adafactor: Optimizer = Adafactor(
            parameters, scale_parameter=config.scale_parameter, relative_step=False, **common
        )
        return adafactor
    common |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if device.type == "cpu":
        raise ConfigError(
            f"optim.name: {config.name} moves its state between GPU and host, and this run is on "
            "CPU; use adamw"
        )
    from bitsandbytes.optim import PagedAdamW8bit

    paged: Optimizer = PagedAdamW8bit(parameters, **common)
    return paged


@dataclass(frozen=True, slots=True)
class StepCopy:
    """Host copies of trained tensors and optimizer state, which a background write can use."""

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]


def copy_step(model: Any, optimizer: Optimizer) -> StepCopy:
    """Copy the trained tensors and the optimizer's state to the host."""
    trained = {n: _copy(p) for n, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    copied = {
        number: {key: _copy(value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return StepCopy(trained, {**state, "state": copied})


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def save_step(model: Any, copy: StepCopy, run: Path, step: int, source: Path) -> None:
    """Save a step and keep the one before it; raises `RunError` if it cannot be written."""
    folder = saved_steps.step_folder(run, step)
    try:
        with sealed(folder) as partial:
            _fill_peft(model, partial, source, copy.tensors)
            torch.save(copy.optimizer, partial / OPTIMIZER)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch's own writer
        raise checkpoint.not_saved(run, folder, error) from error
    checkpoint.remove_old(run, keep=2)


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Load a saved optimizer state; raises `RunError` if it cannot be read."""
    try:
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except Exception as error:
        raise RunError(
            f"{folder}: cannot resume from it ({first_line(error)}); delete this step"
        ) from error
    log.info("resumed from %s", folder)
