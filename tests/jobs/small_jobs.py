"""Small few-shot jobs over a tiny T5: their data, their sources, and training them in a wave."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from adapters.tiny import make_t5, randomise
from torch import Tensor

from mhr_scale import backbone
from mhr_scale.adapters import Adapter, AdapterConfig, find_sites, state
from mhr_scale.adapters.layout import Site
from mhr_scale.adapters.methods import wrap
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
from mhr_scale.jobs.data import JobData, open_data
from mhr_scale.jobs.job import Job
from mhr_scale.jobs.start import start
from mhr_scale.jobs.wave import Member, StepValues, Wave
from mhr_scale.tasks.few_shot_suites import FewShotTask
from mhr_scale.tasks.task import Example, Task

LETTERS = "abcdefghijkl"
CPU = torch.device("cpu")
MHR = AdapterConfig(n_skills=4, n_splits=4, rank=2)
SOURCE_TASKS = ("copy", "reverse", "sort")
ADAMW = OptimConfig(name="adamw", lr=5e-3, routing_lr=0.1, weight_decay=0.1)
ADAFACTOR = OptimConfig(lr=3e-3, routing_lr=0.1, scale_parameter=True)


@cache
def tokenizer() -> Any:
    config = BackboneConfig(name="builtin:toy", dtype="float32")
    return backbone.load_tokenizer(config, backbone.read_blueprint(config))


# --- data


def make_examples(task: str, fold: str, count: int, *, n_targets: int = 1) -> tuple[Example, ...]:
    """Letters and their reverse; the last rows are the longest, 7 letters."""
    draw = random.Random(f"{task}/{fold}")
    made = []
    for number in range(count):
        letters = draw.sample(LETTERS, 7 if number >= count - 2 else draw.randint(4, 6))
        answers = [" ".join(found) for found in (letters[::-1], letters, sorted(letters)[::-1])]
        answers[2] = answers[2] if answers[2] not in answers[:2] else "a"
        label = draw.randrange(3)
        choices = answers[1:3]
        choices.insert(label, answers[0])
        made.append(
            Example(
                id=f"{fold}:{number}",
                input=" ".join(letters),
                targets=tuple(answers[:n_targets]),
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
    """A recipe whose protocol has small batches; only what jobs read of it counts."""
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
    return open_data(make_few_shot(make_task(name, n_rows), seed=seed), config, tokenizer())


# --- sources


@cache
def sites(layout: str = "full") -> tuple[Site, ...]:
    return find_sites(make_t5(), layout)


def make_source(config: AdapterConfig = MHR, *, tasks: Sequence[str] = SOURCE_TASKS) -> Adapter:
    """A trained adapter, as far as its tensors tell; small enough for a tiny T5 to learn on."""
    source = randomise(Adapter(config, sites(config.layout), task_names=tasks))
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name != "routing_logits" and config.kind == "lora":
                parameter.mul_(0.3)
    return source


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.named_tensors(adapter).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equality bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


# --- training


class Bench:
    """A tiny frozen T5 that waves are bound to, one after the other."""

    def __init__(self, layout: str = "full") -> None:
        self.model = make_t5()
        self.linears = wrap(self.model, find_sites(self.model, layout))
        backbone.order_gradients(self.model)

    def step(self, wave: Wave) -> StepValues:
        wave.adapter.bind(self.linears)
        self.model.train()
        return wave.train_step(self.model, device=CPU, after_backward=lambda: None)

    def train(
        self, wave: Wave, *, steps: int = 10**6, each: Callable[[Wave], None] | None = None
    ) -> "Trained":
        """Train so many steps, or until the last job has left; a job leaves after its last step."""
        trained = Trained()
        while wave.members and steps:
            if each is not None:
                each(wave)
            values = self.step(wave)
            steps -= 1
            for number, member in enumerate(wave.members):
                trained.losses.setdefault(member.job, []).append(values.of(number))
                trained.tensors[member.job] = tensors_of(wave.take(number))
            lost = [n for n in range(len(wave.members)) if not values.is_finite(n)]
            trained.lost += [wave.members[n].job for n in lost]
            done = [n for n, member in enumerate(wave.members) if wave.step >= member.steps]
            wave.drop(sorted({*lost, *done}))
        return trained


@dataclass
class Trained:
    """What jobs left: their numbers of every step, and their tensors at the end."""

    losses: dict[Job, list[dict[str, float]]] = field(default_factory=dict)
    tensors: dict[Job, dict[str, Tensor]] = field(default_factory=dict)
    lost: list[Job] = field(default_factory=list)


@dataclass
class Case:
    """Jobs of one variant that could share a wave."""

    config: AdaptConfig
    source: Adapter | None
    members: list[Member]
    similar: dict[Job, tuple[str, ...]] = field(default_factory=dict)

    @property
    def variant(self) -> VariantConfig:
        return self.config.variants["v"]

    def open(self, numbers: Sequence[int] | None = None) -> Wave:
        """A new wave of some of the jobs, by default all."""
        chosen = self.members if numbers is None else [self.members[n] for n in numbers]
        layout = self.source or self.variant.fresh
        config = layout.config if isinstance(layout, Adapter) else layout
        assert config is not None
        adapters = [
            start(
                member.job,
                self.variant,
                self.source,
                sites=sites(config.layout),
                similar=self.similar.get(member.job, ()),
            )
            for member in chosen
        ]
        members = [Member(m.job, m.data, m.steps) for m in chosen]
        return Wave.open(self.config, self.variant, members, adapters, device=CPU)


def make_case(
    variant: VariantConfig,
    source: Adapter | None,
    *,
    optim: OptimConfig = ADAMW,
    steps: Sequence[int] = (15, 15, 15),
    **protocol: Any,
) -> Case:
    """Jobs whose tasks have other rows and other numbers of rows, two of them of the same seed."""
    config = replace(make_config(variant, **protocol), optim=optim)
    names = ("backwards", "other", "third", "fourth")
    members = []
    for number, n_steps in enumerate(steps):
        seed = (0, 0, 7, 1)[number]
        data = make_data(config, names[number], n_rows=(10, 8, 9, 11)[number], seed=seed)
        job = Job(task=names[number], seed=seed, variant="v")
        members.append(Member(job, data, n_steps))
    return Case(config, source, members)
