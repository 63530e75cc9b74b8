"""Backbones of real shapes around weights that are made once, at random, where they stay.

The program builds and places them itself (`Engine.build`); only reading weights is replaced.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from board import Board, Found, Scale
from paired import flops_of, found_of, take_turns, with_goal
from step_time_causal import CAUSAL_SHAPES
from step_time_ways import SHAPES, randomise
from torch import nn

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone.blueprint import make_model, read_blueprint, tie
from mhr_scale.config import (
    BackboneConfig,
    BatchConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    ToyTasks,
)
from mhr_scale.engine import engine as engine_module
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.families.family import Family
from mhr_scale.families.modes import set_dropout
from mhr_scale.families.packed import EncodedRow
from mhr_scale.families.table import known_fields
from mhr_scale.planning.steps import Shape, fresh, make_rows
from mhr_scale.rows.batching import cut_batches
from mhr_scale.training.optim import has_row_gradients
from mhr_scale.training.trainer import Trainer

T0_11B, T5_XL, T5_LARGE = "bigscience/T0", "google/t5-v1_1-xl", "google/t5-v1_1-large"
LLAMA_8B = "meta-llama/Llama-3.1-8B"
#: Tasks of the routing table, as many as T0's mixture has.
N_TASKS = 313
LORA = AdapterConfig(n_skills=1, rank=1)
MHR_8 = AdapterConfig(n_skills=8, n_splits=8, rank=1)
TINY_T5 = {**SHAPES["tiny"], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TINY_LLAMA = {**CAUSAL_SHAPES["llama-tiny"], "model_type": "llama", "tie_word_embeddings": False}
NOTHING: Any = None


def backbone_of(name: str, scale: Scale) -> BackboneConfig:
    """The backbone of a hub id's sizes, or a toy of its kind, in bfloat16."""
    fields = known_fields(name)
    assert fields is not None, name
    if scale.is_tiny:
        fields = TINY_LLAMA if fields.get("model_type") == "llama" else TINY_T5
    return BackboneConfig(config=fields, dtype="bfloat16", mapped=False)


class Backbones:
    """Any number of modules around one set of frozen weights."""

    def __init__(self, name: str, scale: Scale) -> None:
        self.scale, self.config = scale, backbone_of(name, scale)
        self.blueprint = read_blueprint(self.config)
        self.engine = Engine({}, timeout_seconds=600.0, device=scale.device)
        with torch.device("meta"):
            model = make_model(self.blueprint).to(torch.bfloat16)
        model = model.to_empty(device=scale.device)
        tie(model, self.blueprint)
        self.blueprint.family.fill_buffers(model, self.blueprint.model_config)
        randomise(model)
        set_dropout(model, 0.0)
        #: transformers' own modules, in training mode
        self.stock: Any = model.requires_grad_(False).train()

    @property
    def family(self) -> Family:
        """Theirs."""
        return self.blueprint.family

    def bare(self) -> nn.Module:
        """A model on the meta device, whose linears adapters are made for."""
        with torch.device("meta"):
            return make_model(self.blueprint)

    def sites(self, adapter: AdapterConfig) -> tuple[Site, ...]:
        """The linears that an adapter of these settings is for."""
        return find_sites(self.bare(), adapter.layout, adapter.blocks)

    def place(self, adapter: AdapterConfig | None, **changes: Any) -> PlacedBackbone:
        """Modules anew, as a run places them, with the linears of an adapter wrapped.

        `changes` are settings of the backbone.
        """
        sites = () if adapter is None else self.sites(adapter)
        given = mock.patch.object(engine_module, "fill", self._share)
        with given:
            placed = place(self.engine, replace(self.config, **changes), self.blueprint, sites)
        if self.scale.on_gpu:  # what was allocated for the weights that they have already
            gc.collect()
            torch.cuda.empty_cache()
        return placed

    def _share(self, model: nn.Module, *_: Any, **__: Any) -> None:
        for name, parameter in self.stock.named_parameters(remove_duplicate=False):
            place, _, last = name.rpartition(".")
            model.get_submodule(place)._parameters[last] = parameter


# -- steps of the trainer --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of `pretrain`: what `part_t5` and `part_llama` measure and `part_plan` predicts.

    All rows are as long as `shape` says, unless there are `lengths` (of inputs and targets).
    """

    name: str
    backbone: str
    shape: Shape
    adapter: AdapterConfig = MHR_8
    packing: bool = False
    recompute: str = "none"
    compile: bool = False
    micro: int | None = None
    """Rows of a micro batch; None: all."""
    lengths: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Useful tokens."""
        return sum(map(sum, self.lengths)) if self.lengths else self.shape.tokens

    @property
    def is_plain(self) -> bool:
        """Whether it runs each operation once, as it stands."""
        return self.recompute == "none" and not self.compile

    @property
    def micro_shape(self) -> Shape:
        """The shape of a micro batch."""
        rows = self.micro or self.shape.rows
        return replace(self.shape, rows=rows, n_tasks=rows)

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of the backbone."""
        asked = {"compile": True} if self.compile else {}
        return {"recompute": self.recompute, **asked}

    def rows(self) -> list[EncodedRow]:
        """Rows of as many tasks."""
        if not self.lengths:
            return make_rows(self.shape)
        rows = []
        for number, (width, depth) in enumerate(self.lengths):
            (row,) = make_rows(Shape(rows=1, width=width + 1, depth=depth + 1))
            rows.append(replace(row, task=number, number=number))
        return rows

    def recipe(self, config: BackboneConfig) -> PretrainConfig:
        """The recipe of a run with this step."""
        rows = self.shape.rows
        return PretrainConfig(
            backbone=replace(config, **self.changes),
            adapter=self.adapter,
            tasks=ToyTasks(suite="toy"),
            schedule=ScheduleConfig(steps=10**6, decay="constant"),
            batch=BatchConfig(
                batch_size=rows, micro_batch_size=self.micro or rows, packing=self.packing
            ),
            run=RunConfig(folder="measured"),
        )


def compiled(step: Step, scale: Scale) -> list[Step]:
    """A step once more and with compiled blocks: none at toy size, where compiling takes longest.

    Measured last: compiling may take the rest of a part's time.
    """
    if scale.is_tiny or "compile" not in BackboneConfig.__dataclass_fields__:
        return []
    again = replace(step, name=f"{step.name}, again")
    return [again, replace(step, name=f"{step.name}, compiled", compile=True)]


class TrainerStep:
    """The trainer's own step over fixed rows, its optimizer's pass included: a way of `paired`."""

    def __init__(self, step: Step, backbones: Backbones) -> None:
        self.name = step.name
        config = step.recipe(backbones.config)
        placed = backbones.place(step.adapter, **step.changes)
        make = fresh(step.adapter, N_TASKS, row_gradients=has_row_gradients(config.optim))
        adapter: Adapter = make(backbones.bare()).to(placed.device)
        adapter.bind(placed.adapted)
        self.model = nn.ModuleList([placed.model, adapter])
        rows = step.rows()
        self.batches = [
            placed.family.pack(batch, placed.model.config, is_flat=step.packing)
            for batch in cut_batches(rows, max_rows=step.micro or len(rows), is_flat=step.packing)
        ]
        self.trainer = Trainer(
            config,
            placed=placed,
            adapter=adapter,
            tokens=NOTHING,
            batches=_Same(rows),  # type: ignore[arg-type]
            backbone_facts={},
        )

    def step(self) -> None:
        """Forward and backward passes, clipping, update."""
        self.trainer._train_step(self.batches, time.monotonic())


@dataclass(frozen=True, slots=True)
class _Same:
    """A stand-in for the batches of a run: its rows, whose tasks the trainer asks for."""

    rows: Sequence[EncodedRow]

    def samples(self, step: int) -> Sequence[EncodedRow]:
        return self.rows


def run_steps(
    board: Board,
    backbones: Backbones,
    steps: Sequence[Step],
    rate: float,
    *,
    goals: dict[str, tuple[str, float]] | None = None,
) -> None:
    """Steps of the same rows in turns, an entry for each; ratios are to the first.

    The share of the card's rate is by the FLOP of whichever takes least: without padding, without
    recomputation. `goals` are those of the first.
    """
    if not steps:
        return
    first, scale = steps[0], backbones.scale

    def measure() -> dict[str, Found | str]:
        ways = [TrainerStep(step, backbones) for step in steps]
        found = take_turns(ways, scale)
        plain = [
            flops_of(way)
            for step, way in zip(steps, ways, strict=True)
            if step.is_plain and not found[step.name].error
        ]
        flops = min(plain, default=float("nan"))
        entries = found_of(found, bases=(first.name,), flops=flops, tokens=first.tokens, rate=rate)
        if goals:
            with_goal(entries, first.name, goals, scale)
        return entries

    board.run_together([step.name for step in steps], measure)
