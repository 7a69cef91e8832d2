"""The pruning rule: the median of everyone who came as far, so that it works for trials that train at once.

Optuna's median rule compares with finished trials only, and with K trials at once the first K all run to their end
before there is one. Its successive halving judges each trial against those judged before it, so that in a group
reported together the verdict depends on the order. `benchmarks/pruning.py` replays studies with all three; its results
lie in `benchmarks/results/`.
"""

import math
from statistics import median

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial


def peer_values(study: Study, trial: FrozenTrial, step: int) -> list[float]:
    """What all other trials of the study reported at a step: running, put back, pruned, failed and finished ones.

    NaN is no value to compare with.
    """
    reported = (
        other.intermediate_values.get(step, math.nan)
        for other in study.get_trials(deepcopy=False)
        if other.number != trial.number
    )
    return [value for value in reported if not math.isnan(value)]


class PeerMedianPruner(BasePruner):
    """Gives up a trial whose value at its last reported step is below the median of its peers' at that step.

    Peers are all other trials of a study that maximises, whatever became of them (the median stopping rule of Golovin
    et al., "Google Vizier", KDD 2017, over values at one step). It carries no state: the verdict follows from what the
    study has stored, so that a resumed study gives it again, and the trials of a group that are all reported before
    the first is judged are judged alike in any order. A trial with NaN is below every median.

    startup_trials: peers that must have reported at the step, before anyone is judged there. warmup_steps: steps of a
    trial before which it is not judged.
    """

    def __init__(self, startup_trials: int, warmup_steps: int) -> None:
        assert startup_trials >= 1, "without a peer there is no median"
        self._startup_trials = startup_trials
        self._warmup_steps = warmup_steps

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or step < self._warmup_steps:
            return False
        peers = peer_values(study, trial, step)
        return len(peers) >= self._startup_trials and not trial.intermediate_values[step] >= median(peers)
