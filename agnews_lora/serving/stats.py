"""Exact test and interval of the difference of two accuracies on the same rows."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Pairs:
    """Rows by which of two classifiers answers them correctly: both, only the first, only the second, neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def num_rows(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """The first's accuracy less the second's, a share."""
        return (self.only_first - self.only_second) / self.num_rows


def count_pairs(first_right: npt.NDArray[np.bool_], second_right: npt.NDArray[np.bool_]) -> Pairs:
    """Count the rows.

    Args:
        first_right: [rows], whether the first classifier answers a row correctly; second_right likewise.
    """
    return Pairs(
        both=int(np.sum(first_right & second_right)),
        only_first=int(np.sum(first_right & ~second_right)),
        only_second=int(np.sum(~first_right & second_right)),
        neither=int(np.sum(~first_right & ~second_right)),
    )


def mcnemar_p_value(pairs: Pairs, alternative: Literal["less", "two-sided"]) -> float:
    """Exact McNemar test (McNemar 1947), on the rows that one of the two alone answers correctly; 1 without any.

    Args:
        alternative: `less`: how likely the first loses so many rows if it is not worse. `two-sided`: how likely so
            uneven a division is if neither is better.
    """
    from scipy.stats import binomtest

    decided = pairs.only_first + pairs.only_second
    return float(binomtest(pairs.only_first, decided, 0.5, alternative=alternative).pvalue) if decided else 1.0


def difference_interval(pairs: Pairs, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): adjusted Wald interval of the difference of two accuracies on the same rows, shares in [-1, 1].

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37(4), 2012: Wald's interval after one row was added
    to each of the two cells that tell the classifiers apart.
    """
    from scipy.stats import norm

    rows = pairs.num_rows + 2
    first, second = (pairs.only_first + 1) / rows, (pairs.only_second + 1) / rows
    difference = first - second
    half = float(norm.ppf(0.5 + confidence / 2)) * sqrt((first + second - difference**2) / rows)
    return max(-1.0, difference - half), min(1.0, difference + half)
