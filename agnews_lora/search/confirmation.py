"""The confirmation: the best trials trained again over more seeds, so that the winner is chosen by mean.

The accuracy of the best of many trials is partly luck: the trial was chosen for it. Its mean over further seeds is
less so. The repetitions (`t0007-s2`: trial 7 with its second seed) are trials of a study of their own,
`<study>/confirmation`, so that neither sampler nor pruner learns from them. The same driver trains them, in slots that
the search leaves free: a trial is repeated once it is sure to be among the best, however the running ones end. Each of
those can push it down by one place at most. So the same trials are repeated, with the same seeds, as after the search.
"""

import optuna
from optuna.pruners import NopPruner

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search import study as keys
from agnews_lora.search.results import TrialSummary, best_first, summaries, trial_name
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.study import SweepStudy


def open_confirmation(
    study: SweepStudy, num_trials: int, num_seeds: int, seed: int, num_left: int = 0
) -> SweepStudy | None:
    """The confirmation of a study, with the missing repetitions of the trials that are sure to be confirmed enqueued.

    Args:
        num_trials: how many of the best trials are repeated.
        num_seeds: runs a trial, the search's own among them.
        seed: the sweep's.
        num_left: trials of the search that are still to end.

    Returns:
        None where no trial was repeated yet, and none is sure to be.
    """
    wanted = _wanted(study, num_trials - num_left, num_seeds)
    rounds = find_confirmation(study)
    if rounds is None:
        if not wanted:
            return None
        storage = study._storage
        name = keys.free_name(storage, f"{study.study_name}{keys.CONFIRMATION}")
        keys.make_study(storage, name, {keys.IDENTITY: _identity(study)}, keys.objective_of(study))
        rounds = SweepStudy(name, storage, pruner=NopPruner())
    known = {trial_name(trial) for trial in rounds.get_trials(deepcopy=False)}
    for name, (row, spec, number) in wanted.items():
        if name not in known:
            own_seed = derived_seed(seed, row.number, f"s{number}")
            keys.enqueue_named(rounds, name, spec, own_seed, **{keys.CONFIRMS: row.trial})
    return rounds


def find_confirmation(study: SweepStudy) -> SweepStudy | None:
    """The confirmation of a study, where it was opened: the one that holds its identity, whatever else has its name."""
    storage, usual = study._storage, f"{study.study_name}{keys.CONFIRMATION}"
    for found in storage.get_all_studies():
        name, attributes = found.study_name, found.user_attrs
        if study.num_unmarked and name == usual and keys.IDENTITY not in attributes:  # of an earlier release
            storage.set_study_user_attr(found._study_id, keys.BOUND, [name, storage.get_n_trials(found._study_id)])
            storage.set_study_user_attr(found._study_id, keys.IDENTITY, _identity(study))
        elif attributes.get(keys.IDENTITY) != _identity(study) or attributes[keys.BOUND][0] != name:
            continue
        return SweepStudy(name, storage, pruner=NopPruner())
    return None


def _identity(study: SweepStudy) -> str:
    return f"{study.identity}{keys.CONFIRMATION}"


def num_missing(study: SweepStudy, num_trials: int, num_seeds: int) -> int:
    """Repetitions of the best that have not ended. num_trials, num_seeds: as in `open_confirmation`."""
    rounds = find_confirmation(study)
    trials = rounds.get_trials(deepcopy=False) if rounds else []
    ended = {trial_name(trial) for trial in trials if trial.state.is_finished()}
    return len(_wanted(study, num_trials, num_seeds).keys() - ended)


def _wanted(study: optuna.Study, num_trials: int, num_seeds: int) -> dict[str, tuple[TrialSummary, TrialSpec, int]]:
    """(trial of the search, its configuration, number of the seed) by name, all trials' second seeds first."""
    ranked = best_first(summaries(study), keys.objective_of(study))
    best = [(row, row.spec) for row in ranked[: max(0, num_trials)] if row.spec is not None]
    return {f"{row.trial}-s{number}": (row, spec, number) for number in range(2, num_seeds + 1) for row, spec in best}
