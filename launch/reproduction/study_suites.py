"""The two suites of the study: methods, the ways each is adapted, and the size of everything.

A suite has two sizes: the study, and a quick one that runs the same code and whose figures mean
nothing.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["full", "routing", "average", "soup"]

#: Seed of the tasks that learning rates are chosen on; the study never uses it.
SEARCH_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What is pre-trained, and the ways to adapt it, by their names in tables."""

    name: str
    settings: tuple[str, ...] = ()
    """Overrides of the pre-training recipe."""
    ways: dict[str, Kind]
    family: str
    """The method whose learning rates it uses; its own name if they are searched for it."""
    instruction: str | None = None
    """The instruction in its inputs, if not that of the regime (toy)."""
    note: str = ""

    @property
    def is_routed(self) -> bool:
        """Whether it has routing logits to train."""
        return "routing" in self.ways.values()


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The learning rates that are tried."""

    pretrain: tuple[float, ...]
    adapt: tuple[float, ...]
    routing: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySuite:
    """Everything that one suite runs."""

    name: str
    title: str
    metric: str
    margin: float
    """Points within which two methods count as about equal."""
    methods: tuple[Method, ...]
    zero_shot: dict[str, str]
    """Name in tables of every method that is averaged and evaluated zero-shot, by method."""
    aligned: tuple[str, ...]
    """Methods whose gradients are compared."""
    regimes: tuple[str, ...]
    """Instructions for zero-shot evaluation and gradients; few-shot uses the first."""
    steps: tuple[int, ...]
    """Extra steps k of the averaged adapters."""
    grid: Grid
    n_search: int
    """Training tasks that learning rates are chosen on; the search trains on the others."""
    n_held_out: int
    """Held-out tasks that are adapted to and evaluated zero-shot, the first ones."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further overrides of every recipe, by verb."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Expected time of a unit of each verb on one core (adapt: per way and task)."""

    def method(self, name: str) -> Method:
        """A method by its name."""
        return next(method for method in self.methods if method.name == name)

    @property
    def searched(self) -> tuple[Method, ...]:
        """The methods whose learning rates are chosen."""
        return tuple(method for method in self.methods if method.family == method.name)


def _adapter(**values: object) -> tuple[str, ...]:
    return tuple(f"adapter.{name}={value}" for name, value in values.items())


LORA = _adapter(n_skills=1, n_splits=1)


#: The methods of both suites.
SHARED_METHODS = (
    Method(name="LoRA", settings=LORA, ways={"LoRA": "full"}, family="LoRA"),
    Method(
        name="LoRA-big",
        settings=(*LORA, *_adapter(rank=8)),
        ways={"LoRA-big": "full"},
        family="LoRA-big",
        note="LoRA of rank 8, as many numbers as the inventory of Poly and MHR",
    ),
    Method(
        name="(IA)3",
        settings=(*LORA, "adapter.kind=ia3"),
        ways={"(IA)3": "full"},
        family="(IA)3",
        note="scales the outputs of the same linears",
    ),
    Method(
        name="AdapterSoup",
        settings=(*LORA, "adapter.private=true"),
        ways={"AdapterSoup": "soup"},
        family="AdapterSoup",
        note="a LoRA per training task; the mean of the 5 with the most similar inputs",
    ),
    Method(
        name="Random",
        settings=_adapter(n_splits=1, policy="random"),
        ways={"Random-mu": "average"},
        family="Random",
    ),
    Method(
        name="Poly",
        settings=_adapter(n_splits=1),
        ways={"Poly": "full", "Poly-z": "routing", "Poly-mu": "average"},
        family="Poly",
    ),
    Method(
        name="MHR",
        ways={"MHR": "full", "MHR-z": "routing", "MHR-mu": "average"},
        family="MHR",
        note="8 heads",
    ),
)


def _splits(count: int) -> Method:
    return Method(
        name=f"MHR-{count}",
        settings=_adapter(n_splits=count),
        ways={f"MHR-z ({count} heads)": "routing"},
        family="MHR",
    )


def _shared_routing(name: str, label: str, **values: object) -> Method:
    return Method(
        name=name,
        settings=_adapter(**values),
        ways={f"MHR ({label})": "full", f"MHR-z ({label})": "routing"},
        family="MHR",
    )


TOY = StudySuite(
    name="toy",
    title="built-in toy suite, a task split per seed",
    metric="exact match",
    margin=2.0,
    methods=(
        *SHARED_METHODS,
        _splits(2),
        _splits(4),
        _splits(16),
        Method(
            name="Poly-8",
            settings=_adapter(n_splits=1, n_skills=8, rank=1),
            ways={"Poly (8 skills)": "full", "Poly-z (8 skills)": "routing"},
            family="Poly",
            note="8 skills of rank 1: the pool of 4 skills of rank 2",
        ),
        Method(
            name="MHR-more",
            settings=_adapter(n_skills=8),
            ways={"MHR (8 skills)": "full", "MHR-z (8 skills)": "routing"},
            family="MHR",
            note="8 skills of rank 2: twice the pool",
        ),
        Method(
            name="MHR-light",
            settings=_adapter(layout="light", n_skills=5),
            ways={"MHR (light)": "full", "MHR-z (light)": "routing"},
            family="MHR",
            note="5 skills on k, v and wi_1 only: 4 % more numbers than 4 skills on q, k, v, o",
        ),
        _shared_routing("MHR-block", "routing per block", granularity="block"),
        _shared_routing("MHR-blocks", "routing per 2 blocks", granularity="blocks", block_span=2),
        _shared_routing("MHR-model", "one routing", granularity="model"),
        _shared_routing("MHR-noisy", "relaxed Bernoulli", policy="noisy"),
        Method(
            name="MHR-annealed",
            settings=("schedule.anneal_routing_steps=200",),
            ways={"MHR-mu (annealed)": "average"},
            family="MHR",
            note="routing moves to uniform over the last third of pre-training",
        ),
        Method(
            name="LoRA-code",
            settings=LORA,
            instruction="code",
            ways={"LoRA (task code)": "full"},
            family="LoRA",
            note="LoRA whose input begins with an arbitrary name of the task",
        ),
    ),
    zero_shot={
        "LoRA": "LoRA",
        "Poly": "Poly-mu",
        "MHR": "MHR-mu",
        "MHR-annealed": "MHR-mu (annealed)",
    },
    aligned=("LoRA", "Poly", "MHR"),
    regimes=("none", "full"),
    steps=(0, 50, 200, 600),
    grid=Grid(pretrain=(3e-3, 1e-2, 3e-2), adapt=(2e-3, 5e-3, 1.5e-2), routing=(0.05, 0.2)),
    n_search=10,
    n_held_out=10,
    seconds={"pretrain": 25.0, "adapt": 1.0, "average": 26.0, "evaluate": 1.0, "analyse": 1.5},
)

SUPERNI = StudySuite(
    name="superni",
    title="Super-NaturalInstructions sample over an 11-million-weight T5",
    metric="Rouge-L",
    margin=1.0,
    methods=SHARED_METHODS,
    zero_shot={"LoRA": "LoRA", "Poly": "Poly-mu", "MHR": "MHR-mu"},
    aligned=("LoRA", "Poly", "MHR"),
    regimes=("text",),
    steps=(0, 20, 60),
    grid=Grid(pretrain=(3e-3, 1e-2), adapt=(1e-3, 5e-3), routing=(0.05, 0.2)),
    n_search=6,
    n_held_out=20,
    seconds={"pretrain": 80.0, "adapt": 3.5, "average": 32.0, "evaluate": 10.0, "analyse": 12.0},
)

SUITES = {suite.name: suite for suite in (TOY, SUPERNI)}

QUICK_METHODS = ("LoRA", "MHR")
QUICK_OVERRIDES = {
    "pretrain": (
        "schedule.steps=3",
        "batch.batch_size=8",
        "batch.micro_batch_size=8",
        "tasks.train_examples=8",
        "tasks.validation_examples=2",
        "run.validate_every=-1",
        "run.save_every=0",
    ),
    "adapt": ("protocol.steps=2", "shots.count=8", "tasks.train_examples=8", "scoring.examples=2"),
    "evaluate": ("scoring.examples=2",),
    "analyse": ("alignment.tasks=2", "alignment.rows=2"),
}


def quick(suite: StudySuite) -> StudySuite:
    """The suite at a size whose figures mean nothing: two of everything, and three steps."""
    return replace(
        suite,
        methods=tuple(method for method in suite.methods if method.name in QUICK_METHODS),
        zero_shot={name: label for name, label in suite.zero_shot.items() if name == "MHR"},
        aligned=("MHR",),
        steps=(0, 2),
        grid=Grid(
            pretrain=suite.grid.pretrain[:1],
            adapt=suite.grid.adapt[:2],
            routing=suite.grid.routing[:1],
        ),
        n_search=2,
        n_held_out=2,
        seeds=(1, 2),
        overrides=QUICK_OVERRIDES,
        seconds=dict.fromkeys(suite.seconds, 1.0),
    )
