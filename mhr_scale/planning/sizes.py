"""A backbone's sizes without its weights, from the table of known ones or from config.json."""

from dataclasses import replace
from pathlib import Path

from mhr_scale.backbone import hub
from mhr_scale.backbone.blueprint import Blueprint, read_blueprint
from mhr_scale.backbone.manifest import read_manifest
from mhr_scale.config import BackboneConfig
from mhr_scale.errors import BackboneError
from mhr_scale.families.table import known_fields, read_config
from mhr_scale.run.runlog import log


def read_sizes(config: BackboneConfig) -> Blueprint:
    """A blueprint for meta-device models, which says how linears are stored; no weight is read.

    Raises `BackboneError` if the backbone is neither stored nor in the table.
    """
    if config.name is None:
        return read_blueprint(config)
    fields, kind = known_fields(config.name), "none"
    if fields is not None and not Path(config.name).is_dir():
        log.info("%s: sizes from the table of known backbones", config.name)
    else:
        try:
            folder = hub.find_folder(config.name, config.revision, files=("config.json",))
        except BackboneError as error:
            raise BackboneError(
                f"{error}; or put its configuration under backbone.config and set "
                "backbone.name=null"
            ) from error
        manifest = read_manifest(folder)  # raises if the other verbs would refuse it
        kind = kind if manifest is None else manifest.quantise
        family, _, raw = read_config(folder)
        fields = family.size_fields(raw)
    return replace(read_blueprint(replace(config, name=None, config=fields)), quantise=kind)
