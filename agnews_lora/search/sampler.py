"""Sobol points at first, then TPE: draws that depend on (sweep seed, trial number, parameter) and the study alone.

A sampler that carries its random state in memory proposes trial 0's configuration again when a study is resumed. This
one carries none, so a study that is stopped anywhere and resumed asks the same configurations as one that was not.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc


def derived_seed(seed: int, number: int, name: str = "") -> int:
    """A 31-bit seed of one trial, or of one parameter of it, from the sweep's seed (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, number, *name.encode()]).generate_state(1)[0] >> 1)


class TrialSeededTPE(BaseSampler):
    """Multivariate TPE over the parameters that every trial has; the rest are sampled one by one.

    Before it learns, a trial is the point of its number in a Sobol sequence that the seed scrambles (Owen 1998), with a
    coordinate for each parameter: few trials cover the space more evenly than independent draws.

    Args:
        startup_trials: finished trials to learn from.
        parameters: {name: range} of all that some trial is asked for.
        shared: names of those that every trial has. They are given, not inferred from past trials, since a baseline
            from outside the space has no parameters at all, and must not take the others' joint distribution away.
    """

    def __init__(
        self, seed: int, startup_trials: int, parameters: Mapping[str, BaseDistribution], shared: Collection[str]
    ) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        # A single value needs no sampling, and TPE's density over a range without width is not a number.
        self._parameters = {name: given for name, given in parameters.items() if not given.single()}
        self._shared = {name: given for name, given in self._parameters.items() if name in shared}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._shared

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._learns(study):
            return self._tpe(trial.number).sample_relative(study, trial, search_space)
        return {name: self._start(trial.number, name) for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if not self._learns(study):
            return self._start(trial.number, param_name)
        # A seed of its own: the draw is the same, whichever of its parameters a killed trial had been asked for.
        return self._tpe(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _learns(self, study: Study) -> bool:
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return len(ended) >= self._startup_trials

    def _start(self, number: int, name: str) -> Any:
        points = qmc.Sobol(len(self._parameters), rng=self._seed).random_base2(number.bit_length())
        coordinate = float(points[number, list(self._parameters).index(name)])
        match self._parameters[name]:
            case CategoricalDistribution(choices=choices):
                return choices[int(coordinate * len(choices))]
            case FloatDistribution(low=low, high=high, log=True):
                return min(high, low * (high / low) ** coordinate)  # rounding may lead above the range
            case FloatDistribution(low=low, high=high):
                return min(high, low + (high - low) * coordinate)
            case other:
                raise NotImplementedError(f"no point in {other}")

    def _tpe(self, number: int, name: str = "") -> TPESampler:
        return TPESampler(seed=derived_seed(self._seed, number, name), n_startup_trials=0)
