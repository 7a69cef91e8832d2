"""The pruning rule: a trial is given up once chance does not explain how far it is behind another.

Scores on a few hundred validation rows are noisy, and a rule that compares two such numbers prunes good trials for bad
luck. All trials are scored on the same rows, and most rows tell nothing: every trial gets them right, or none. So the
rule compares two trials by the rows that only one of them answers correctly. `benchmarks/pruning.py` replays studies
with this and other rules on tables of real trainings; its results lie in `benchmarks/results/`.
"""

import math

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from agnews_lora.search.study import RIGHT
from agnews_lora.training.metrics import unpacked


class McNemarPruner(BasePruner):
    """Gives up a trial that the best of its peers is ahead of by McNemar's test on the same validation rows.

    Peers are all other trials of a study that maximises which were evaluated at the trial's last step, whatever became
    of them: running, requeued, pruned, failed and finished ones. The best is the one with the highest value; of b rows
    that it alone answers correctly, and c rows that the trial alone does, the statistic is (b - c) / √(b + c), which is
    standard normal where both are equally good (McNemar, "Note on the sampling error of the difference between
    correlated proportions", Psychometrika 12, 1947).

    The rule carries no state: the verdict follows from what the study has stored, so that a resumed study gives it
    again, and the trials of a group that are all reported before the first is judged are judged alike in any order.

    Args:
        standard_errors: of the statistic from which on a trial is given up.
        startup_trials: peers that must have come to a step, before anyone is judged there.
        warmup_steps: steps of a trial before which it is not judged.
    """

    def __init__(self, standard_errors: float, startup_trials: int, warmup_steps: int) -> None:
        assert startup_trials >= 1, "without a peer there is no test"
        self._standard_errors = standard_errors
        self._startup_trials = startup_trials
        self._warmup_steps = warmup_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or step < self._warmup_steps:
            return False
        peers = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and not math.isnan(other.intermediate_values.get(step, math.nan))
        ]
        if len(peers) < self._startup_trials:
            return False
        best = max(peers, key=lambda peer: (peer.intermediate_values[step], -peer.number))
        if not trial.intermediate_values[step] < best.intermediate_values[step]:
            return False
        right, own = (answers(each, step) for each in (best, trial))
        if right is None or own is None or len(right) != len(own):
            return False
        ahead, behind = np.count_nonzero(right & ~own), np.count_nonzero(own & ~right)
        return bool(ahead - behind > self._standard_errors * math.sqrt(ahead + behind))


def answers(trial: FrozenTrial, step: int) -> NDArray[np.bool_] | None:
    """Read which rows a trial answered correctly at a step, filled up to whole bytes with rows that nobody does.

    None where an earlier release reported the step.
    """
    text = trial.system_attrs.get(f"{RIGHT}{step}")
    return unpacked(text) if text else None
