"""CrossFit's seven metrics: rows worked out by hand, and scipy and scikit-learn beside them."""

import math
import random

import pytest

from mhr_scale.tasks import metrics
from mhr_scale.tasks.crossfit.metrics import (
    OURS,
    TEXT_METRICS,
    macro_f1,
    matthews,
    pearson,
    rouge_words,
    same_text,
    squad_em,
    squad_f1,
)


@pytest.mark.parametrize(
    ("prediction", "references", "points"),
    [
        (" The cat! ", [" cat"], 100.0),
        ("an  apple a day", ["apple day"], 100.0),
        ("theory", ["the ory"], 0.0),
        ("a-b", ["ab"], 100.0),  # punctuation goes before articles are looked for
        ("a b", ["b"], 100.0),
        ("dog", ["cat", "Dog."], 100.0),
        ("dogs", ["dog"], 0.0),
    ],
)
def test_squad_em_by_hand(prediction, references, points):
    assert squad_em(prediction, references) == points


@pytest.mark.parametrize(
    ("prediction", "references", "points"),
    [
        (" Yes", [" yes"], 100.0),
        ("yes.", ["yes"], 0.0),
        ("the yes", ["yes"], 0.0),
        ("no", ["yes", "NO"], 100.0),
    ],
)
def test_same_text_by_hand(prediction, references, points):
    assert same_text(prediction, references) == points


@pytest.mark.parametrize(
    ("prediction", "references", "points"),
    [
        ("the big cat", ["a cat"], 100 * 2 * (1 / 2) * 1 / (3 / 2)),
        ("cat cat dog", ["cat cat cat"], 100 * 2 / 3),  # words count as often as in both
        ("dog", ["cat", "big dog", "dog, dog dog"], 100 * 2 / 3),
        ("the", ["a"], 0.0),  # nothing is left of either
        ("", ["cat"], 0.0),
    ],
)
def test_squad_f1_by_hand(prediction, references, points):
    assert squad_f1(prediction, references) == pytest.approx(points)


@pytest.mark.parametrize(
    ("prediction", "references", "points"),
    [
        ("the cat sat", ["the cat sat"], 100.0),
        ("the cat", ["the cat sat down"], 200 / 3),
        ("Cat", ["cat"], 0.0),  # no lower case here
        ("a a a b", ["a b"], 100.0),  # different words count
        ("cat, sat", ["cat sat"], 50.0),  # punctuation stays at its word
        ("dog runs. cat sat", ["cat sat. dog runs"], 100.0),  # sentence by sentence
        ("?!", ["?!"], 0.0),
        ("", ["cat"], 0.0),
        ("cat", ["dog", "cat"], 100.0),
        ("cat", ["..."], 0.0),  # the package fails here
        # what the package gives, rouge 1.0.1, get_scores(prediction, reference)["rouge-l"]["f"]
        ("w x. y z.  . x w", ["w y. x z w"], 88.88888839506174),
        ("c a b. b a", ["a b c. d c"], 85.7142852244898),
        ("no such thing here", ["there is a thing. no such one"], 54.54545408264463),
    ],
)
def test_rouge_words_by_hand(prediction, references, points):
    assert rouge_words(prediction, references) == pytest.approx(points, abs=1e-6)


def test_macro_f1_by_hand():
    # yes: said 2, right 2, hits 1: 1/2; no: said 1, right 2, hits 1: 2/3; maybe: said once, 0
    said = ["yes", " yes", "no", "maybe"]
    right = [[" yes", "no"], ["no"], ["no"], ["yes"]]
    assert macro_f1(said, right) == pytest.approx(100 * (1 / 2 + 2 / 3 + 0) / 3)


def test_matthews_by_hand():
    said = ["acceptable", " acceptable ", "Acceptable", "unacceptable"]
    right = [[" acceptable"], ["unacceptable"], ["unacceptable"], ["acceptable"]]
    # one right and one wrong of each kind: no correlation; the capital is no "acceptable"
    assert matthews(said, right) == pytest.approx(0.0)
    assert matthews(said, [[text] for text in said]) == pytest.approx(100.0)
    swapped = ["x" if text.strip() == "acceptable" else "acceptable" for text in said]
    assert matthews(swapped, [[text] for text in said]) == pytest.approx(-100.0)
    assert matthews(["acceptable"] * 4, right) == 0.0


def test_pearson_by_hand():
    right = [[" 1"], ["2"], ["3"], ["4"]]
    assert pearson([" 2.0", "4", "6", "8"], right) == pytest.approx(100.0)
    assert pearson(["4", "3", "2", "1e0"], right) == pytest.approx(-100.0)
    assert pearson(["1", "1", "1", "1.0"], right) == 0.0
    # the answer that is no number stands at the mean of 1, 2 and 3
    with_a_gap = pearson(["1", "2", "many", "3"], right)
    assert with_a_gap == pytest.approx(pearson(["1", "2", "2", "3"], right))
    assert 0.0 < with_a_gap < pearson(["1", "2", "3"], [["1"], ["2"], ["4"]])
    assert pearson(["many", "nan", "inf", "1e308"], right) == 0.0


def test_whole_metrics_are_those_of_scipy_and_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    from scipy.stats import pearsonr

    drawn = random.Random(0)
    labels = ["acceptable", "b", "c", "d"]
    for _ in range(20):
        said = [drawn.choice(labels) for _ in range(12)]
        right = [drawn.choice(labels[:3]) for _ in range(12)]
        listed = [[text] for text in right]
        theirs = sklearn.f1_score(right, said, average="macro", zero_division=0)
        assert macro_f1(said, listed) == pytest.approx(100 * theirs)
        ours, others = ([text == "acceptable" for text in texts] for texts in (said, right))
        theirs = sklearn.matthews_corrcoef(others, ours)
        assert matthews(said, listed) == pytest.approx(100 * theirs)
        xs, ys = ([drawn.gauss(0, 1e3) for _ in range(9)] for _ in range(2))
        found = pearson(list(map(str, xs)), [[str(y)] for y in ys])
        assert found == pytest.approx(100 * pearsonr(xs, ys)[0])


def test_every_metric_of_crossfit_has_one_of_ours():
    assert sorted(OURS.values()) == sorted(TEXT_METRICS)
    assert TEXT_METRICS.items() <= metrics.TEXT_METRICS.items()


def test_the_score_of_several_lines_is_their_mean_or_what_all_of_them_have():
    def line(metric, prediction, reference):
        points = metrics.text_metric(metric)(prediction, [reference])
        found = {"metric": metric, "points": points}
        return {**found, "prediction": prediction, "references": [reference]}

    pairs = [("yes", "yes"), ("yes", "no"), ("yes", "yes")]
    for metric, score in (("same_text", 200 / 3), ("macro_f1", 100 * (4 / 5 + 0) / 2)):
        lines = [line(metric, *pair) for pair in pairs]
        assert metrics.score_of(lines) == pytest.approx(score)
    assert math.isclose(metrics.score_of([line("pearson", "1", "2")]), 0.0)
