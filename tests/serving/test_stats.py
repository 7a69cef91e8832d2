import numpy as np
import pytest

from agnews_lora.serving.stats import accuracy_interval, worse_p_value


def right(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


def test_the_interval_is_wilsons() -> None:
    low, high = accuracy_interval(8, 10)  # by hand: (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


def test_the_interval_of_a_perfect_score_ends_at_one_and_not_above() -> None:
    low, high = accuracy_interval(100, 100)
    assert 0.95 < low < high == 1.0


def test_only_rows_that_one_alone_answers_count() -> None:
    # Lost 4, won 1; it does not matter how many rows both get right or wrong. X ~ Binomial(5, 1/2): P(X >= 4) = 6/32.
    few = worse_p_value(right("00001"), right("11110"))
    many = worse_p_value(right("00001" + "1" * 50 + "0" * 9), right("11110" + "1" * 50 + "0" * 9))
    assert few == many == pytest.approx(6 / 32)


def test_a_better_version_is_never_called_worse() -> None:
    assert worse_p_value(right("1" * 10), right("0" * 10)) == 1.0


def test_ten_rows_lost_and_none_won_is_worse() -> None:
    assert worse_p_value(right("0" * 10), right("1" * 10)) == pytest.approx(1 / 1024)


def test_without_any_difference_nothing_is_worse() -> None:
    assert worse_p_value(right("110"), right("110")) == 1.0
