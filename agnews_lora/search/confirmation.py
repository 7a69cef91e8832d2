"""The confirmation: the best trials trained again over more seeds, so that the winner is chosen by mean.

The best of many trials owes a part of its accuracy to luck: it was chosen for it. Its mean over further seeds owes it
less. The repetitions (`t0007-s2`: trial 7 with its second seed) are trials of a study of their own,
`<study>/confirmation`, so that neither sampler nor pruner learns from them. The same driver trains them.
"""

from typing import Final

import optuna
from optuna.pruners import NopPruner

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search import study as keys
from agnews_lora.search.results import TrialSummary, best_first, summaries, trial_name
from agnews_lora.search.sampler import derived_seed

_SUFFIX: Final = "/confirmation"  # no sweep's study has a slash in its name


def open_confirmation(study: optuna.Study, num_trials: int, num_seeds: int, seed: int) -> optuna.Study | None:
    """The confirmation of a study whose trials have ended, with the missing repetitions enqueued.

    Args:
        num_trials: how many of the best trials are repeated.
        num_seeds: runs a trial, the search's own among them.
        seed: the sweep's.

    Returns:
        None where no trial was completed.
    """
    wanted = _wanted(study, num_trials, num_seeds)
    if not wanted:
        return None
    rounds = optuna.create_study(
        storage=study._storage,
        study_name=f"{study.study_name}{_SUFFIX}",
        pruner=NopPruner(),
        direction="maximize",
        load_if_exists=True,
    )
    keys.name_objective(rounds, keys.objective_of(study))
    known = {trial_name(trial) for trial in rounds.get_trials(deepcopy=False)}
    for name, (row, spec, number) in wanted.items():
        if name not in known:
            own_seed = derived_seed(seed, row.number, f"s{number}")
            keys.enqueue_named(rounds, name, spec, own_seed, **{keys.CONFIRMS: row.trial})
    return rounds


def find_confirmation(study: optuna.Study) -> optuna.Study | None:
    """The confirmation of a study, where it was opened."""
    try:
        return optuna.load_study(study_name=f"{study.study_name}{_SUFFIX}", storage=study._storage, pruner=NopPruner())
    except KeyError:
        return None


def num_missing(study: optuna.Study, num_trials: int, num_seeds: int) -> int:
    """Repetitions of the best that have not ended. num_trials, num_seeds: as in `open_confirmation`."""
    rounds = find_confirmation(study)
    trials = rounds.get_trials(deepcopy=False) if rounds else []
    ended = {trial_name(trial) for trial in trials if trial.state.is_finished()}
    return len(_wanted(study, num_trials, num_seeds).keys() - ended)


def _wanted(study: optuna.Study, num_trials: int, num_seeds: int) -> dict[str, tuple[TrialSummary, TrialSpec, int]]:
    """(trial of the search, its configuration, number of the seed) by name, all trials' second seeds first."""
    ranked = best_first(summaries(study), keys.objective_of(study))
    best = [(row, row.spec) for row in ranked[:num_trials] if row.spec is not None]
    return {f"{row.trial}-s{number}": (row, spec, number) for number in range(2, num_seeds + 1) for row, spec in best}
