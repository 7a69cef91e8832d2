"""Intervals and tests by hand, against scipy, and against what must hold of any rows."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from agnews_lora.serving.stats import (
    Pairs,
    count_pairs,
    difference_interval,
    mcnemar_p_value,
)

counts = st.integers(0, 400)
some_pairs = st.builds(Pairs, counts, counts, counts, counts).filter(lambda pairs: pairs.num_rows > 0)


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.both, pairs.only_second, pairs.only_first, pairs.neither)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_every_row_is_counted_once(rows: list[tuple[bool, bool]]) -> None:
    first, second = np.asarray(rows, dtype=bool).T
    pairs = count_pairs(first, second)
    assert pairs.num_rows == len(rows)
    assert pairs.both + pairs.only_first == first.sum()
    assert pairs.both + pairs.only_second == second.sum()
    assert pairs.difference == pytest.approx(first.mean() - second.mean())
    assert count_pairs(second, first) == swapped(pairs)


@pytest.mark.parametrize(
    ("pairs", "worse", "two_sided"),
    [
        # Won 1, lost 4: P(X ≤ 1) of Binomial(5, 1/2). Rows that both get right or wrong do not matter.
        (Pairs(0, 1, 4, 0), 6 / 32, 12 / 32),
        (Pairs(50, 1, 4, 9), 6 / 32, 12 / 32),
        (Pairs(50, 1, 7, 2), 9 / 2**8, 2 * (comb(8, 0) + comb(8, 1)) / 2**8),
        (Pairs(0, 10, 0, 0), 1.0, 2 / 1024),
        (Pairs(0, 0, 10, 0), 1 / 1024, 2 / 1024),
        (Pairs(50, 0, 0, 2), 1.0, 1.0),
    ],
)
def test_the_tests_by_hand(pairs: Pairs, worse: float, two_sided: float) -> None:
    assert mcnemar_p_value(pairs, "less") == pytest.approx(worse)
    assert mcnemar_p_value(pairs, "two-sided") == pytest.approx(two_sided)


@given(some_pairs)
def test_the_two_sided_test_is_the_doubled_tail_of_a_fair_coin(pairs: Pairs) -> None:
    decided, smaller = pairs.only_first + pairs.only_second, min(pairs.only_first, pairs.only_second)
    expected = min(1.0, 2 * float(binom.cdf(smaller, decided, 0.5))) if decided else 1.0
    for each in (pairs, swapped(pairs)):
        assert mcnemar_p_value(each, "two-sided") == pytest.approx(expected, abs=1e-12)


@given(some_pairs)
def test_the_interval_of_a_difference_is_the_formula_of_the_paper(pairs: Pairs) -> None:
    rows = pairs.num_rows + 2
    first, second = (pairs.only_first + 1) / rows, (pairs.only_second + 1) / rows
    half = norm.ppf(0.975) * sqrt((first + second - (first - second) ** 2) / rows)
    low, high = difference_interval(pairs)
    assert low == pytest.approx(max(-1, first - second - half))
    assert high == pytest.approx(min(1, first - second + half))
    assert -1 <= low < high <= 1
    assert difference_interval(swapped(pairs)) == pytest.approx((-high, -low))
    assert difference_interval(pairs, 0.9)[0] >= low and difference_interval(pairs, 0.9)[1] <= high
