"""TPE whose draws depend on (sweep seed, trial number, parameter) and on the study's trials alone.

A sampler that carries its random state in memory proposes trial 0's configuration again when a study is resumed. This
one carries none, so a study that is stopped anywhere and resumed asks the same configurations as one that was not.
"""

from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial


def derived_seed(seed: int, number: int, name: str = "") -> int:
    """A 31-bit seed of one trial, or of one parameter of it, from the sweep's seed (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, number, *name.encode()]).generate_state(1)[0] >> 1)


class TrialSeededTPE(BaseSampler):
    """Multivariate TPE over `shared`, the parameters that every trial has; the rest are sampled one by one.

    startup_trials: finished trials to learn from, before which all parameters are drawn at random. shared: given, not
    inferred from past trials, since a baseline from outside the space has no parameters at all, and must not take the
    others' joint distribution away.
    """

    def __init__(self, seed: int, startup_trials: int, shared: dict[str, BaseDistribution]) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        # A single value needs no sampling, and TPE's density over a range without width is not a number.
        self._shared = {name: given for name, given in shared.items() if not given.single()}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._shared

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._tpe(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # A seed of its own: the draw is the same, whichever of its parameters a killed trial had been asked for.
        return self._tpe(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _tpe(self, number: int, name: str = "") -> TPESampler:
        return TPESampler(seed=derived_seed(self._seed, number, name), n_startup_trials=self._startup_trials)
