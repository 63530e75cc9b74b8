"""Small few-shot jobs over a tiny T5: their rows, what they start from, and a bench for waves."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from adapters.tiny import make_t5, randomise
from placed import place_model
from torch import Tensor

from mhr_scale.adapters import Adapter, AdapterConfig, artefact, find_sites
from mhr_scale.adapters.sites import Site
from mhr_scale.backbone.blueprint import read_blueprint
from mhr_scale.backbone.tokenizer import load_tokenizer
from mhr_scale.config import (
    AdaptConfig,
    AdaptRunConfig,
    BackboneConfig,
    OptimConfig,
    ProtocolConfig,
    SelectionConfig,
    ToyTasks,
    VariantConfig,
)
from mhr_scale.engine.gradients import order_gradients
from mhr_scale.families.t5 import GATED
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.job_data import JobData, open_data
from mhr_scale.jobs.start import start
from mhr_scale.jobs.wave import Member, StepValues, Wave
from mhr_scale.tasks.suites import FewShotTask
from mhr_scale.tasks.task import Example, Task

LETTERS = "abcdefghijkl"
CPU = torch.device("cpu")
SMALL = {"num_layers": 1, "num_decoder_layers": 1}
SOURCE_TASKS = ("copy", "reverse", "sort")
#: Its 18 routing tables of 16 numbers fill whole vector registers: CPU kernels round the sigmoid of
#: the last few numbers of a tensor otherwise, and which are the last depends on the jobs beside it.
MHR = AdapterConfig(n_skills=4, n_splits=4, rank=2)
ADAMW = OptimConfig(name="adamw", lr=5e-3, routing_lr=0.1, weight_decay=0.1)
ADAFACTOR = OptimConfig(lr=3e-3, routing_lr=0.1, scale_parameter=True)


@cache
def tokenizer() -> Any:
    config = BackboneConfig(name="builtin:toy", dtype="float32")
    return load_tokenizer(config, read_blueprint(config))


# --- rows


def make_examples(task: str, fold: str, count: int) -> tuple[Example, ...]:
    """Letters to be read backwards, 7 in the last two rows and fewer in the others."""
    draw = random.Random(f"{task}/{fold}")
    made = []
    for number in range(count):
        letters = draw.sample(LETTERS, 7 if number >= count - 2 else draw.randint(4, 6))
        target, same, less = (
            " ".join(found) for found in (letters[::-1], letters, letters[::-1][1:])
        )
        label = draw.randrange(3)
        choices = [same, less]
        choices.insert(label, target)
        made.append(
            Example(
                id=f"{fold}:{number}",
                input=same,
                targets=(target,),
                choices=tuple(choices),
                label=label,
            )
        )
    return tuple(made)


def make_task(name: str, n_rows: int = 10, **changes: Any) -> Task:
    task = Task(
        name=name,
        train=make_examples(name, "train", n_rows),
        test=make_examples(name, "test", 3),
        metric="exact_match",
    )
    return replace(task, **changes)


def make_few_shot(task: Task, *, seed: int = 0, set_aside: int = 0) -> FewShotTask:
    """A task whose shots are the same in every epoch, as those of most suites are."""
    kept = task.train[: len(task.train) - set_aside]
    return FewShotTask(
        task=replace(task, train=kept),
        seed=seed,
        n_rows=len(kept),
        draw=lambda epoch: kept,
        selection=task.train[len(kept) :],
    )


def make_config(variant: VariantConfig | None = None, **protocol: Any) -> AdaptConfig:
    """A recipe of one variant `v`; its tasks are not read, the jobs bring theirs."""
    given = {"steps": 15, "batch_size": 4, "warmup_fraction": 0.2, "loss": "language_model"}
    return AdaptConfig(
        variants={"v": variant or VariantConfig(adapter="runs/source")},
        tasks=ToyTasks(suite="toy", fold="held_out"),
        protocol=ProtocolConfig(**{**given, **protocol}),
        optim=ADAMW,
        selection=SelectionConfig(on="last"),
        run=AdaptRunConfig(folder="unused"),
    )


def make_data(config: AdaptConfig, name: str, n_rows: int = 10, *, seed: int = 0) -> JobData:
    return open_data(make_few_shot(make_task(name, n_rows), seed=seed), config, tokenizer(), GATED)


# --- adapters


@cache
def sites(layout: str = "full") -> tuple[Site, ...]:
    return find_sites(make_t5(**SMALL), layout)


def make_source(config: AdapterConfig = MHR, *, tasks: Sequence[str] = SOURCE_TASKS) -> Adapter:
    """An adapter without a trivial tensor."""
    return randomise(Adapter(config, sites(config.layout), task_names=tasks))


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in artefact.named_tensors(adapter).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equality bit for bit."""
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


# --- waves


@dataclass
class Trained:
    """What jobs measured in each step, their tensors at the end, and which were given up."""

    values: dict[Job, list[dict[str, float]]] = field(default_factory=dict)
    tensors: dict[Job, dict[str, Tensor]] = field(default_factory=dict)
    lost: list[Job] = field(default_factory=list)


class Bench:
    """A tiny frozen T5 that waves are bound to, one after the other."""

    def __init__(self, layout: str = "full", device: torch.device = CPU) -> None:
        self.placed = place_model(make_t5(**SMALL), sites(layout), device=device)
        order_gradients(self.placed.model, self.placed.family)

    def step(self, wave: Wave) -> StepValues:
        wave.adapter.bind(self.placed.adapted)
        self.placed.model.train()
        return wave.train_step(self.placed)

    def train(
        self, wave: Wave, *, until: int = 10**6, before: Callable[[Wave], None] | None = None
    ) -> Trained:
        """Train up to step `until`, or until the last job has left after its own last step."""
        trained = Trained()
        while wave.members and wave.step < until:
            if before is not None:
                before(wave)
            values = self.step(wave)
            leaving = []
            for number, member in enumerate(wave.members):
                if not values.is_finite(number):
                    trained.lost.append(member.job)
                    leaving.append(number)
                    continue
                trained.values.setdefault(member.job, []).append(values.of(number))
                if wave.step >= min(member.steps, until):
                    trained.tensors[member.job] = tensors_of(wave.take(number))
                if wave.step >= member.steps:
                    leaving.append(number)
            wave.drop(leaving)
        return trained


@dataclass
class Case:
    """Jobs of one variant that could share a wave."""

    config: AdaptConfig
    source: Adapter | None
    members: list[Member]

    @property
    def variant(self) -> VariantConfig:
        return self.config.variants["v"]

    def open(self, numbers: Sequence[int] | None = None, *, device: torch.device = CPU) -> Wave:
        """A wave at the start of some of the jobs, by default all."""
        chosen = self.members if numbers is None else [self.members[n] for n in numbers]
        layout = self.source.config.layout if self.source else self.variant.fresh.layout
        adapters = [start(m.job, self.variant, self.source, sites=sites(layout)) for m in chosen]
        members = [Member(m.job, m.data, m.steps) for m in chosen]
        return Wave.open(self.config, self.variant, members, adapters, device=device)


def make_case(
    variant: VariantConfig,
    source: Adapter | None,
    *,
    optim: OptimConfig = ADAMW,
    steps: Sequence[int] = (15, 15, 15),
    **protocol: Any,
) -> Case:
    """Jobs of several tasks, with other numbers of rows, two of them of the same seed."""
    config = replace(make_config(variant, **protocol), optim=optim)
    members = []
    for number, n_steps in enumerate(steps):
        name, seed = f"task{number}", (0, 0, 7, 1)[number % 4]
        data = make_data(config, name, n_rows=(10, 8, 9, 11)[number % 4], seed=seed)
        members.append(Member(Job(task=name, seed=seed, variant="v"), data, n_steps))
    return Case(config, source, members)
