"""What `few_shot_waves.py` trains, and our own way to train it: waves of any number of jobs.

Waves of 1 are our own loop over one job after another. Jobs of all ways (`few_shot_peft.py` is the
other one) have the same backbone weights, start from the same tensors and see the same rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from mhr_scale.adapters import Adapter, AdapterConfig, find_sites
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone.blueprint import make_model, read_blueprint
from mhr_scale.config import (
    AdaptConfig,
    BackboneConfig,
    JsonlTasks,
    OptimConfig,
    ProtocolConfig,
    ScheduleConfig,
    VariantConfig,
    WavesConfig,
)
from mhr_scale.config.adaptation import AdaptRunConfig
from mhr_scale.engine.engine import Engine
from mhr_scale.engine.opened import PlacedBackbone, place
from mhr_scale.families.packed import EncodedRow
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.job_data import round_up
from mhr_scale.jobs.start import start
from mhr_scale.jobs.wave import Member, Wave

Kind = Literal["average", "full", "routing"]
KINDS: tuple[Kind, ...] = ("average", "full", "routing")
OPTIMIZERS = ("adamw", "adafactor")
#: A protocol's steps: rates are those of its beginning, where every job is alive.
STEPS = 1000
CLIP_NORM, LR, ROUTING_LR = 1.0, 1e-3, 1e-2
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A T5 v1.1 of random weights, or a stored backbone, and the batch of one job.

    `layers` are those of each stack. Inputs have `fewest` to `tokens` tokens, all `tokens` where
    `fewest` is 0.
    """

    d_model: int = 0
    layers: int = 0
    rows: int
    tokens: int
    fewest: int = 0
    folder: str = ""
    dtype: Literal["bfloat16", "float32"] = "float32"
    d_ff: int = 0
    heads: int = 0
    vocabulary: int = 512
    target_tokens: int = 6

    @property
    def name(self) -> str:
        """`d64 2+2 8x16`: width, blocks, rows x input tokens; or the folder's name."""
        lengths = f"{self.fewest}-{self.tokens}" if self.fewest else str(self.tokens)
        if self.folder:
            return f"{Path(self.folder).name} {self.dtype} {self.rows}x{lengths}"
        return f"d{self.d_model} {self.layers}+{self.layers} {self.rows}x{lengths}"

    def backbone(self) -> BackboneConfig:
        """Its backbone."""
        if self.folder:
            return BackboneConfig(name=self.folder, dtype=self.dtype)
        heads = self.heads or max(2, self.d_model // 32)
        fields = {
            "vocab_size": self.vocabulary,
            "d_model": self.d_model,
            "d_kv": 64 if self.heads else self.d_model // heads,
            "d_ff": self.d_ff or 2 * self.d_model,
            "num_layers": self.layers,
            "num_decoder_layers": self.layers,
            "num_heads": heads,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
        return BackboneConfig(config=fields, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one job, with what `Wave` reads of a `JobData`."""

    setting: Setting
    rows: tuple[EncodedRow, ...]

    @classmethod
    def draw(cls, setting: Setting, job: int) -> "Rows":
        """Four batches of random token ids, each row ended by </s>."""
        generator = np.random.default_rng(job)

        def ids(length: int) -> np.ndarray:
            return np.append(generator.integers(2, setting.vocabulary, length - 1), 1)

        n_rows, longest = 4 * setting.rows, setting.tokens
        lengths = np.full(n_rows, longest)
        if setting.fewest:
            lengths = generator.integers(setting.fewest, longest + 1, n_rows)
        return cls(
            setting,
            tuple(EncodedRow(ids(length), (ids(setting.target_tokens),), 0) for length in lengths),
        )

    @property
    def batch_size(self) -> int:
        return self.setting.rows

    @property
    def shape(self) -> tuple[int, int]:
        """What `JobData` would pad to."""
        return round_up(self.setting.tokens), round_up(self.setting.target_tokens)

    def batch(self, step: int) -> Sequence[EncodedRow]:
        """The rows of a step."""
        at = step * self.setting.rows % len(self.rows)
        return self.rows[at : at + self.setting.rows]


class Bench:
    """The jobs of one setting and kind: their configuration, rows and tensors at the start."""

    def __init__(
        self,
        setting: Setting,
        kind: Kind,
        optimizer: str,
        sites: tuple[Site, ...],
        *,
        packing: bool | None = None,
    ) -> None:
        self.setting, self.kind = setting, kind
        self.optim = OptimConfig(
            name=optimizer,  # type: ignore[arg-type]
            lr=LR,
            routing_lr=ROUTING_LR,
            scale_parameter=optimizer == "adafactor",
            clip_norm=CLIP_NORM,
        )
        self.variant = VariantConfig(adapter="source", kind=kind)
        self.config = AdaptConfig(
            variants={kind: self.variant},
            tasks=JsonlTasks(suite="jsonl", folder="."),
            protocol=ProtocolConfig(steps=STEPS, loss="language_model", batch_size=setting.rows),
            optim=self.optim,
            waves=WavesConfig(packing=packing),
            run=AdaptRunConfig(folder="."),
        )
        self.sites = sites
        self.rows = cache(lambda number: Rows.draw(setting, number))
        self.start: Callable[[int], Adapter] = cache(self._start)

    def job(self, number: int) -> Job:
        return Job(task=f"task{number}", seed=number, variant=self.kind)

    def _start(self, number: int) -> Adapter:
        return start(self.job(number), self.variant, make_source(self.sites), sites=self.sites)

    def schedule(self) -> ScheduleConfig:
        protocol = self.config.protocol
        return ScheduleConfig(
            steps=protocol.steps, warmup_fraction=protocol.warmup_fraction, decay=protocol.decay
        )


@cache
def make_source(sites: tuple[Site, ...]) -> Adapter:
    """A "trained" MHR inventory, 8 skills and 8 splits of rank 1, B no longer zero."""
    config = AdapterConfig(n_skills=8, n_splits=8, rank=1)
    source = Adapter(config, sites, task_names=["source"], seed=1)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in source.inventory.named_tensors():
        if name.endswith(".B") and tensor.device.type == "cpu":
            tensor.normal_(0.0, 0.02, generator=generator)
    return source


@dataclass(frozen=True, slots=True)
class Hall:
    """A placed, frozen backbone with linears for our adapters."""

    placed: PlacedBackbone
    sites: tuple[Site, ...]

    @classmethod
    def build(cls, setting: Setting, engine: Engine) -> "Hall":
        """Build and place the backbone of a setting as `adapt` does. Collective."""
        config = setting.backbone()
        blueprint = read_blueprint(config)
        with torch.device("meta"):
            sites = find_sites(make_model(blueprint), "full")
        return cls(place(engine, config, blueprint, sites, always_backward=True), sites)

    def waves(self, bench: Bench, *, size: int, turn: Callable[[], None] = lambda: None) -> "Waves":
        """Waves over this backbone; `turn` is called before each step."""
        return Waves(bench, self.placed, size=size, turn=turn)


def build_bare(setting: Setting, engine: Engine) -> Any:
    """The same backbone without our linears."""
    config = setting.backbone()
    return engine.build(config, read_blueprint(config))


class Way(Protocol):
    """A way to train jobs, `size` at a time."""

    name: str
    size: int

    def open(self, numbers: Sequence[int]) -> Any:
        """Make these jobs ready for their first step; returns what `step` and `close` take."""

    def step(self, handle: Any) -> list[float]:
        """Train them by one step; returns their losses."""

    def close(self, handle: Any) -> None:
        """Make room for other jobs."""


class Waves:
    """Our own code: waves of `size` jobs over one backbone."""

    def __init__(
        self,
        bench: Bench,
        placed: PlacedBackbone,
        *,
        size: int,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = f"waves of {size}" if size > 1 else "one by one"
        if bench.config.waves.packing is False:
            self.name += ", padded"
        self.bench, self.placed, self.size, self.turn = bench, placed, size, turn

    def open(self, numbers: Sequence[int]) -> Wave:
        """A wave of these jobs at their start, bound to the model."""
        bench = self.bench
        members = [Member(bench.job(n), bench.rows(n), STEPS) for n in numbers]  # type: ignore[arg-type]
        wave = Wave.open(
            bench.config,
            bench.variant,
            members,
            [bench.start(n) for n in numbers],
            device=self.placed.device,
        )
        wave.adapter.bind(self.placed.adapted)
        return wave

    def step(self, wave: Wave) -> list[float]:
        """One step of all jobs of a wave; returns their losses."""
        self.turn()
        self.placed.model.train()
        return wave.train_step(self.placed).values["loss"]

    def close(self, wave: Wave) -> None:
        """Nothing: the next wave is bound in its place."""
