"""What the trials of a study are to train: configuration, seed and description of each, for the runner."""

from dataclasses import dataclass
from typing import Any, Protocol

import optuna

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.search import space as search_space
from agnews_lora.search import study as study_keys
from agnews_lora.search.sampler import derived_seed


class Quest(Protocol):
    """What the trials of a study are to train. total_steps: training steps of a trial that is not pruned."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def budget(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    def configuration(self, trial: optuna.Trial) -> TrialSpec:
        """What a claimed trial trains. A ValueError, Optuna's, is the trial's fault."""
        ...

    def seed_of(self, trial: optuna.Trial) -> int:
        """The seed of its initialisation, dropout and data order."""
        ...

    def facts_of(self, trial: optuna.Trial) -> dict[str, Any]:
        """What else its run says of it."""
        ...


@dataclass(frozen=True)
class Search:
    """Implements `Quest`: trials from the space under the budget.

    baseline_seed: the experiment's own seed, so that the baseline is the very run that `train` makes.
    """

    space: Space
    shape: ModelShape
    budget: int
    seed: int
    baseline: TrialSpec
    baseline_seed: int
    total_steps: int

    def configuration(self, trial: optuna.Trial) -> TrialSpec:
        """A baseline from outside the space is not asked from it."""
        if is_baseline(trial) and search_space.outside(self.baseline, self.space, self.shape, self.budget):
            return self.baseline
        return search_space.suggest(trial, self.space, self.shape, self.budget)

    def seed_of(self, trial: optuna.Trial) -> int:
        return self.baseline_seed if is_baseline(trial) else derived_seed(self.seed, trial.number)

    def facts_of(self, trial: optuna.Trial) -> dict[str, Any]:
        return {"study_trial": trial.number}


def is_baseline(trial: optuna.Trial) -> bool:
    """Whether it is the experiment's own configuration, put first."""
    return bool(trial.user_attrs.get(study_keys.BASELINE))
