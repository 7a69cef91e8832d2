"""Claims: dead processes' trials first, no more than were asked for, and one that kills its process alone."""

from pathlib import Path

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.search import study as keys
from agnews_lora.search.claims import claim, give_back, is_done, num_ended, set_quota
from agnews_lora.search.leases import Leases
from agnews_lora.search.study import open_storage, open_study


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    made = open_study(open_storage(tmp_path), "embedded", {}, RandomSampler(seed=0), NopPruner(), new=False)
    set_quota(made, 3)
    return made


@pytest.fixture
def mine(study: optuna.Study) -> Leases:
    return Leases.of(study, "mine")


@pytest.fixture
def theirs(study: optuna.Study) -> Leases:
    return Leases.of(study, "theirs")


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def test_no_more_are_claimed_than_were_asked_for(study: optuna.Study, mine: Leases, theirs: Leases) -> None:
    claimed = [claim(study, leases, {}) for leases in (mine, theirs, mine)]
    # Claimed in the name of `mine`, though not held there: it died in the midst of the claim.
    assert [trial.number for trial in claimed if trial] == [0, 1, 0]
    third = claim(study, mine, {"t0000": 1})
    assert third is not None and third.number == 2
    assert claim(study, theirs, {"t0001": 1}) is None
    assert claim(study, mine, {"t0000": 1, "t0002": 1}) is None
    assert not is_done(study)
    for trial in (claimed[0], claimed[1], third):
        assert trial is not None
        study.tell(trial, 0.5)
    assert num_ended(study) == 3 and is_done(study)
    set_quota(study, 4)
    assert not is_done(study)
    fourth = claim(study, mine, {})
    assert fourth is not None and fourth.number == 3


def test_a_trial_whose_holder_is_gone_comes_first_with_all_that_it_has(
    study: optuna.Study, mine: Leases, theirs: Leases
) -> None:
    trial = claim(study, theirs, {})
    assert trial is not None
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.report(0.4, step=10)
    study.enqueue_trial({"x": 0.5})
    theirs.revoke("theirs")
    again = claim(study, mine, {})
    assert again is not None
    assert (again.number, again.suggest_float("x", 0.0, 1.0)) == (0, x)
    assert study.trials[0].intermediate_values == {10: 0.4}
    assert mine.holders() == {"t0000": "mine"}


def test_a_trial_that_is_given_back_comes_before_any_new_one(study: optuna.Study, mine: Leases) -> None:
    held = [claim(study, mine, {"t0000": 1} if number else {}) for number in range(2)]
    assert held[1] is not None
    give_back(study, held[1]._trial_id)
    mine.release("t0001")
    study.enqueue_trial({"x": 0.5})
    again = claim(study, mine, {"t0000": 1})
    assert again is not None and again.number == 1


def test_a_trial_given_back_by_a_process_that_died_before_letting_go_waits_for_its_lease(
    study: optuna.Study, mine: Leases, theirs: Leases
) -> None:
    trial = claim(study, theirs, {})
    assert trial is not None
    give_back(study, trial._trial_id)
    assert claim(study, mine, {}) is None
    theirs.revoke("theirs")
    again = claim(study, mine, {})
    assert again is not None and again.number == 0


def test_a_trial_that_ended_its_process_twice_is_trained_alone(study: optuna.Study, mine: Leases) -> None:
    for attempts in (1, 2):
        trial = claim(study, mine, {})
        assert trial is not None
        trial.set_user_attr(keys.ATTEMPTS, attempts)
        mine.revoke("mine")
    other = claim(study, mine, {"t0009": 1})
    assert other is not None and other.number == 1, "there is another in this process, so it has to wait"
    alone = claim(study, mine, {})
    assert alone is not None and alone.number == 0
    assert claim(study, mine, {"t0000": 3, "t0001": 1}) is None, "it is the only one here"
    third = claim(study, mine, {"t0000": 0, "t0001": 1})  # it got to a new checkpoint
    assert third is not None and third.number == 2
    alone.set_user_attr(keys.ATTEMPTS, 2)
    give_back(study, alone._trial_id)
    mine.release("t0000")
    assert claim(study, mine, {"t0001": 1, "t0002": 1}) is None
    assert study.trials[0].state is TrialState.WAITING
