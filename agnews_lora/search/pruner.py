"""The pruning rule: a trial is given up once chance does not explain how far it is behind another.

Scores on a few hundred validation rows are noisy, and a rule that compares two such numbers prunes good trials for bad
luck. All trials are scored on the same rows, and most rows tell nothing: every trial gets them right, or none. So the
rule compares two trials by the rows that only one of them answers correctly. Early scores tell little of how a trial
ends, and a trial is judged again at every evaluation: the earlier it is, the further behind it must be, as in a
clinical trial with interim looks. `benchmarks/pruning.py` replays studies with this and other rules on tables of real
trainings; its results lie in `benchmarks/results/`.
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

    At a share t of the training steps, a trial is given up from standard_errors / √t on (O'Brien & Fleming, "A multiple
    testing procedure for clinical trials", Biometrics 35, 1979): twice as much at a quarter as at the end.

    The rule carries no state: the verdict follows from what the study has stored, so that a resumed study gives it
    again, and the trials of a group that are all reported before the first is judged are judged alike in any order.

    Args:
        standard_errors: of the statistic, from which on a trial would be given up at its end.
        total_steps: of a trial.
    """

    def __init__(self, standard_errors: float, total_steps: int) -> None:
        self._standard_errors = standard_errors
        self._total_steps = total_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        return step is not None and self.is_behind(study, trial, step)

    def is_behind(self, study: Study, trial: FrozenTrial, step: int) -> bool:
        """Judge a trial by what it and its peers had answered at a step."""
        peers = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and not math.isnan(other.intermediate_values.get(step, math.nan))
        ]
        if not peers:
            return False
        best = max(peers, key=lambda peer: (peer.intermediate_values[step], -peer.number))
        if not trial.intermediate_values[step] < best.intermediate_values[step]:
            return False
        right, own = (answers(each, step) for each in (best, trial))
        if right is None or own is None or len(right) != len(own):
            return False
        ahead, behind = np.count_nonzero(right & ~own), np.count_nonzero(own & ~right)
        limit = self._standard_errors * math.sqrt(self._total_steps / step)
        return bool(ahead - behind > limit * math.sqrt(ahead + behind))


def answers(trial: FrozenTrial, step: int) -> NDArray[np.bool_] | None:
    """Read which rows a trial answered correctly at a step, filled up to whole bytes with rows that nobody does.

    None where an earlier release reported the step.
    """
    text = trial.system_attrs.get(f"{RIGHT}{step}")
    return unpacked(text) if text else None
