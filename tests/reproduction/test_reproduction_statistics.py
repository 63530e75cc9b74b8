"""Paired comparisons and Holm's correction against the textbook."""

import math

import pytest
from scipy import stats

from reproduction.statistics import against_zero, holm, mean_and_std, slopes_over_log2, within


def test_a_paired_comparison_has_the_interval_and_p_of_the_textbook():
    # 1..5: t = 3 / (sqrt(2.5) / sqrt(5)) = 3 sqrt(2), 4 degrees of freedom, t(0.975) = 2.776445
    found = against_zero([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found.n == 5
    assert found.mean == pytest.approx(3.0)
    assert found.std == pytest.approx(math.sqrt(2.5))
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert found.p_t == pytest.approx(2 * stats.t.sf(3 * math.sqrt(2), 4))


@pytest.mark.parametrize("n", [2, 5, 6])
def test_the_sign_flip_test_of_one_sided_differences_is_two_in_two_to_the_n(n: int):
    found = against_zero([1.0 + 0.1 * number for number in range(n)])
    assert found.p_flip == pytest.approx(2 / 2**n)


def test_the_sign_flip_test_counts_every_flip_that_is_as_far():
    # sums of +-1 +-2 +-3 with an absolute value of at least |1 - 2 + 3| = 2: all but those of 0
    assert against_zero([1.0, -2.0, 3.0]).p_flip == pytest.approx(6 / 8)


def test_two_seeds_have_the_interval_of_one_degree_of_freedom():
    found = against_zero([1.0, 3.0])
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(12.7062, abs=1e-4)
    assert found.p_t == pytest.approx(0.295167, abs=1e-6)


def test_identical_differences_of_zero_tell_nothing():
    found = against_zero([0.0, 0.0, 0.0])
    assert (found.std, found.low, found.high) == (0.0, 0.0, 0.0)
    assert (found.p_t, found.p_flip) == (1.0, 1.0)


def test_identical_differences_have_an_interval_without_width():
    found = against_zero([1.5, 1.5, 1.5, 1.5])
    assert (found.low, found.high, found.p_t) == (1.5, 1.5, 0.0)
    assert found.p_flip == pytest.approx(2 / 16)


def test_one_seed_has_a_mean_and_nothing_else():
    found = against_zero([4.0])
    assert (found.mean, found.std, found.low, found.high) == (4.0, None, None, None)
    assert (found.p_t, found.p_flip) == (None, None)


def test_equality_is_two_one_sided_tests_of_which_the_larger_counts():
    differences = [0.5, 1.0, 1.5, 0.8]
    found = within(differences, 2.0)
    upper = stats.ttest_1samp(differences, 2.0, alternative="less").pvalue
    assert found.p_t == pytest.approx(float(upper))
    assert found.p_flip == pytest.approx(1 / 16)
    assert found.mean == pytest.approx(0.95)


def test_equality_of_identical_values_is_certain_inside_the_margin_only():
    assert within([1.0, 1.0], 2.0).p_t == 0.0
    assert within([3.0, 3.0], 2.0).p_t == 1.0


def test_slopes_are_per_seed_and_per_doubling():
    assert slopes_over_log2({1: [0.0, 5.0], 2: [1.0, 3.0], 4: [2.0, 1.0]}) == pytest.approx(
        [1.0, -2.0]
    )


def test_holm_steps_down_and_never_decreases():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_single_value_has_no_spread():
    assert mean_and_std([2.0]) == (2.0, None)
    assert mean_and_std([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
