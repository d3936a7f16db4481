"""Paired tests of two models over the same seeds, or over the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import binomtest, t, ttest_rel


@dataclass(frozen=True)
class PairedDifference:
    """
    Paired difference of two lists of results.

    Args:
        mean (`float`): mean of the differences, first minus second.
        deviation (`float`): standard deviation of the differences; NaN with one pair.
        standard_error (`float`): standard error of the mean; NaN with one pair.
        p_value (`float`): p value of the two-sided paired t-test; NaN with one pair, 1 if all differences are 0.
        count (`int`): number of pairs.
    """

    mean: float
    deviation: float
    standard_error: float
    p_value: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of the width of the 95% interval of the mean."""
        return float(t.ppf(0.975, self.count - 1)) * self.standard_error


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """
    Compare the results of two models over the same seeds.

    Args:
        values, baseline (`Sequence[float]`): one result per seed, in the same order of seeds.

    Returns:
        [`PairedDifference`] of `values` minus `baseline`.

    Raises:
        ValueError: There are no pairs, or the lengths differ.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(
            f"`values` and `baseline` must have one result per seed each, got {len(values)} and {len(baseline)}."
        )
    gaps = [one - other for one, other in zip(values, baseline)]
    if len(gaps) == 1:
        return PairedDifference(gaps[0], math.nan, math.nan, math.nan, 1)
    deviation = stdev(gaps)
    p_value = float(ttest_rel(values, baseline).pvalue) if any(gaps) else 1.0
    return PairedDifference(mean(gaps), deviation, deviation / math.sqrt(len(gaps)), p_value, len(gaps))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values of one family of tests with Holm's correction, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def exact_sign_test(lost: int, won: int) -> float:
    """
    Return the two-sided p value of McNemar's exact test, the sign test over the items that change.

    Args:
        lost (`int`): number of items that only the other model gets right.
        won (`int`): number of items that only this model gets right.
    """
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
