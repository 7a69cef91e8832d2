"""Trials that are put in the queue rather than sampled: the baseline, and what a person enqueues by hand."""

from collections.abc import Iterator
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.search import space as search_space
from agnews_lora.search.study import BASELINE, SPEC


def enqueue_baseline(study: optuna.Study, baseline: TrialSpec, space: Space, shape: ModelShape, budget: int) -> None:
    """Put the experiment's own configuration first, once in a study's life.

    Where it lies inside the space, the sampler learns from it. Where it lies outside (a learning rate that is not
    searched, say), it has no parameters, and only its result counts.
    """
    if any(trial.user_attrs.get(BASELINE) for trial in study.get_trials(deepcopy=False)):
        return
    inside = not search_space.outside(baseline, space, shape, budget)
    parameters = search_space.parameters_of(baseline, space, shape, budget) if inside else {}
    study.enqueue_trial(parameters, user_attrs={BASELINE: True})


def waiting_specs(study: optuna.Study, space: Space, shape: ModelShape, budget: int) -> Iterator[tuple[int, TrialSpec]]:
    """(number, configuration) of each trial that a person enqueued, completed by the smallest values.

    One with a value that Optuna refuses has no configuration; it fails when its turn comes.
    """
    smallest = search_space.smallest(space, shape, budget)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if SPEC in trial.user_attrs or BASELINE in trial.user_attrs:  # given back, or not asked from the space
            continue
        try:
            spec = search_space.suggest(FixedTrial(smallest | _fixed(trial)), space, shape, budget)
        except ValueError:
            continue
        yield trial.number, spec


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """What `enqueue_trial` was given, by Optuna's own key."""
    fixed: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return fixed
