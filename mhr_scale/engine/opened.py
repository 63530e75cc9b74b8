"""Opening a backbone: validated before any weight is read, then placed, wrapped and checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhr_scale.adapters import opaque
from mhr_scale.adapters.sites import Site
from mhr_scale.adapters.wrapping import AdaptedModel, wrap
from mhr_scale.backbone import quantise
from mhr_scale.backbone.blueprint import Blueprint
from mhr_scale.backbone.identity import identify
from mhr_scale.backbone.of_adapter import backbone_facts, blueprint_of
from mhr_scale.backbone.tokenizer import hash_tokenizer, load_tokenizer
from mhr_scale.config import BackboneConfig
from mhr_scale.engine import determinism
from mhr_scale.engine.check_backbone import check_backbone
from mhr_scale.engine.ds_config import is_sharded, read_ds_config
from mhr_scale.engine.engine import Engine
from mhr_scale.errors import BackboneError
from mhr_scale.families.compiled import compile_blocks
from mhr_scale.families.family import Family
from mhr_scale.families.packed import PAD_MULTIPLE, EncodedRow, Packed
from mhr_scale.recipe.reading import to_yaml
from mhr_scale.run.repositories import COMMIT_OF
from mhr_scale.run.runlog import log


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedBackbone:
    """A backbone ready for passes: its model in the engine's placement, its linears wrapped."""

    engine: Engine
    family: Family
    model: Any
    adapted: AdaptedModel

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.engine.device

    def pack(
        self,
        rows: Sequence[EncodedRow],
        *,
        pad_multiple: int = PAD_MULTIPLE,
        at_least: tuple[int, int] = (0, 0),
        is_flat: bool = False,
        token_multiple: int = 1,
    ) -> Packed:
        """Rows as the model takes them, on its device (`Family.pack`)."""
        packed = self.family.pack(
            rows,
            self.model.config,
            pad_multiple=pad_multiple,
            at_least=at_least,
            is_flat=is_flat,
            token_multiple=token_multiple,
        )
        return packed.to(self.device)

    def pack_shared(self, rows: Sequence[EncodedRow]) -> Packed:
        """Rows laid flat, what prompts begin with alike once, on the device."""
        return self.family.pack_shared(rows, self.model.config).to(self.device)

    def lays_flat(self, wanted: bool | None, setting: str) -> bool:
        """Whether rows are laid flat: where that is wanted, or, for None, where it can be.

        Raises `BackboneError` that names the `setting` if it is wanted and cannot be.
        """
        return _lays_flat(self.family, self.model, wanted, setting)

    def logits(self, packed: Packed) -> Tensor:
        """Logits (B, D, V) at the target positions, with the slots in use."""
        return self.family.logits(self.model, packed)

    def predictions(self, packed: Packed) -> Tensor:
        """The same before target positions have found their own (`Packed.sources`)."""
        return self.family.predictions(self.model, packed)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedBackbone:
    """A validated backbone and its placement; no weight is read yet."""

    config: BackboneConfig
    blueprint: Blueprint
    tokenizer: Any
    ds_content: dict[str, Any]
    timeout_seconds: float
    recipe: str
    deterministic: bool
    """Whether operations run in deterministic forms only while it is placed."""

    @property
    def family(self) -> Family:
        """The backbone's architecture family."""
        return self.blueprint.family

    @property
    def facts(self) -> dict[str, Any]:
        """The `backbone` entry of an adapter's card."""
        return backbone_facts(self.config, self.blueprint)

    @property
    def inputs(self) -> dict[str, str]:
        """What a run reads of it, by content (`RunFolder.check_inputs`)."""
        return inputs_of(self.blueprint, self.tokenizer)

    def check_length(self, n_input: int, n_behind: int, settings: str) -> None:
        """Raise `BackboneError` for inputs and answers that are too long to be read together.

        Warn where they can be read, but by a backbone that was made for shorter ones. `settings`
        are those that cut them to so many tokens.
        """
        most, is_all = self.family.most_positions(self.blueprint.model_config)
        if most is None or n_input + n_behind - 1 <= most:  # the last token is never read
            return
        which = f"{settings}: texts of up to {n_input} + {n_behind} tokens, but the backbone"
        if is_all:
            raise BackboneError(f"{which} has learned {most} positions; cut them shorter")
        log.warning("%s was made for %d positions and may fail beyond", which, most)

    def check_packing(self, wanted: bool | None, setting: str) -> None:
        """Raise `BackboneError` if rows are to be laid flat (`setting`), and cannot be."""
        if wanted:
            lays_flat(self.blueprint, self.config, wanted, setting)

    @contextmanager
    def placed(
        self, sites: Sequence[Site], *, always_backward: bool = False
    ) -> Iterator[PlacedBackbone]:
        """The backbone in its placement inside the block, with these linears wrapped. Collective.

        `always_backward` makes every backward pass run through every sharded module, whichever of
        them are adapted, so that ranks with different adapters stay in step. Raises `BackboneError`
        if the backbone does not reproduce its stored logits.
        """
        with (
            determinism.switched(self.deterministic),
            Engine(
                self.ds_content, timeout_seconds=self.timeout_seconds, recipe=self.recipe
            ) as engine,
        ):
            yield place(engine, self.config, self.blueprint, sites, always_backward=always_backward)


def lays_flat(
    blueprint: Blueprint, config: BackboneConfig, wanted: bool | None, setting: str
) -> bool:
    """Whether rows are laid flat for a backbone (`PlacedBackbone.lays_flat`), before it is placed.

    One block of each stack is asked, without weights: attention is of one kind in all of them.
    """
    family = blueprint.family
    depths = dict.fromkeys(family.blocks(blueprint.model_config), 1)
    with torch.device("meta"):
        model = family.build(family.resize(blueprint.model_config, depths))
    family.fuse(model, config)
    return _lays_flat(family, model, wanted, setting)


def _lays_flat(family: Family, model: Any, wanted: bool | None, setting: str) -> bool:
    if wanted is False:
        return False
    why = family.cannot_lay(model)
    if why and wanted:
        raise BackboneError(f"{setting}: true, but {why}; leave it out, or set it to false")
    return why is None


def inputs_of(blueprint: Blueprint, tokenizer: Any) -> dict[str, str]:
    """What a run reads of a backbone and its tokenizer, by content (`RunFolder.check_inputs`)."""
    facts = blueprint.facts
    commit = {f"{COMMIT_OF}{facts['name']}": facts["commit"]} if "commit" in facts else {}
    known = {"backbone": identify(blueprint), "tokenizer": hash_tokenizer(tokenizer)[:16]}
    return {**known, **commit}


def open_backbone(
    config: BackboneConfig,
    *,
    ds_config: str | None,
    timeout_seconds: float,
    recipe: Any,
    deterministic: bool = False,
    adapter: str | None = None,
) -> OpenedBackbone:
    """Read and check the DeepSpeed file, the backbone's configuration and files, its tokenizer.

    All ranks must have the same `recipe`, which tells launches apart that meet at one port.
    Errors name the `adapter` whose card names the backbone, if any. Raises `EngineError` or
    `BackboneError`.
    """
    ds_content = read_ds_config(ds_config)
    blueprint = blueprint_of(adapter, config)
    sharded_by = ds_config if is_sharded(ds_content) else None
    quantise.check(config, blueprint, ds_config=sharded_by)
    _check_compile(config, blueprint, sharded_by)
    return OpenedBackbone(
        config=config,
        blueprint=blueprint,
        tokenizer=load_tokenizer(config, blueprint),
        ds_content=ds_content,
        timeout_seconds=timeout_seconds,
        recipe=to_yaml(recipe),
        deterministic=deterministic,
    )


def _check_compile(config: BackboneConfig, blueprint: Blueprint, sharded_by: str | None) -> None:
    """Raise `BackboneError` if blocks are to be compiled, and cannot be."""
    if not config.compile:
        return
    kind, why = quantise.kind_of(config, blueprint), None
    if not opaque.ARE_KNOWN:
        why = f"torch {torch.__version__} has no objects that graphs do not read; use 2.13"
    elif sharded_by is not None:
        why = f"{sharded_by} shards the backbone, whose weights come while a block runs"
    elif kind != "none":
        why = f"the weights are {kind}, whose products were never compiled here"
    if why:
        raise BackboneError(f"backbone.compile: true, but {why}; set it to false")


def place(
    engine: Engine,
    config: BackboneConfig,
    blueprint: Blueprint,
    sites: Sequence[Site],
    *,
    always_backward: bool = False,
) -> PlacedBackbone:
    """Build the backbone in the engine's placement, wrap its linears, and check its logits."""
    family = blueprint.family
    model = engine.build(config, blueprint)
    adapted = wrap(model, sites)
    model = engine.prepare(model, family, config, always_backward=always_backward)
    if engine.device.type != "meta":
        check_backbone(model, blueprint, config, engine)
        if config.compile:
            stacks = family.blocks(model.config).values()
            names = [name for stack in stacks for name in stack.list_modules()]
            compile_blocks(model.get_submodule(name) for name in names)
    return PlacedBackbone(engine=engine, family=family, model=model, adapted=adapted)
