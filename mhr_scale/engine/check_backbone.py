"""The check at the start of every run: does the placed backbone reproduce its stored logits?"""

from typing import Any

from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.fingerprint import ask, check_questions, difference, tolerance_of
from mhr_scale.backbone.quantise import kind_of
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.run.runlog import log


def check_backbone(
    model: Any, blueprint: Blueprint, config: BackboneConfig, engine: Engine
) -> None:
    """Raise `BackboneError` if a placed backbone does not reproduce its stored logits.

    Collective; does nothing for a folder without a fingerprint. Adapters are off meanwhile.
    """
    if blueprint.manifest is None:
        return
    stored = blueprint.manifest.fingerprint
    check_questions(stored, blueprint)
    with adapters_off(model):
        measured = difference(stored, ask(model, blueprint.family, stored, engine.device))
    kind = kind_of(config, blueprint)
    how = config.dtype if kind == "none" else kind
    tolerance = tolerance_of(stored, how, is_measured=blueprint.quantise != "none")
    # the weights of one rank alone may be wrong, and all ranks have to raise together
    worst = max(engine.gather_objects(measured))
    if worst > tolerance:
        raise BackboneError(
            f"{blueprint.folder}: the backbone in {how}, {engine.placement}, does not give the "
            f"logits it was stored with: they differ by {worst:.2g} of their spread, more than "
            f"{tolerance:g}; its weights are wrong or wrongly tied: check the folder with "
            "`python launch/convert.py RECIPE verify=true`"
        )
    log.info("backbone: its stored logits to %.1e of their spread (%s)", worst, how)
