"""The frozen backbone before it is built: its configuration, its weights, which of them are tied.

Nothing here knows about ranks or shards: the engine asks a `WeightSource` for the range of each
tensor that it needs. The loader is our own because transformers ties weights by a configuration
that is often wrong: here the names and numbers in the checkpoint decide.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhr_scale.backbone.arranged import ArrangedSource
from mhr_scale.backbone.hub import find
from mhr_scale.backbone.manifest import (
    WAY_OUT,
    Manifest,
    check_files,
    check_weights,
    read_manifest,
)
from mhr_scale.backbone.quantised_parts import QuantisedSource, stored_kind
from mhr_scale.backbone.weight_files import open_weights
from mhr_scale.backbone.weights import RandomSource, WeightSource, is_equal
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families.family import Family
from mhr_scale.families.stored_names import AS_NAMED, Arrangement
from mhr_scale.families.table import QUANTISED, make_config, read_config
from mhr_scale.run.runlog import log


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """Everything needed to build one backbone: configuration, weights and their provenance.

    `ties` maps names to the tensor that they are tied to; `raw` is what config.json or the recipe
    says; `arrangement` is how the model's tensors are stored; `quantise` says how linears are.
    """

    family: Family
    model_config: Any
    source: WeightSource
    ties: dict[str, str]
    folder: Path | None
    facts: dict[str, Any]
    raw: dict[str, Any]
    arrangement: Arrangement = AS_NAMED
    manifest: Manifest | None = None
    quantise: str = "none"


def read_blueprint(config: BackboneConfig) -> Blueprint:
    """Find and check the backbone; raises `BackboneError` if it is missing or cannot be used."""
    if config.name is None:
        return _random_blueprint(config)
    found = find(config.name, config.revision)
    folder = found.path
    family, model_config, raw = read_config(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest)
    source: WeightSource = open_weights(folder)
    arrangement = _arrange(family, raw, source, folder)
    if arrangement.stored or arrangement.unused:
        source = ArrangedSource(source, arrangement)
    kind = stored_kind(raw.get(QUANTISED), source.names())
    if kind != "none":
        source = QuantisedSource(source, kind, way_out=WAY_OUT if manifest else "fetch it again")
    for name in sorted(source.names()):
        source.dtype(name)  # raises if it is no weight's
    are_equal = cache(partial(is_equal, source))
    ties = family.find_ties(raw, source.names(), are_equal)
    if manifest is not None:
        check_weights(folder, manifest, source, ties, kind)
    for name, target in ties.items():
        if name in source.names() and not are_equal(name, target):
            raise BackboneError(
                f"{source.file(name)}: {name} differs from {min(source.views(target))}, and the "
                "model has one tensor for both; leave out the one that was not trained"
            )
    _say(raw, family, model_config, folder / "config.json", kind)
    facts: dict[str, Any] = {
        "name": config.name,
        "revision": config.revision,
        "folder": folder.name,
    }
    if found.commit is not None:
        facts["commit"] = found.commit
    if manifest is not None:
        facts["converted_from"] = manifest.source
    return Blueprint(
        family=family,
        model_config=model_config,
        source=source,
        ties=ties,
        folder=folder,
        facts=facts,
        raw=raw,
        arrangement=arrangement,
        manifest=manifest,
        quantise=kind,
    )


def _arrange(
    family: Family, raw: Mapping[str, Any], source: WeightSource, folder: Path
) -> Arrangement:
    """How the tensors of a folder become the model's; errors name the folder."""
    try:
        return family.arrange(raw, source.names())
    except BackboneError as error:
        raise BackboneError(f"{folder}: {error}") from error


def _say(
    raw: Mapping[str, Any], family: Family, config: Any, place: Path | str, kind: str = "none"
) -> None:
    """Tell which settings of a configuration are not used as they stand."""
    for name, value in family.required_fields(config).items():
        if name in raw and raw[name] is None:
            log.info("%s: %s is null; %s is used", place, name, value)
    if raw.get(QUANTISED) and kind == "none":
        log.info("%s: %s is not used: the weights are not quantised", place, QUANTISED)


def _random_blueprint(config: BackboneConfig) -> Blueprint:
    """A randomly initialised backbone of the configuration in the recipe."""
    assert config.config is not None
    family, model_config, fields = make_config(config.config)
    _say(fields, family, model_config, "backbone.config")
    with torch.device("meta"):
        model = family.build(model_config)
    names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    ties = family.find_ties(fields, names, lambda name, other: True)
    family.tie(model, ties)
    return Blueprint(
        family=family,
        model_config=model_config,
        source=RandomSource(
            {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            config.config_seed,
            partial(family.random_weight, model_config),
        ),
        ties=ties,
        folder=None,
        facts={"name": None, "config": fields, "config_seed": config.config_seed},
        raw={"model_type": model_config.model_type, **fields},
    )


def make_model(blueprint: Blueprint) -> nn.Module:
    """Build the model without filling its weights, on the current default device.

    Weights are tied as in the checkpoint; the model is frozen and in evaluation mode.
    """
    model = blueprint.family.build(blueprint.model_config)
    tie(model, blueprint)
    model.requires_grad_(False)
    return model.eval()


def tie(model: nn.Module, blueprint: Blueprint) -> None:
    """Tie parameters; needed again after a model's parameters have been replaced."""
    blueprint.family.tie(model, blueprint.ties)


def _check_prefix(missing: Set[str], unknown: Set[str], source: WeightSource) -> None:
    """Raise `BackboneError` if another program has put something before the names of tensors."""
    for name in sorted(unknown):
        fitting = next((wanted for wanted in missing if name.endswith(f".{wanted}")), None)
        if fitting is not None:
            prefix = name.removesuffix(fitting)
            raise BackboneError(
                f"{source.file(name)}: names begin with '{prefix}', as in {name}, which the model "
                f"calls {fitting}; save the tensors without '{prefix}'"
            )


def plan_copies(model: nn.Module, blueprint: Blueprint) -> dict[str, nn.Parameter]:
    """Map each name to be read to the parameter it fills, every parameter exactly once.

    Raises `BackboneError` listing missing, unknown or mis-shaped tensors. A ZeRO-3 parameter's
    full shape is its `ds_shape`.
    """
    parameters, source = dict(model.named_parameters()), blueprint.source
    names = source.names()
    _check_prefix(parameters.keys() - names, names - parameters.keys(), source)
    faults = [f"missing {name}" for name in sorted(parameters.keys() - names)]
    faults += [
        f"unknown {name}" for name in sorted(names - parameters.keys() - blueprint.ties.keys())
    ]
    for name in sorted(parameters.keys() & names):
        parameter = parameters[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != source.shape(name):
            faults.append(f"{name} is {list(source.shape(name))}, the model wants {list(shape)}")
    if faults:
        files = [file for file in map(source.file, sorted(names)) if file is not None]
        place = f"{files[0].parent}: " if files else ""
        raise BackboneError(
            f"{place}the checkpoint does not fit its configuration, {len(faults)} fault(s): "
            f"{'; '.join(faults[:5])}; fetch both again"
        )
    return parameters
