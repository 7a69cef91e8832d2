"""Which trial comes next, for any number of processes at once: each trial is claimed by one, and no more than asked."""

from collections.abc import Mapping
from typing import Final

import optuna
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.search.leases import Leases
from agnews_lora.search.standings import name_of
from agnews_lora.search.study import ATTEMPTS, ENDED, TRIALS

MAX_ATTEMPTS: Final = 5
SUSPECT_ATTEMPTS: Final = 2  # from then on a trial is trained alone, so that it takes no other with it


def set_quota(study: optuna.Study, trials: int) -> None:
    """How many trials are to end in all: read by every worker, wherever it runs."""
    if study.user_attrs.get(TRIALS) != trials:
        study.set_user_attr(TRIALS, trials)


def num_ended(study: optuna.Study) -> int:
    """Trials that have ended, however they did."""
    return len(study.get_trials(deepcopy=False, states=ENDED))


def is_done(study: optuna.Study) -> bool:
    """Whether as many trials have ended as were asked for, and none is running anywhere."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return TrialState.RUNNING not in states and sum(map(ENDED.__contains__, states)) >= study.user_attrs.get(TRIALS, 0)


def claim(study: optuna.Study, leases: Leases, held: Mapping[str, int]) -> optuna.Trial | None:
    """The next trial for this process, running and leased; None where there is none to start now.

    A running trial that nobody holds comes first: its process is dead. held: {trial: its attempts so far} of what this
    process has already. To be called while `leases.queue` is held: then nobody else claims, and the quota is exact.
    """
    if any(attempts > SUSPECT_ATTEMPTS for attempts in held.values()):
        return None
    holders = leases.holders()
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        holder = holders.get(name_of(trial))
        # This process's own, though it is not held: the storage went away in the midst of an earlier claim.
        free = holder is None or (holder == leases.owner and name_of(trial) not in held)
        if trial.state is TrialState.RUNNING and free and not (held and _is_suspect(trial)):
            study._thread_local.cached_all_trials = None  # as `ask` does: the sampler sees what there is now
            return _leased(optuna.Trial(study, trial._trial_id), leases)
    quota = study.user_attrs.get(TRIALS, 0)
    if _num_open_or_ended(trials) >= quota or (held and _next_is_suspect(trials)):
        return None
    asked = study.ask()
    if _num_open_or_ended(study.get_trials(deepcopy=False)) > quota:  # others have claimed while this process was away
        give_back(study, asked._trial_id)
        return None
    return _leased(asked, leases)


def _leased(trial: optuna.Trial, leases: Leases) -> optuna.Trial | None:
    """The trial, if it is this process's alone now, and has not ended while this process was away."""
    name = name_of(trial)
    # Where somebody died between giving it back and letting go of it, its lease goes stale first.
    if not leases.take(name):
        return None
    if trial.study._storage.get_trial(trial._trial_id).state is not TrialState.RUNNING:
        leases.release(name)
        return None
    return trial


def give_back(study: optuna.Study, trial_id: int) -> None:
    """Put a running trial back in the queue: the next `ask` returns it with its number, parameters and reports."""
    study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def _num_open_or_ended(trials: list[FrozenTrial]) -> int:
    return sum(trial.state is TrialState.RUNNING or trial.state in ENDED for trial in trials)


def _is_suspect(trial: FrozenTrial) -> bool:
    return int(trial.user_attrs.get(ATTEMPTS, 0)) >= SUSPECT_ATTEMPTS


def _next_is_suspect(trials: list[FrozenTrial]) -> bool:
    waiting = next((trial for trial in trials if trial.state is TrialState.WAITING), None)
    return waiting is not None and _is_suspect(waiting)
