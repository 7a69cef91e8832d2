"""Which rule prunes best: studies replayed on the tables of `benchmarks/search_table.py`.

    python -m benchmarks.pruning

runs whole studies through the sweep's own driver, sampler and pruner, with an engine that takes each trial's scores
from a table instead of training it: for every rule, with one trial at a time and with several at once, over the same
seeds. It writes what it measured to `results/`.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from scipy import stats

from agnews_lora.search.pruner import PeerMedianPruner
from benchmarks.search_replay import Outcome

TABLES: Final = ("ag_news", "newswire")
SLOTS: Final = (1, 4)
TRIALS: Final = (14, 30)
NONE: Final = "none"


def rules(first: int, every: int) -> dict[str, BasePruner]:
    """The rules that are compared. every: steps between two evaluations."""
    return {
        NONE: NopPruner(),
        "median of peers": PeerMedianPruner(4, 0),
        "median of finished (Optuna)": MedianPruner(4, 0),
        **{f"successive halving by {by} (Optuna)": SuccessiveHalvingPruner(every, by) for by in (2, 4)},
    }


@dataclass(frozen=True)
class Measured:
    """One rule. outcomes: {(trials, slots): the studies', by seed}. backwards: of the largest, judged so."""

    outcomes: dict[tuple[int, int], list[Outcome]]
    backwards: list[Outcome]

    def worth(self, cell: tuple[int, int]) -> NDArray[np.float64]:
        return np.array([outcome.worth for outcome in self.outcomes[cell]])

    def saved(self, cell: tuple[int, int]) -> float:
        return float(np.mean([outcome.saved for outcome in self.outcomes[cell]]))

    @property
    def depends_on_order(self) -> float:
        """Share of the studies in which other trials were pruned when each group was judged backwards."""
        pairs = zip(self.outcomes[TRIALS[-1], SLOTS[-1]], self.backwards, strict=True)
        return float(np.mean([forwards.pruned != backwards.pruned for forwards, backwards in pairs]))


def interval(differences: NDArray[np.float64]) -> str:
    """Mean of paired differences in points, with its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{100 * differences.mean() + 0.0:+.2f} ± {100 * half:.2f}"
