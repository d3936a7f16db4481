"""Paired tests by hand."""

import math

import pytest

from trips_examples.analysis.paired import exact_sign_test, holm, paired_difference


def test_difference_over_three_seeds():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 * sqrt(3) with 2 degrees of freedom."""
    gap = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * math.sqrt(3)
    assert (gap.mean, gap.deviation, gap.count) == (2.0, 1.0, 3)
    assert gap.standard_error == pytest.approx(1 / math.sqrt(3))
    # With 2 degrees of freedom the distribution has a closed form.
    assert gap.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_pairs_count_and_not_the_spread_over_seeds():
    """The seeds differ by far more than the models."""
    gap = paired_difference([10.0, 50.0, 90.1], [11.0, 51.1, 91.0])
    assert gap.mean == pytest.approx(-1.0) and gap.p_value < 0.01


def test_no_difference_and_one_seed():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    alone = paired_difference([3.0], [1.0])
    assert alone.mean == 2.0 and math.isnan(alone.standard_error) and math.isnan(alone.p_value)


def test_unequal_numbers_of_seeds():
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("lost", "won", "p_value"), [(0, 0, 1.0), (5, 5, 1.0), (9, 1, 2 * 11 / 2**10), (0, 6, 2 / 2**6)]
)
def test_items_that_change(lost, won, p_value):
    assert exact_sign_test(lost, won) == exact_sign_test(won, lost) == pytest.approx(p_value)


def test_the_interval_of_three_differences_by_hand():
    # Differences 1, 2, 3: a standard error of 1 / sqrt(3), times the t quantile of two degrees of freedom.
    assert paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).half_width == pytest.approx(4.302653 / 3**0.5)


def test_holm_by_hand():
    # Sorted: 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
