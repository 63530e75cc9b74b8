"""The paper's claims, the measures they compare, and the rule for verdicts, fixed before a run.

A claim is compared over seeds, pair by pair (see `statistics`):

    greater  the first measure is above the second
    order    every measure is above the next one: all adjacent pairs count, with the largest p
    equal    the two differ by less than a margin
    slope    the measures rise with log2 of their key, by the slopes of the seeds

Verdicts, from the 95 % t interval of the mean: a difference or slope *holds* if the interval lies
above 0, *does not hold* if it lies below, else *cannot be told*; `equal` holds if the interval lies
inside the margin, does not hold if it lies outside, else cannot be told. An order holds if all its
pairs hold, and does not hold if one of them does not. p values are shown but decide nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from reproduction.results import Measured
from reproduction.statistics import Paired, against_zero, holm, slopes_over_log2, within
from reproduction.study_suites import StudySuite

Verdict = Literal["holds", "does not hold", "cannot be told"]

RULE = (
    "The rule was fixed before the run. Differences are taken seed by seed. A claim of more "
    "*holds* if the 95 % t interval of the mean difference lies above 0, *does not hold* if it "
    "lies below, else it *cannot be told*; one of equality by an interval inside or outside "
    "its margin, in points. p: t-test and exact sign flips (two-sided; equality: two one-sided "
    "tests)."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A sentence of the paper and the measures that test it."""

    id: str
    place: str
    """Where in the paper; `control` for comparisons that it does not make."""
    text: str
    kind: Literal["greater", "order", "equal", "slope"]
    terms: tuple[str, ...]
    keys: tuple[int, ...] = ()
    """slope: the number that belongs to each term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRun:
    """A claim that this study cannot test, and why."""

    id: str
    place: str
    text: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result for one claim on one suite."""

    suite: str
    claim: Claim
    margin: float
    """Points within which two methods count as about equal."""
    verdict: Verdict
    seeds: tuple[int, ...] = ()
    parts: dict[str, Paired] = field(default_factory=dict)
    """The comparisons, by the names of what is compared."""
    p_t: float | None = None
    p_flip: float | None = None
    reason: str = ""
    """Why there is none, if there is no comparison."""


def _few(*ways: str) -> tuple[str, ...]:
    return tuple(f"few_shot/{way}" for way in ways)


def _greater(name: str, place: str, text: str, *terms: str) -> Claim:
    return Claim(id=name, place=place, text=text, kind="greater", terms=terms)


def _equal(name: str, place: str, text: str, *terms: str) -> Claim:
    return Claim(id=name, place=place, text=text, kind="equal", terms=terms)


TABLES = "few-shot tables"


def claims_of(suite: StudySuite) -> tuple[Claim, ...]:
    """The claims that a suite can test, in the order of the paper."""
    toy = (*_HEADS, *_SHARED_ROUTING) if suite.name == "toy" else ()
    controls = _CONTROLS if suite.name == "toy" else ()
    return (*_FEW_SHOT, *toy, *_AVERAGES, *_zero_shot(suite), *_alignment(suite), *controls)


_FEW_SHOT = (
    _greater("poly-lora", TABLES, "Poly is above LoRA", *_few("Poly", "LoRA")),
    _greater("mhr-lora", TABLES, "MHR is above LoRA", *_few("MHR", "LoRA")),
    _greater("mhr-poly", TABLES, "MHR is above Poly", *_few("MHR", "Poly")),
    Claim(
        id="order",
        place=TABLES,
        text="MHR above Poly above LoRA",
        kind="order",
        terms=_few("MHR", "Poly", "LoRA"),
    ),
    _equal("big-lora", TABLES, "LoRA with more numbers is no better", *_few("LoRA-big", "LoRA")),
    _greater("mhr-big", TABLES, "MHR is above LoRA with as many numbers", *_few("MHR", "LoRA-big")),
    _greater("mhr-ia3", TABLES, "MHR is above (IA)3", *_few("MHR", "(IA)3")),
    _greater("lora-ia3", TABLES, "LoRA is above (IA)3", *_few("LoRA", "(IA)3")),
    _greater("mhr-soup", TABLES, "MHR is above AdapterSoup", *_few("MHR", "AdapterSoup")),
    _greater("lora-soup", TABLES, "LoRA is above AdapterSoup", *_few("LoRA", "AdapterSoup")),
    _greater("z-heads", TABLES, "MHR-z is above Poly-z", *_few("MHR-z", "Poly-z")),
    _greater("z-lora", TABLES, "routing alone (MHR-z) is above LoRA", *_few("MHR-z", "LoRA")),
    _equal("z-full", TABLES, "MHR-z is about equal to MHR", *_few("MHR-z", "MHR")),
)

_HEADS = (
    Claim(
        id="z-slope",
        place="Tab. 6, Fig. 2",
        text="z-tuning gains from heads (1 to 16; points per doubling)",
        kind="slope",
        terms=_few("Poly-z", "MHR-z (2 heads)", "MHR-z (4 heads)", "MHR-z", "MHR-z (16 heads)"),
        keys=(1, 2, 4, 8, 16),
    ),
    _greater(
        "heads-modules",
        "Fig. 3 right",
        "at an equal pool more heads (8 x 4 skills) beat more modules (1 x 8 skills)",
        *_few("MHR", "Poly (8 skills)"),
    ),
    _greater(
        "heads-modules-z",
        "Fig. 3 right",
        "the same under z-tuning",
        *_few("MHR-z", "Poly-z (8 skills)"),
    ),
)

_SHARED_ROUTING = (
    _greater(
        "granularity",
        "Fig. 2",
        "z-tuning: a routing per linear is above one for the model",
        *_few("MHR-z", "MHR-z (one routing)"),
    ),
    _greater(
        "small-z",
        "Fig. 2",
        "heads are a better use of few numbers: MHR-z with a routing per block is above Poly-z "
        "with one per linear",
        *_few("MHR-z (routing per block)", "Poly-z"),
    ),
)

_AVERAGES = (
    _equal("mu-mhr", "Tab. 4", "MHR-mu is about equal to MHR", *_few("MHR-mu", "MHR")),
    _equal("mu-poly", "Tab. 4", "Poly-mu is about equal to Poly", *_few("Poly-mu", "Poly")),
    _greater("mu-heads", "Tab. 4", "MHR-mu is above Poly-mu", *_few("MHR-mu", "Poly-mu")),
    _greater("mu-lora", "Tab. 4", "MHR-mu is above LoRA", *_few("MHR-mu", "LoRA")),
    _equal("random-lora", "Tab. 4", "Random-mu is about equal to LoRA", *_few("Random-mu", "LoRA")),
    _greater(
        "random-mu",
        "Tab. 4",
        "learned routing matters: MHR-mu above Random-mu",
        *_few("MHR-mu", "Random-mu"),
    ),
)

_CONTROLS = (
    _greater(
        "code",
        "control",
        "MHR is above LoRA whose input names the task by an arbitrary code",
        *_few("MHR", "LoRA (task code)"),
    ),
    _greater(
        "code-lora",
        "control",
        "a task code lifts LoRA",
        *_few("LoRA (task code)", "LoRA"),
    ),
    _greater("more-skills", "control", "8 skills are above 4", *_few("MHR (8 skills)", "MHR")),
    _equal(
        "layout",
        "control",
        "at an equal pool, skills on fewer linears (light layout) do as well",
        *_few("MHR (light)", "MHR"),
    ),
    _equal(
        "noise",
        "control",
        "relaxed Bernoulli noise makes no difference",
        *_few("MHR (relaxed Bernoulli)", "MHR"),
    ),
    _greater(
        "anneal-mu",
        "control",
        "annealing routing to uniform helps the average, few-shot",
        *_few("MHR-mu (annealed)", "MHR-mu"),
    ),
    _greater(
        "anneal-zero",
        "control",
        "annealing routing to uniform helps the average, zero-shot at k = 0",
        "zero_shot/MHR-mu (annealed)/0",
        "zero_shot/MHR-mu/0",
    ),
)


def _zero_shot(suite: StudySuite) -> tuple[Claim, ...]:
    place, first, last = "Tab. 5", suite.steps[1], suite.steps[-1]
    claims = [
        _greater(
            f"steps-{way.lower()}",
            place,
            f"extra steps lift {way} (k = {last} against 0)",
            f"zero_shot/{way}/{last}",
            f"zero_shot/{way}/0",
        )
        for way in ("Poly-mu", "MHR-mu")
    ]
    for k in dict.fromkeys((first, last)):
        claims += [
            _greater(
                f"zero-{way.lower()}-{k}",
                place,
                f"{way} is above LoRA, both after k = {k}",
                f"zero_shot/{way}/{k}",
                f"zero_shot/LoRA/{k}",
            )
            for way in ("Poly-mu", "MHR-mu")
        ]
    claims.append(
        _greater(
            "zero-heads",
            place,
            f"MHR-mu is above Poly-mu after k = {first}",
            f"zero_shot/MHR-mu/{first}",
            f"zero_shot/Poly-mu/{first}",
        )
    )
    claims.append(
        _equal(
            "steps-lora",
            place,
            f"extra steps do nothing for LoRA (k = {last} against 0)",
            f"zero_shot/LoRA/{last}",
            "zero_shot/LoRA/0",
        )
    )
    return tuple(claims)


def _alignment(suite: StudySuite) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            id=f"alignment-{regime}",
            place="Fig. 3",
            text=f"gradients of tasks align more in MHR than in Poly than in LoRA ({regime})",
            kind="order",
            terms=tuple(f"alignment/{regime}/{name}" for name in ("MHR", "Poly", "LoRA")),
        )
        for regime in suite.regimes
    )


NOT_RUN = (
    NotRun(
        id="t0",
        place="few-shot tables (T0)",
        text="the figures on T0's 11 held-out tasks (T5-XL, T0-3B, T0-11B)",
        why="needs those backbones and a GPU; the recipes are t0_few_shot.yaml and "
        "t5_xl_p3_mhr64.yaml",
    ),
    NotRun(
        id="t0-11b-zero-shot",
        place="Tab. 5",
        text="over T0-11B averages need no extra steps (k = 0 is above LoRA)",
        why="needs an 11-billion-weight backbone that is trained on the tasks already",
    ),
    NotRun(
        id="size",
        place="few-shot tables (T0)",
        text="gains grow or shrink with the backbone (3B to 11B)",
        why="needs several backbones of one kind",
    ),
    NotRun(
        id="full",
        place="few-shot tables (T0)",
        text="full multi-task fine-tuning, then LoRA, does as well as MHR",
        why="pre-training that moves the backbone is not part of this system",
    ),
    NotRun(
        id="speed",
        place="text",
        text="heads cost no noticeable time",
        why="times on a shared CPU say nothing of a GPU; see tests/benchmarks/step_time.py",
    ),
)


def judge(suite: StudySuite, measured: Measured) -> list[Finding]:
    """The result for every claim of a suite."""
    return [judge_claim(suite, claim, measured) for claim in claims_of(suite)]


def judge_claim(suite: StudySuite, claim: Claim, measured: Measured) -> Finding:
    """The result for one claim, over the seeds that have all its measures."""
    missing = [term for term in claim.terms if term not in measured.values]
    seeds, values = measured.paired(*claim.terms)
    if missing or not seeds:
        reason = f"not measured: {', '.join(missing) or 'no seed has all'}"
        return Finding(
            suite=suite.name,
            claim=claim,
            margin=suite.margin,
            verdict="cannot be told",
            reason=reason,
        )
    parts = _parts(claim, values, suite.margin)
    comparisons = list(parts.values())
    return Finding(
        suite=suite.name,
        claim=claim,
        margin=suite.margin,
        verdict=verdict_of_all([verdict(paired, claim, suite.margin) for paired in comparisons]),
        seeds=tuple(seeds),
        parts=parts,
        p_t=_largest([paired.p_t for paired in comparisons]),
        p_flip=_largest([paired.p_flip for paired in comparisons]),
    )


def _parts(claim: Claim, values: Sequence[Sequence[float]], margin: float) -> dict[str, Paired]:
    """The comparisons that a claim consists of."""
    if claim.kind == "slope":
        slopes = slopes_over_log2(dict(zip(claim.keys, values, strict=True)))
        return {"slope over log2": against_zero(slopes)}
    parts = {}
    for (first, a), (second, b) in pairwise(zip(claim.terms, values, strict=True)):
        differences = [x - y for x, y in zip(a, b, strict=True)]
        is_equal = claim.kind == "equal"
        paired = within(differences, margin) if is_equal else against_zero(differences)
        parts[f"{first} - {second}"] = paired
    return parts


def verdict(paired: Paired, claim: Claim, margin: float) -> Verdict:
    """The declared rule, applied to one comparison."""
    low, high = paired.low, paired.high
    if low is None or high is None:
        return "cannot be told"
    if claim.kind == "equal":
        if low > -margin and high < margin:
            return "holds"
        return "does not hold" if low > margin or high < -margin else "cannot be told"
    if low > 0.0:
        return "holds"
    return "does not hold" if high < 0.0 else "cannot be told"


def verdict_of_all(verdicts: Sequence[Verdict]) -> Verdict:
    """All comparisons have to hold; a single one that does not hold decides."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if all(verdict == "holds" for verdict in verdicts) else "cannot be told"


def _largest(p_values: Sequence[float | None]) -> float | None:
    known = [p for p in p_values if p is not None]
    return max(known) if len(known) == len(p_values) else None


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings with Holm's correction over all of them that have a p, by both tests."""
    entries = [{**asdict(finding), "p_t_holm": None, "p_flip_holm": None} for finding in findings]
    for name in ("p_t", "p_flip"):
        tested = [entry for entry in entries if entry[name] is not None]
        for entry, adjusted in zip(tested, holm([e[name] for e in tested]), strict=True):
            entry[f"{name}_holm"] = adjusted
    return entries
