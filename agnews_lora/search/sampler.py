"""TPE whose random state depends on (sweep seed, trial number) alone.

A sampler that carries its state in memory proposes trial 0's configuration again when a study is resumed. This one is
made anew for each trial, so a study stopped and resumed asks the same configurations as one that was not.
"""

from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState


def derived_seed(seed: int, number: int) -> int:
    """A 31-bit seed of one trial, from the sweep's seed and the trial's number (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


class TrialSeededTPE(BaseSampler):
    """Multivariate TPE over `shared`, the parameters that every trial has; the rest are sampled one by one.

    The shared space is given, not inferred from past trials: a baseline from outside the space has no parameters at
    all, and must not take the others' joint distribution away.
    """

    def __init__(self, seed: int, startup_trials: int, shared: dict[str, BaseDistribution]) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        self._shared = shared
        self._number = -1
        self._tpe = self._seeded(0)

    def _seeded(self, number: int) -> TPESampler:
        return TPESampler(
            seed=derived_seed(self._seed, number),
            n_startup_trials=self._startup_trials,
            warn_independent_sampling=False,
        )

    def _of(self, trial: FrozenTrial) -> TPESampler:
        if trial.number != self._number:
            self._number, self._tpe = trial.number, self._seeded(trial.number)
        return self._tpe

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._shared

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._of(trial).after_trial(study, trial, state, values)
