"""Paired comparisons against textbook numbers, against scipy, and against what must hold of any rows."""

from math import comb, sqrt

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from agnews_lora.reporting.paired import Pairs, count_pairs, difference_interval, two_sided_p_value

counts = st.integers(0, 400)
some_pairs = st.builds(Pairs, counts, counts, counts, counts).filter(lambda pairs: pairs.num_rows > 0)
answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.both, pairs.only_second, pairs.only_first, pairs.neither)


def column(rows: list[tuple[bool, bool]], index: int) -> npt.NDArray[np.bool_]:
    return np.asarray([row[index] for row in rows], dtype=bool)


@given(answers)
def test_every_row_is_counted_once(rows: list[tuple[bool, bool]]) -> None:
    first, second = column(rows, 0), column(rows, 1)
    pairs = count_pairs(first, second)
    assert pairs.num_rows == len(rows)
    assert pairs.both + pairs.only_first == first.sum()
    assert pairs.both + pairs.only_second == second.sum()
    assert pairs.difference == pytest.approx(first.mean() - second.mean())
    assert count_pairs(second, first) == swapped(pairs)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3"):
        count_pairs(np.ones(2, bool), np.ones(3, bool))


@given(some_pairs)
def test_the_test_is_the_doubled_tail_of_a_fair_coin(pairs: Pairs) -> None:
    told_apart = pairs.only_first + pairs.only_second
    smaller = min(pairs.only_first, pairs.only_second)
    expected = min(1.0, 2 * float(binom.cdf(smaller, told_apart, 0.5))) if told_apart else 1.0
    assert two_sided_p_value(pairs) == pytest.approx(expected, abs=1e-12)


def test_the_test_by_hand() -> None:
    # 1 of 8: (1 + 8) of 256 in either tail.
    assert two_sided_p_value(Pairs(50, 1, 7, 2)) == pytest.approx(2 * (comb(8, 0) + comb(8, 1)) / 2**8)
    assert two_sided_p_value(Pairs(50, 0, 0, 2)) == 1.0


@given(some_pairs)
def test_neither_side_is_preferred(pairs: Pairs) -> None:
    low, high = difference_interval(pairs)
    assert two_sided_p_value(swapped(pairs)) == two_sided_p_value(pairs)
    assert difference_interval(swapped(pairs)) == pytest.approx((-high, -low))


@given(some_pairs)
def test_the_interval_is_the_formula_of_the_paper(pairs: Pairs) -> None:
    rows = pairs.num_rows
    first, second = (pairs.only_first + 1) / (rows + 2), (pairs.only_second + 1) / (rows + 2)
    half = norm.ppf(0.975) * sqrt((first + second - (first - second) ** 2) / (rows + 2))
    low, high = difference_interval(pairs)
    assert low == pytest.approx(max(-1, first - second - half))
    assert high == pytest.approx(min(1, first - second + half))
    assert -1 <= low < high <= 1


@given(some_pairs)
def test_more_confidence_is_a_wider_interval(pairs: Pairs) -> None:
    narrow, wide = difference_interval(pairs, 0.9), difference_interval(pairs, 0.99)
    assert wide[0] <= narrow[0] < narrow[1] <= wide[1]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    shares, num_rows, times = [0.7, 0.12, 0.06, 0.12], 300, 2_000
    covered = 0
    for cells in random.multinomial(num_rows, shares, size=times):
        low, high = difference_interval(Pairs(*(int(cell) for cell in cells)))
        covered += low <= shares[1] - shares[2] <= high
    assert 0.94 <= covered / times <= 0.965
