"""How a claim gets its verdict."""

import pytest

from reproduction import claims
from reproduction.claims import Claim, Finding, claims_of, judge
from reproduction.results import Measured
from reproduction.study_suites import SUITES, TOY

SEEDS = (1, 2, 3, 4, 5)


def measured(**values: list[float]) -> Measured:
    found = Measured()
    for name, numbers in values.items():
        for seed, number in zip(SEEDS, numbers):
            found.values[name][seed] = number
    return found


def claim(kind: str, *terms: str, keys: tuple[int, ...] = ()) -> Claim:
    return Claim(id="x", place="here", text="so", kind=kind, terms=terms, keys=keys)  # type: ignore[arg-type]


def found(one: Claim, values: Measured) -> Finding:
    return claims.judge_claim(TOY, one, values)


BASE = [50.0, 52.0, 48.0, 51.0, 49.0]


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        ([5.0, 6.0, 4.0, 5.5, 4.5], "holds"),
        ([-5.0, -6.0, -4.0, -5.5, -4.5], "does not hold"),
        ([5.0, -6.0, 4.0, -5.5, 4.5], "cannot be told"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], "cannot be told"),
    ],
)
def test_a_difference_is_judged_by_its_interval(shift: list[float], verdict: str):
    values = measured(a=[x + y for x, y in zip(BASE, shift)], b=BASE)
    assert found(claim("greater", "a", "b"), values).verdict == verdict


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        ([0.2, -0.1, 0.3, 0.0, 0.1], "holds"),
        ([5.0, 5.2, 4.8, 5.1, 4.9], "does not hold"),
        ([1.0, 3.0, 2.0, 1.5, 2.5], "cannot be told"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], "holds"),
    ],
)
def test_equality_is_judged_against_the_margin(shift: list[float], verdict: str):
    values = measured(a=[x + y for x, y in zip(BASE, shift)], b=BASE)
    assert found(claim("equal", "a", "b"), values).verdict == verdict


def test_an_order_needs_all_its_pairs_and_shows_the_larger_p():
    rising = [x + y for x, y in zip(BASE, [5.0, 6.0, 4.0, 5.5, 4.5])]
    unclear = [x + y for x, y in zip(BASE, [1.0, -1.0, 2.0, -2.0, 0.5])]
    values = measured(a=rising, b=BASE, c=unclear)
    one = found(claim("order", "a", "b", "c"), values)
    assert one.verdict == "cannot be told"
    assert list(one.parts) == ["a - b", "b - c"]
    assert one.p_t == max(part.p_t or 0.0 for part in one.parts.values())
    assert found(claim("order", "b", "a"), values).verdict == "does not hold"
    assert found(claim("order", "b", "a", "c"), values).verdict == "does not hold"


def test_a_slope_is_one_number_per_seed():
    steeper = {f"h{h}": [x + n * (1 + 0.1 * x / 50) for x in BASE] for n, h in enumerate((1, 2, 4))}
    one = found(claim("slope", "h1", "h2", "h4", keys=(1, 2, 4)), measured(**steeper))
    assert one.verdict == "holds"
    assert one.parts["slope over log2"].n == 5
    assert one.parts["slope over log2"].mean == pytest.approx(1.1)


def test_only_seeds_that_both_have_are_compared():
    values = measured(a=[9.0, 9.5, 8.5, 9.2], b=BASE)
    one = found(claim("greater", "a", "b"), values)
    assert one.seeds == (1, 2, 3, 4)
    assert one.verdict == "does not hold"


def test_what_was_not_measured_cannot_be_told_and_says_so():
    one = found(claim("greater", "a", "c"), measured(a=BASE))
    assert (one.verdict, one.reason) == ("cannot be told", "not measured: c")
    assert one.p_t is None


def test_one_seed_cannot_tell_anything():
    values = measured(a=[60.0], b=[50.0])
    one = found(claim("greater", "a", "b"), values)
    assert (one.verdict, one.parts["a - b"].mean) == ("cannot be told", 10.0)


def test_holm_is_over_all_findings_with_a_p():
    rising = [x + y for x, y in zip(BASE, [5.0, 6.0, 4.0, 5.5, 4.5])]
    values = measured(a=rising, b=BASE)
    both = [found(claim("greater", "a", "b"), values), found(claim("greater", "a", "c"), values)]
    first, second = claims.to_json([*both[:1], *both[:1], *both[1:]])[:2]
    assert first["p_t_holm"] == pytest.approx(2 * first["p_t"])
    assert second["p_flip_holm"] == pytest.approx(2 * second["p_flip"])
    assert claims.to_json(both)[1]["p_t_holm"] is None


@pytest.mark.parametrize("name", list(SUITES))
def test_every_claim_is_about_measures_that_the_suite_takes(name: str):
    suite = SUITES[name]
    ways = {f"few_shot/{way}" for method in suite.methods for way in method.ways}
    zero = {f"zero_shot/{way}/{k}" for way in suite.zero_shot.values() for k in suite.steps}
    cosines = {f"alignment/{regime}/{m}" for regime in suite.regimes for m in suite.aligned}
    for one in claims_of(suite):
        assert set(one.terms) <= ways | zero | cosines, one.id
        assert len(one.keys) == (len(one.terms) if one.kind == "slope" else 0)
    ids = [one.id for one in claims_of(suite)]
    assert len(set(ids)) == len(ids)


def test_a_suite_is_judged_claim_by_claim():
    findings = judge(TOY, measured(**{"few_shot/MHR": BASE, "few_shot/LoRA": BASE}))
    assert [finding.claim.id for finding in findings] == [one.id for one in claims_of(TOY)]
    told = {finding.claim.id for finding in findings if finding.parts}
    assert told == {"mhr-lora"}
