"""Intervals and p values, beside what all possible outcomes say."""

import math
import random
from fractions import Fraction
from itertools import product

import pytest

from engine.intervals import Z, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    "only_a, only_b", [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (4, 5), (3, 12)]
)
def test_the_p_value_counts_the_outcomes_of_as_many_coins(only_a: int, only_b: int) -> None:
    tosses = only_a + only_b
    uneven = [
        abs(2 * sum(coins) - tosses) >= abs(only_a - only_b)
        for coins in product((0, 1), repeat=tosses)
    ]
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == sum(uneven) / len(uneven)


def test_the_p_value_of_large_counts_is_exact_and_does_not_overflow() -> None:
    tail = sum(math.comb(4000, heads) for heads in range(1901))
    assert mcnemar(1900, 2100) == float(Fraction(2 * tail, 2**4000))
    assert mcnemar(5000, 5000) == 1
    assert mcnemar(5000, 0) == 0  # smaller than any float


def test_equal_models_are_called_different_at_most_five_times_in_a_hundred() -> None:
    for tosses in range(1, 200):  # all outcomes, by their probabilities
        found = [math.comb(tosses, a) for a in range(tosses + 1) if mcnemar(a, tosses - a) < 0.05]
        assert sum(found) <= 0.05 * 2**tosses
    draw = random.Random(0)
    said = 0
    for _ in range(1000):  # each right at 30 % of the images, by chance
        right = [(draw.random() < 0.3, draw.random() < 0.3) for _ in range(200)]
        said += mcnemar(right.count((True, False)), right.count((False, True))) < 0.05
    assert 10 < said <= 50


def test_wilsons_interval_ends_where_a_share_is_two_deviations_away() -> None:
    for hits, count in ((0, 10), (1, 10), (10, 10), (37, 100), (4000, 10_000)):
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high + 1e-15 <= 1 + 1e-15
        for end in {low, high} - {0.0}:
            deviation = math.sqrt(end * (1 - end) / count)
            assert abs(hits / count - end) == pytest.approx(Z * deviation, abs=1e-7)
    low, high = wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("a, b", [(0.1, 0.1), (0.2, 0.1), (0.05, 0.25), (0.02, 0.01)])
def test_the_paired_interval_holds_the_true_difference_nineteen_times_in_twenty(
    a: float, b: float
) -> None:
    """Over all outcomes of 60 images, of which a alone gets the share `a` right, b alone `b`."""
    count, covered, total = 60, 0.0, 0.0
    for x in range(count + 1):
        for y in range(count + 1 - x):
            rest = count - x - y
            ways = math.comb(count, x) * math.comb(count - x, y)
            probability = ways * a**x * b**y * (1 - a - b) ** rest
            low, high = paired_difference(x, y, count)
            total += probability
            covered += probability * (low <= a - b <= high)
    assert total == pytest.approx(1)
    assert covered > 0.94


def test_the_paired_interval_turns_with_the_models_and_agrees_with_the_test() -> None:
    assert paired_difference(1, 0, 1)[1] == 1
    for count in (10, 50, 10_000):
        for only_a in range(min(count, 60) + 1):
            for only_b in range(min(only_a, count - only_a) + 1):
                low, high = paired_difference(only_a, only_b, count)
                assert paired_difference(only_b, only_a, count) == pytest.approx((-high, -low))
                assert low <= (only_a - only_b) / count <= high
                if mcnemar(only_a, only_b) < 0.05:
                    assert low > 0
