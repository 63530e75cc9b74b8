"""The built-in toy suite: a list operation, then a symbol map, then an output format.

A composition is named like `reverse.plus1.plain`; 8 operations x 6 maps x 3 formats make 144, ten
of which are held out. Everything is text, one blank between two symbols, and a pure function of the
config. The suite's own backbone (`toy_backbone/`) is trained on `corpus_example`: it knows every
operation and every map, and no composition.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Literal

from mhr_scale.errors import ConfigError, DataError, suggest
from mhr_scale.recipe.part import part
from mhr_scale.tasks.suite import ShotsConfig, Suite
from mhr_scale.tasks.task import Example, Intake, Task

__all__ = [
    "FORMATS",
    "LETTERS",
    "MAPS",
    "OPERATIONS",
    "ToyTasks",
    "compose",
    "corpus_example",
    "held_out_tasks",
    "make_tasks",
    "primitive_example",
    "split",
    "vocabulary",
]

LETTERS = "abcdefghijkl"

OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "rotate_left": lambda symbols: symbols[1:] + symbols[:1],
    "rotate_right": lambda symbols: symbols[-1:] + symbols[:-1],
    "tail": lambda symbols: symbols[1:],
    "init": lambda symbols: symbols[:-1],
    "sort": sorted,
    "every_second": lambda symbols: symbols[::2],
}

MAPS: dict[str, dict[str, str]] = {
    name: dict(zip(LETTERS, images))
    for name, images in {
        "identity": LETTERS,
        "plus1": LETTERS[1:] + LETTERS[:1],
        "minus1": LETTERS[-1:] + LETTERS[:-1],
        "mirror": LETTERS[::-1],
        "swap": "badcfehgjilk",
        "plus4": LETTERS[4:] + LETTERS[:4],
    }.items()
}

FORMATS: dict[str, Callable[[list[str]], list[str]]] = {
    "plain": lambda symbols: symbols,
    "before": lambda symbols: ["<", *symbols],
    "after": lambda symbols: [*symbols, ">"],
}

PRIMITIVES = (tuple(OPERATIONS), tuple(MAPS), tuple(FORMATS))
PARTS = {".".join(parts): parts for parts in product(*PRIMITIVES)}

SENTINELS = ("<extra_id_0>", "<extra_id_1>")
INSTRUCTION_WORDS = tuple(
    f"{kind}:{name}" for kind, names in zip(("op", "map", "fmt"), PRIMITIVES) for name in names
)
CONTROL_WORDS = tuple(f"do:{name}" for name in (*OPERATIONS, *MAPS))

SHORTEST, LONGEST = 4, 7
N_HELD_OUT = 10
N_TRAINABLE = len(PARTS) - N_HELD_OUT
HELD_OUT_AT_MOST = (2, 3, 4)  # tasks per operation, per map, per format
HELD_OUT_OPERATIONS_AT_LEAST = 6
HELD_OUT_TEST_EXAMPLES = 100

PRIMITIVE_SHARE = 0.6
SPAN_SHARE = 0.2
FOREIGN_SHARE = 0.3  # of the symbols of a copying example

#: Examples of a task, which are made in memory.
MOST_EXAMPLES = 100_000


@part
class ToyTasks(Suite):
    """The built-in compositional suite (list operation, symbol map, output format)."""

    suite: Literal["toy"]
    """Chooses this part."""
    fold: Literal["train", "held_out"] = "train"
    """The training tasks, or the 10 held-out compositions."""
    n_tasks: int = 60
    """Training tasks drawn from the 144 compositions, the 10 held-out ones excluded."""
    tasks: tuple[str, ...] = ()
    """Exactly these compositions, in this order, in place of those of `seed` and `n_tasks`."""
    train_examples: int = 200
    """Training examples per task."""
    validation_examples: int = 20
    """Held-out examples per training task."""
    instruction: Literal["none", "full", "code"] = "none"
    """none: the input does not tell the task; full: three instruction tokens describe it; code:
    three tokens tell it from all others and describe another one (a name without a meaning)."""
    seed: int = 0
    """Seed of the task split and of the examples."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        for name in ("train_examples", "validation_examples"):
            if not 0 <= getattr(self, name) <= MOST_EXAMPLES:
                raise ConfigError(
                    f"tasks.{name}: {getattr(self, name)} is not in 0..{MOST_EXAMPLES}"
                )

    def read_tasks(self, intake: Intake) -> list[Task]:
        """The training tasks or the held-out ones; no row of them is ever refused."""
        return make_tasks(self) if self.fold == "train" else held_out_tasks(self)

    def check_few_shot(self, shots: ShotsConfig) -> None:
        """Raise `ConfigError` unless the tasks are held out."""
        Suite.check_few_shot(self, shots)
        if self.fold != "held_out":
            raise ConfigError(
                f"tasks.fold: {self.fold} tasks were trained on; the few-shot tasks of suite toy "
                "are fold: held_out"
            )


def make_tasks(config: ToyTasks) -> list[Task]:
    """Return the training tasks; more tasks begin with the same ones.

    From eight tasks on they show every primitive. The letter strings do not depend on
    `config.instruction`.
    """
    if config.tasks:
        return [_training_task(name, config) for name in _named(config.tasks)]
    if not 1 <= config.n_tasks <= N_TRAINABLE:
        raise DataError(
            f"tasks.n_tasks: {config.n_tasks} is not in 1..{N_TRAINABLE}; of {len(PARTS)} "
            f"compositions {N_HELD_OUT} are held out"
        )
    _, trainable = split(config.seed)
    return [_training_task(name, config) for name in trainable[: config.n_tasks]]


def held_out_tasks(config: ToyTasks) -> list[Task]:
    """Return the ten compositions that no training task shows, with `train` and `test` examples.

    They do not depend on `config.n_tasks`; every primitive in them is seen in training if that is
    at least eight.
    """
    held_out = _named(config.tasks) or split(config.seed)[0]
    return [_held_out_task(name, config) for name in held_out]


def split(seed: int) -> tuple[list[str], list[str]]:
    """Names of the held-out compositions, and of the others in the order training takes them."""
    rng = random.Random(f"{seed}:split")
    names = list(PARTS)
    held_out: list[str] = []
    operations: set[str] = set()
    while len(held_out) < N_HELD_OUT or len(operations) < HELD_OUT_OPERATIONS_AT_LEAST:
        rng.shuffle(names)
        held_out = _balanced(names)
        operations = {PARTS[name][0] for name in held_out}
    return held_out, _cover_first([name for name in names if name not in held_out])


def compose(name: str, symbols: str) -> str:
    """Apply the composition `name` to blank-separated letters."""
    if name not in PARTS:
        raise DataError(f"no composition is named '{name}'{suggest(name, PARTS)}")
    letters = symbols.split()
    foreign = [letter for letter in letters if letter not in MAPS["identity"]]
    if foreign:
        raise DataError(f"'{foreign[0]}' is not one of the letters {' '.join(LETTERS)}")
    operation, mapping, layout = PARTS[name]
    images = [MAPS[mapping][letter] for letter in OPERATIONS[operation](letters)]
    return " ".join(FORMATS[layout](images))


def corpus_example(rng: random.Random) -> tuple[str, str]:
    """Draw input and target of one example of the backbone's corpus."""
    draw = rng.random()
    if draw < PRIMITIVE_SHARE:
        return primitive_example(rng)
    if draw < PRIMITIVE_SHARE + SPAN_SHARE:
        return _span_example(rng)
    return _copy_example(rng)


def primitive_example(rng: random.Random) -> tuple[str, str]:
    """Draw a string behind a control word, and what that one operation or map makes of it."""
    name = rng.choice((*OPERATIONS, *MAPS))
    symbols = " ".join(_letters(rng, SHORTEST, LONGEST))
    composition = f"{name}.identity.plain" if name in OPERATIONS else f"copy.{name}.plain"
    return f"do:{name} {symbols}", compose(composition, symbols)


def vocabulary() -> list[str]:
    """Return every symbol of the suite and of the corpus, in the order of the token ids."""
    special = ("<pad>", "</s>", "<unk>")
    return [*special, *SENTINELS, *LETTERS, "<", ">", *INSTRUCTION_WORDS, *CONTROL_WORDS]


def _named(names: Sequence[str]) -> list[str]:
    """The compositions a recipe names; raises `DataError` for unknown ones and repetitions."""
    for name in names:
        if name not in PARTS:
            raise DataError(f"tasks.tasks: no composition is named '{name}'{suggest(name, PARTS)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"tasks.tasks: '{twice}' stands twice; leave one out")
    return list(names)


def _balanced(names: list[str]) -> list[str]:
    """Take names in order while no primitive is in more tasks than it may be."""
    picked: list[str] = []
    counts: Counter[str] = Counter()
    for name in names:
        if all(counts[part] < most for part, most in zip(PARTS[name], HELD_OUT_AT_MOST)):
            picked.append(name)
            counts.update(PARTS[name])
    return picked[:N_HELD_OUT]


def _cover_first(names: list[str]) -> list[str]:
    """Move eight names to the front that between them show every primitive.

    Each brings a new operation, and a new map and format while there are any left. The held-out
    limits leave such a name at every pick.
    """
    front: list[str] = []
    missing = [set(primitives) for primitives in PRIMITIVES]
    while missing[0]:
        pick = next(
            name
            for name in names
            if all(part in left or not left for part, left in zip(PARTS[name], missing))
        )
        front.append(pick)
        for primitive, left in zip(PARTS[pick], missing):
            left.discard(primitive)
    return front + [name for name in names if name not in front]


def _training_task(name: str, config: ToyTasks) -> Task:
    # The smaller fold comes first: it does not move when the number of training examples does.
    taken: set[str] = set()
    validation = _fold(name, "validation", config.validation_examples, config, taken)
    train = _fold(name, "train", config.train_examples, config, taken)
    return Task(name=name, train=train, validation=validation, metric="exact_match")


def _held_out_task(name: str, config: ToyTasks) -> Task:
    taken: set[str] = set()
    test = _fold(name, "test", HELD_OUT_TEST_EXAMPLES, config, taken)
    train = _fold(name, "train", config.train_examples, config, taken)
    return Task(name=name, train=train, test=test, metric="exact_match")


def _fold(
    name: str, fold: str, count: int, config: ToyTasks, taken: set[str]
) -> tuple[Example, ...]:
    """Draw `count` examples whose strings are not `taken`, and take them."""
    rng = random.Random(f"{config.seed}:{name}:{fold}")
    prefix = {"none": "", "full": _instruction(name), "code": _instruction(_codes()[name])}
    examples = []
    for number in range(count):
        symbols = " ".join(_letters(rng, SHORTEST, LONGEST))
        while symbols in taken:
            symbols = " ".join(_letters(rng, SHORTEST, LONGEST))
        taken.add(symbols)
        target = compose(name, symbols)
        choices = _distractors(name, symbols, rng)
        label = rng.randrange(len(choices) + 1)
        choices.insert(label, target)
        examples.append(
            Example(
                id=f"{name}:{fold}:{number}",
                input=f"{prefix[config.instruction]} {symbols}".strip(),
                targets=(target,),
                choices=tuple(choices),
                label=label,
            )
        )
    return tuple(examples)


def _instruction(name: str) -> str:
    operation, mapping, layout = PARTS[name]
    return f"op:{operation} map:{mapping} fmt:{layout}"


@cache
def _codes() -> dict[str, str]:
    """For every composition another one, whose description is its name under `code`."""
    names = list(PARTS)
    random.Random("codes").shuffle(names)
    return dict(zip(names, names[1:] + names[:1]))


def _distractors(name: str, symbols: str, rng: random.Random) -> list[str]:
    """Draw an answer from each group of rivals, none of them right and no two the same."""
    answers = [compose(name, symbols)]
    for rivals in _rivals(name):
        answer = compose(rng.choice(rivals), symbols)
        while answer in answers:
            answer = compose(rng.choice(rivals), symbols)
        answers.append(answer)
    return answers[1:]


@cache
def _rivals(name: str) -> tuple[tuple[str, ...], ...]:
    """Compositions with another operation only, map only, format only, and all remoter ones."""
    primitives = PARTS[name]
    groups: tuple[list[str], ...] = ([], [], [], [])
    for rival, parts in PARTS.items():
        changed = [kind for kind, part in enumerate(primitives) if parts[kind] != part]
        if changed:
            groups[changed[0] if len(changed) == 1 else -1].append(rival)
    return tuple(tuple(group) for group in groups)


def _letters(rng: random.Random, shortest: int, longest: int) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest))]


def _pattern(rng: random.Random) -> list[str]:
    """Draw four to eight letters that are random, a progression, sorted, or made of two parts."""
    length = rng.randint(4, 8)
    kind = rng.choice(("random", "progression", "sorted", "palindrome", "repeat", "mapped"))
    if kind == "random":
        return _letters(rng, 4, 8)
    if kind == "sorted":
        return sorted(_letters(rng, 4, 8))
    if kind == "progression":
        start, stride = rng.randrange(len(LETTERS)), rng.choice((1, -1, 2, -2, 3, 4))
        return [LETTERS[(start + stride * step) % len(LETTERS)] for step in range(length)]
    half = _letters(rng, 2, 4)
    if kind == "palindrome":
        return half + half[::-1]
    if kind == "repeat":
        return (half * 3)[:length]
    images = MAPS[rng.choice(tuple(MAPS))]
    return half + [images[letter] for letter in half]


def _span_example(rng: random.Random) -> tuple[str, str]:
    """Hide up to three letters of a pattern behind a sentinel, in T5's notation."""
    letters = _pattern(rng)
    start = rng.randrange(len(letters))
    end = start + rng.randint(1, 3)
    opening, closing = SENTINELS
    source = [*letters[:start], opening, *letters[end:]]
    return " ".join(source), " ".join([opening, *letters[start:end], closing])


def _copy_example(rng: random.Random) -> tuple[str, str]:
    """Copy a pattern, part of it replaced, which is where markers and instruction words are met."""
    foreign = (*LETTERS, "<", ">", *INSTRUCTION_WORDS)
    symbols = " ".join(
        rng.choice(foreign) if rng.random() < FOREIGN_SHARE else letter for letter in _pattern(rng)
    )
    return f"do:copy {symbols}", symbols
