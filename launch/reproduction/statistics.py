"""Paired comparisons over seeds: intervals, t-tests, exact sign-flip tests, Holm's correction.

Seeds are the samples: one difference per seed, in which two methods share the task split, the shots
and their order. With few seeds p of the sign-flip test is never small: its least two-sided value is
2 / 2**n, 0.0625 for five seeds.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Statistics of one sample of differences; None where they need more than one seed."""

    n: int
    mean: float
    std: float | None
    low: float | None
    """Lower end of the t interval of the mean, at `CONFIDENCE`."""
    high: float | None
    p_t: float | None
    """t-test; two-sided against 0, or against being outside a margin (see `within`)."""
    p_flip: float | None
    """The same null hypothesis, by all 2**n flips of signs."""


def against_zero(differences: Sequence[float]) -> Paired:
    """Whether the mean difference is not 0: two-sided tests."""
    return _paired(differences, _t(differences, "two-sided"), _flip(differences, "two-sided"))


def within(differences: Sequence[float], margin: float) -> Paired:
    """Whether the mean difference lies inside +-margin: two one-sided tests, the larger p."""
    above = [difference + margin for difference in differences]
    below = [difference - margin for difference in differences]
    p_t = _larger(_t(above, "greater"), _t(below, "less"))
    p_flip = _larger(_flip(above, "greater"), _flip(below, "less"))
    return _paired(differences, p_t, p_flip)


def slopes_over_log2(series: Mapping[int, Sequence[float]]) -> list[float]:
    """Per seed, the least-squares slope of its values over log2 of the keys."""
    x = np.log2(np.array(sorted(series), dtype=float))
    columns = zip(*(series[key] for key in sorted(series)), strict=True)
    return [float(stats.linregress(x, np.array(values)).slope) for values in columns]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _paired(values: Sequence[float], p_t: float | None, p_flip: float | None) -> Paired:
    mean, std = mean_and_std(values)
    low = high = None
    if std is not None:
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * std
        half /= math.sqrt(len(values))
        low, high = mean - half, mean + half
    return Paired(n=len(values), mean=mean, std=std, low=low, high=high, p_t=p_t, p_flip=p_flip)


def _t(values: Sequence[float], alternative: str) -> float | None:
    """p of a one-sample t-test of a mean of 0; without any spread, its limit."""
    if len(values) < 2:
        return None
    if statistics.pstdev(values) == 0.0:
        mean = values[0]
        is_far = {"two-sided": mean != 0, "greater": mean > 0, "less": mean < 0}[alternative]
        return 0.0 if is_far else 1.0
    return float(stats.ttest_1samp(values, 0.0, alternative=alternative).pvalue)


def _flip(values: Sequence[float], alternative: str) -> float | None:
    """p of the exact sign-flip test of a mean of 0."""
    if len(values) < 2:
        return None
    outcome: Any = stats.permutation_test(
        (np.array(values, dtype=float),),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative=alternative,
    )
    return float(outcome.pvalue)


def _larger(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else max(first, second)
