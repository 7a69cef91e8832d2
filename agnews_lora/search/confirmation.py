"""The confirmation: the study in which the best trials are raced over more seeds, so that the winner is no lucky run.

The repetitions (`t0007-s2`: trial 7 with its second seed) are trials of a study of their own, `<study>/confirmation`,
so that neither sampler nor pruner learns from them. The same driver trains them, those of the first round in slots that
the search leaves free: a trial is repeated once it is sure to be among the best, however the running ones end. Each of
those can push it down by one place at most. So the same trials are repeated, with the same seeds, as after the search.
"""

from optuna.pruners import NopPruner

from agnews_lora.search import study as keys
from agnews_lora.search.racing import race, repeated, repetition
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.study import SweepStudy
from agnews_lora.search.trials import TrialSummary, summaries, trial_name


def open_confirmation(
    study: SweepStudy, num_trials: int, num_seeds: int, seed: int, num_left: int = 0
) -> SweepStudy | None:
    """The confirmation of a study, with the missing repetitions enqueued that are known to be wanted.

    Args:
        num_trials: how many of the best trials are raced.
        num_seeds: the most runs of a trial, the search's own among them.
        seed: the sweep's.
        num_left: trials of the search that are still to end.

    Returns:
        None where no trial was repeated yet, and none is sure to be.
    """
    rounds = find_confirmation(study)
    wanted = _wanted(study, rounds, num_trials - num_left, 2 if num_left else num_seeds)
    if rounds is None:
        if not wanted:
            return None
        storage = study._storage
        name = keys.free_name(storage, f"{study.study_name}{keys.CONFIRMATION}")
        keys.make_study(storage, name, {keys.IDENTITY: _identity(study)}, keys.objective_of(study))
        rounds = SweepStudy(name, storage, pruner=NopPruner())
    known = {trial_name(trial) for trial in rounds.get_trials(deepcopy=False)}
    for name, (row, number) in wanted.items():
        if name not in known:
            assert row.spec is not None, "a trial that was completed has its configuration"
            own_seed = derived_seed(seed, row.number, f"s{number}")
            keys.enqueue_named(rounds, name, row.spec, own_seed, **{keys.CONFIRMS: row.trial})
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
    """Repetitions that are known to be wanted and have not ended; 0 once the race is over.

    num_trials, num_seeds: as in `open_confirmation`.
    """
    rounds = find_confirmation(study)
    trials = rounds.get_trials(deepcopy=False) if rounds else []
    ended = {trial_name(trial) for trial in trials if trial.state.is_finished()}
    return len(_wanted(study, rounds, num_trials, num_seeds).keys() - ended)


def _wanted(
    study: SweepStudy, rounds: SweepStudy | None, num_trials: int, num_seeds: int
) -> dict[str, tuple[TrialSummary, int]]:
    """(trial of the search, number of the seed) by name, round by round."""
    objective = keys.objective_of(study)
    candidates = [*repeated(summaries(study), rounds, objective).values()][: max(0, num_trials)]
    wanted = race(candidates, num_seeds, objective).wanted
    return {repetition(row, number): (row, number) for row, number in wanted}
