"""The check at the start of every run: does the placed backbone reproduce its stored logits?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mhr_scale.adapters.wrapping import adapters_off
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.fingerprint import ask, check_questions, difference, tolerance_of
from mhr_scale.backbone.quantise import kind_of
from mhr_scale.config import BackboneConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.families.family import Family
from mhr_scale.run.runlog import ByteProgress, log


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
    with adapters_off(model), _shown(model, blueprint.family):
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
            "`mhr_scale convert RECIPE verify=true`"
        )
    log.info("backbone: its stored logits to %.1e of their spread (%s)", worst, how)


@contextmanager
def _shown(model: Any, family: Family) -> Iterator[None]:
    """Show how far a pass inside the block is, by the weights of the blocks that have run."""
    stacks = family.blocks(model.config).values()
    blocks = {name: model.get_submodule(name) for stack in stacks for name in stack.list_modules()}
    sizes = {name: sum(map(_n_bytes, block.parameters())) for name, block in blocks.items()}
    progress = ByteProgress(sum(sizes.values()), what="compare stored logits")
    handles = [
        block.register_forward_hook(
            lambda module, inputs, output, name=name: progress.add(name, sizes[name])
        )
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress.close()


def _n_bytes(parameter: Any) -> int:
    """Bytes of a whole weight; a sharded one knows its size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size())
