"""What can be said of an accuracy, and of the difference between two, from a finite number of rows."""

import numpy as np
import numpy.typing as npt


def accuracy_interval(num_right: int, num_rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): Wilson score interval of an accuracy (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(num_right, num_rows).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def worse_p_value(right: npt.NDArray[np.bool_], champion_right: npt.NDArray[np.bool_]) -> float:
    """Exact one-sided McNemar test (McNemar 1947): how likely so many rows are lost against the champion by chance.

    right, champion_right: [rows], whether each of the two answers a row rightly. Of the rows that only one of them
    answers rightly, half would be the champion's if neither were better; without any such row the value is 1.
    """
    from scipy.stats import binomtest

    lost = int(np.sum(champion_right & ~right))
    won = int(np.sum(right & ~champion_right))
    if lost + won == 0:
        return 1.0
    return float(binomtest(lost, lost + won, 0.5, alternative="greater").pvalue)
