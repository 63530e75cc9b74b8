"""Points for answers, on cases worked out by hand."""

import logging

import pytest

from mhr_scale.tasks import metrics
from mhr_scale.tasks.metrics import accuracy, best_choice, exact_match, rouge_l

REFERENCES = ["The cat sat.", "A dog ran away", "7 of them"]


@pytest.fixture
def fresh_warning(monkeypatch):
    monkeypatch.setattr(metrics, "_warned", [])


@pytest.mark.parametrize(
    ("prediction", "reference", "points"),
    [
        ("the cat sat", "the cat sat", 100.0),
        ("The CAT, sat!", "the cat sat", 100.0),
        ("the cat", "the cat sat down", 100 * 2 * 1.0 * 0.5 / 1.5),  # precision 1, recall 1/2
        ("sat cat the", "the cat sat", 100 / 3),  # the longest common subsequence is one word
        ("running quickly", "runs quick", 50.0),  # Porter: run/run, quickli/quick
        ("a b c d", "a x c y", 50.0),
        ("", "the cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, points):
    assert rouge_l(prediction, [reference]) == pytest.approx(points)


@pytest.mark.parametrize(
    ("prediction", "reference", "points"),
    [
        ("Yes.", "yes", 100.0),
        ("  two   words\n", "two words", 100.0),
        ("don't", "dont", 100.0),
        ("no", "yes", 0.0),
        ("yes it is", "yes", 0.0),
        ("\u00e9t\u00e9!", "\u00c9T\u00c9", 100.0),
        ("", "...", 100.0),
    ],
)
def test_exact_match_by_hand(prediction, reference, points):
    assert exact_match(prediction, [reference]) == points


@pytest.mark.parametrize("metric", [rouge_l, exact_match])
def test_each_reference_against_all_of_them_gives_100(metric):
    assert [metric(text, REFERENCES) for text in REFERENCES] == [100.0] * len(REFERENCES)


@pytest.mark.parametrize("metric", [rouge_l, exact_match])
def test_the_best_reference_counts_wherever_it_stands(metric):
    alone = [metric("a dog ran away", [text]) for text in REFERENCES]
    assert len(set(alone)) > 1
    assert metric("a dog ran away", REFERENCES) == max(alone)
    assert metric("a dog ran away", REFERENCES[::-1]) == max(alone)


def test_accuracy_takes_the_smallest_score_and_the_first_of_equal_ones():
    assert accuracy([2.0, 0.5, 1.0], "abc", 1) == 100.0
    assert accuracy([2.0, 0.5, 1.0], "abc", 0) == 0.0
    assert best_choice([3.0, 1.0, 1.0]) == 1
    assert best_choice([4.0]) == 0


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_choice_is_right_by_its_text_wherever_the_same_text_is_labelled(label):
    assert accuracy([1.0, 1.0, 3.0], ["yes", "yes", "no"], label) == 100.0 * (label < 2)


def test_rouge_l_warns_once_of_references_it_cannot_see(caplog, fresh_warning):
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        assert rouge_l("\u732b", ["\u732b"]) == 0.0
        assert rouge_l("\u72ac", ["\u72ac", "dog"]) == 0.0
    assert len(caplog.records) == 1
    assert "\u732b" in caplog.text
    assert exact_match("\u732b", ["\u732b"]) == 100.0


def test_rouge_l_does_not_warn_of_answers_or_of_capitals(caplog, fresh_warning):
    with caplog.at_level(logging.WARNING, logger="mhr_scale"):
        rouge_l("", ["B"])
        rouge_l("\u732b", ["7"])
    assert not caplog.records
