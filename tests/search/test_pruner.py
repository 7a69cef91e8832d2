"""The median rule among peers: groups in lockstep, any order of judging, start-up, warm-up, NaN, resumed studies."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners import BasePruner, MedianPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.search.pruner import PeerMedianPruner, peer_values
from agnews_lora.search.study import open_storage, open_study
from tests.search.scripted import ScriptedEngine, Session

NAN = math.nan


def study_with(pruner: BasePruner, groups: Sequence[Mapping[int, float]]) -> tuple[optuna.Study, list[optuna.Trial]]:
    """A study in memory whose trials run, and have reported these accuracies by step."""
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0), pruner=pruner)
    trials = [study.ask() for _ in groups]
    for trial, accuracies in zip(trials, groups, strict=True):
        for step, accuracy in accuracies.items():
            trial.report(accuracy, step)
    return study, trials


def verdicts(pruner: BasePruner, accuracies: Sequence[float], step: int = 10) -> list[bool]:
    """Of trials in lockstep, all reported before the first is judged."""
    _, trials = study_with(pruner, [{step: accuracy} for accuracy in accuracies])
    return [trial.should_prune() for trial in trials]


# The median of the others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "pruned"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [True] * 4 + [False] * 4),
        ([0.8, 0.1, 0.6, 0.7], [False, True, True, False]),  # 0.6 against 0.7
        ([0.5, 0.3, 0.4], [False, True, False]),  # 0.4 against 0.4
        ([0.25, 0.25, 0.25, 0.25], [False] * 4),
        ([0.25, 0.25, 0.25, 0.9], [False] * 4),
        ([0.25, 0.9, 0.9, 0.9], [True, False, False, False]),
    ],
)
def test_trials_in_lockstep_are_judged_by_the_median_of_the_others(accuracies: list[float], pruned: list[bool]) -> None:
    assert verdicts(PeerMedianPruner(2, 0), accuracies) == pruned


@given(st.lists(st.sampled_from([0.2, 0.3, 0.4, 0.5, 0.6, NAN]), min_size=2, max_size=9), st.integers(1, 5), st.data())
@settings(max_examples=60)
def test_verdicts_depend_neither_on_the_order_of_reports_nor_on_that_of_judging(
    accuracies: list[float], startup_trials: int, data: st.DataObject
) -> None:
    """Some of the group are a step further on, as where slots were filled at different times."""
    steps = data.draw(st.lists(st.sampled_from([10, 20]), min_size=len(accuracies), max_size=len(accuracies)))
    pruner = PeerMedianPruner(startup_trials, 0)
    expected = []
    for number, (accuracy, step) in enumerate(zip(accuracies, steps, strict=True)):
        others = [
            other
            for index, (other, at) in enumerate(zip(accuracies, steps, strict=True))
            if index != number and at == step and not np.isnan(other)
        ]
        below = np.isnan(accuracy) or (bool(others) and accuracy < np.quantile(others, 0.5))
        expected.append(len(others) >= startup_trials and bool(below))
    _, trials = study_with(pruner, [{} for _ in accuracies])
    for number in data.draw(st.permutations(range(len(trials)))):
        trials[number].report(accuracies[number], steps[number])
    order = data.draw(st.permutations(range(len(trials))))
    judged = {number: trials[number].should_prune() for number in order}
    assert [judged[number] for number in range(len(trials))] == expected


@pytest.mark.parametrize("state", list(TrialState))
def test_every_trial_that_came_to_the_step_counts_whatever_became_of_it(state: TrialState) -> None:
    study, trials = study_with(PeerMedianPruner(3, 0), [{10: 0.6}, {10: 0.7}, {10: 0.8}, {10: 0.65}])
    study._storage.set_trial_state_values(trials[2]._trial_id, state, [0.9] if state is TrialState.COMPLETE else None)
    peers = peer_values(study, study.get_trials()[3], 10)
    assert sorted(peers) == [0.6, 0.7, 0.8]
    assert trials[3].should_prune()


def test_only_the_last_step_is_compared_and_only_with_values_at_that_step() -> None:
    groups = [{10: 0.9, 20: 0.3, 30: 0.9}, {10: 0.9, 20: 0.2}, {10: 0.1, 20: 0.25}, {20: 0.3, 10: 0.9}]
    _, trials = study_with(PeerMedianPruner(3, 0), groups)
    assert [trial.should_prune() for trial in trials] == [False, True, True, False]


# Start-up and warm-up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_peers", "pruned"), [(0, False), (1, False), (3, False), (4, True), (5, True)])
def test_nobody_is_judged_before_enough_others_came_to_the_step(num_peers: int, pruned: bool) -> None:
    [*_, last] = verdicts(PeerMedianPruner(4, 0), [*[0.9] * num_peers, 0.1])
    assert last is pruned


def test_start_up_counts_at_the_very_step() -> None:
    _, trials = study_with(PeerMedianPruner(3, 0), [{10: 0.9, 20: 0.9}] * 2 + [{10: 0.9}] * 3 + [{10: 0.9, 20: 0.1}])
    assert not trials[-1].should_prune()


def test_a_trial_at_a_step_that_nobody_else_reached_goes_on() -> None:
    _, trials = study_with(PeerMedianPruner(1, 0), [{10: 0.9}, {10: 0.9}, {10: 0.9, 20: 0.0}])
    assert not trials[-1].should_prune()


def test_a_trial_that_reported_nothing_goes_on() -> None:
    _, trials = study_with(PeerMedianPruner(1, 0), [{10: 0.9}, {10: 0.9}, {}])
    assert not trials[-1].should_prune()


@pytest.mark.parametrize(("warmup_steps", "pruned"), [(0, True), (9, True), (10, True), (11, False), (40, False)])
def test_nobody_is_judged_before_the_warm_up_is_over(warmup_steps: int, pruned: bool) -> None:
    assert verdicts(PeerMedianPruner(1, warmup_steps), [0.9, 0.9, 0.1]) == [False, False, pruned]


# NaN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "pruned"),
    [
        ([0.5, 0.5, NAN], [False, False, True]),
        ([NAN, NAN, 0.1], [False, False, False]),  # one peer with a value is not enough
        ([NAN, 0.5, 0.6, 0.4], [True, False, False, True]),  # 0.5 against 0.5, the mean of 0.4 and 0.6
        ([NAN, NAN, NAN], [False] * 3),
    ],
)
def test_nan_is_below_every_median_and_nothing_to_compare_with(accuracies: list[float], pruned: list[bool]) -> None:
    assert verdicts(PeerMedianPruner(2, 0), accuracies) == pruned


def test_nan_in_the_stored_study(tmp_path: Path) -> None:
    pruner = PeerMedianPruner(2, 0)
    study = open_study(open_storage(tmp_path), "pruned", {}, RandomSampler(seed=0), pruner, new=False)
    trials = [study.ask() for _ in range(3)]
    for trial, accuracy in zip(trials, (0.5, 0.6, NAN), strict=True):
        trial.report(accuracy, 10)
    assert [trial.should_prune() for trial in trials] == [False, False, True]


# Through the driver, and over a stop ----------------------------------------------------------------------------


def num_pruned(session: Session) -> int:
    return [trial.state for trial in session.run().trials].count(TrialState.PRUNED)


def test_trials_in_lockstep_are_pruned_where_a_comparison_with_finished_ones_never_fires(tmp_path: Path) -> None:
    def session(name: str, pruner: BasePruner) -> Session:
        return Session(tmp_path / name, 8, pruner=pruner, engine=ScriptedEngine(8))

    assert num_pruned(session("finished", MedianPruner(2))) == 0
    assert num_pruned(session("peers", PeerMedianPruner(2, 0))) >= 3


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_study_that_is_stopped_and_resumed_gives_the_same_verdicts(tmp_path: Path, num_slots: int) -> None:
    def session(name: str) -> Session:
        return Session(tmp_path / name, 12, pruner=PeerMedianPruner(2, 0), engine=ScriptedEngine(num_slots))

    def ends(study: optuna.Study) -> list[tuple[TrialState, dict[int, float]]]:
        return [(trial.state, trial.intermediate_values) for trial in study.trials]

    whole = ends(session("whole").run())
    assert [state for state, _ in whole].count(TrialState.PRUNED) >= 2
    for trial, step in (("t0000", 10), ("t0002", 7), ("t0005", 10), ("t0007", 3)):
        part = session("parts")
        part.engine.script[trial, step] = part.stop
        part.run()
    assert ends(session("parts").run()) == whole


def test_trials_given_back_and_running_again_are_judged_as_before(tmp_path: Path) -> None:
    def opened() -> optuna.Study:
        sampler = RandomSampler(seed=0)
        return open_study(open_storage(tmp_path), "pruned", {}, sampler, PeerMedianPruner(3, 0), new=False)

    study = opened()
    trials = [study.ask() for _ in range(6)]
    for trial, accuracy in zip(trials, (0.3, 0.8, 0.5, 0.9, 0.1, 0.6), strict=True):
        trial.report(accuracy, 10)
    before = [trial.should_prune() for trial in trials]
    assert set(before) == {False, True}
    resumed = opened()
    for trial in resumed.get_trials(states=(TrialState.RUNNING,)):
        resumed._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    again = [resumed.ask() for _ in range(3)]  # the others still wait
    assert [trial.number for trial in again] == [0, 1, 2]
    assert [trial.should_prune() for trial in again] == before[:3]
