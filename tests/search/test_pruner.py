"""McNemar's test against the best peer: groups in lockstep, any order, early steps, resumed studies."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from optuna.pruners import BasePruner, MedianPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.search.pruner import McNemarPruner
from agnews_lora.search.study import RIGHT, open_storage, open_study
from agnews_lora.training.metrics import packed
from tests.search.scripted import TOTAL_STEPS, ScriptedEngine, Session

ROWS = 100
Answers = NDArray[np.bool_]


def first(number: int) -> Answers:
    """Answers of which the first are right."""
    return np.arange(ROWS) < number


def last(number: int) -> Answers:
    return first(number)[::-1]


def report(trial: optuna.Trial, right: Answers, step: int) -> None:
    """As the driver does."""
    trial.storage.set_trial_system_attr(trial._trial_id, f"{RIGHT}{step}", packed(right))
    trial.report(float(right.mean()), step)


def study_with(pruner: BasePruner, groups: Sequence[Mapping[int, Answers]]) -> tuple[optuna.Study, list[optuna.Trial]]:
    """A study in memory whose trials run, and have reported these answers by step."""
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0), pruner=pruner)
    trials = [study.ask() for _ in groups]
    for trial, answers in zip(trials, groups, strict=True):
        for step, right in answers.items():
            report(trial, right, step)
    return study, trials


def verdicts(pruner: BasePruner, answers: Sequence[Answers], step: int = 10) -> list[bool]:
    """Of trials in lockstep, all reported before the first is judged."""
    _, trials = study_with(pruner, [{step: right} for right in answers])
    return [trial.should_prune() for trial in trials]


# The test ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "pruned"),
    [
        ([first(80), first(75)], [False, False]),  # 5 / √5 = 2.2
        ([first(80), first(73)], [False, True]),  # 7 / √7 = 2.6
        ([first(80), last(73)], [False, False]),  # 27 against 20 rows: 7 / √47 = 1.0
        ([first(50), first(73), first(80)], [True, True, False]),
        ([first(50)] * 4, [False] * 4),
        ([first(0), first(100)], [True, False]),
    ],
)
def test_trials_are_judged_by_the_rows_that_only_one_of_them_and_the_best_answers(
    answers: list[Answers], pruned: list[bool]
) -> None:
    assert verdicts(McNemarPruner(2.5, 10), answers) == pruned


@given(
    st.lists(st.tuples(st.integers(0, 2**32), st.sampled_from([0.3, 0.7, 0.8, 0.9])), min_size=2, max_size=7),
    st.sampled_from([0.5, 1.0, 2.5]),
    st.data(),
)
@settings(max_examples=60)
def test_verdicts_depend_neither_on_the_order_of_reports_nor_on_that_of_judging(
    drawn: list[tuple[int, float]], standard_errors: float, data: st.DataObject
) -> None:
    """Some of the group are a step further on, as where slots were filled at different times."""
    answers = [np.random.default_rng(seed).random(ROWS) < level for seed, level in drawn]
    steps = data.draw(st.lists(st.sampled_from([10, 20]), min_size=len(answers), max_size=len(answers)))
    expected = []
    for number, (right, step) in enumerate(zip(answers, steps, strict=True)):
        others = [other for index, other in enumerate(answers) if index != number and steps[index] == step]
        best = max(others, key=lambda other: float(other.mean()), default=right)  # the first of equals, like `max`
        gaps = best.astype(int) - right
        limit = standard_errors * math.sqrt(40 / step)
        expected.append(gaps.sum() > limit * math.sqrt(np.count_nonzero(gaps)))
    _, trials = study_with(McNemarPruner(standard_errors, 40), [{} for _ in answers])
    for number in data.draw(st.permutations(range(len(trials)))):
        report(trials[number], answers[number], steps[number])
    order = data.draw(st.permutations(range(len(trials))))
    judged = {number: trials[number].should_prune() for number in order}
    assert [judged[number] for number in range(len(trials))] == expected


@pytest.mark.parametrize("alone", [{10: first(90), 20: first(0)}, {}])
def test_a_trial_at_a_step_that_nobody_else_reached_goes_on(alone: dict[int, Answers]) -> None:
    _, trials = study_with(McNemarPruner(2.5, 10), [{10: first(90)}, {10: first(90)}, alone])
    assert not trials[-1].should_prune()


@pytest.mark.parametrize(("total_steps", "pruned"), [(10, True), (30, True), (40, False), (1_000, False)])
def test_the_earlier_it_is_the_further_behind_a_trial_must_be(total_steps: int, pruned: bool) -> None:
    """16 rows against none are four standard errors, twice the two that the end of the training asks for."""
    assert verdicts(McNemarPruner(2.0, total_steps), [first(80), first(64)]) == [False, pruned]


def test_the_best_is_that_by_the_objective_and_who_is_not_behind_by_it_goes_on() -> None:
    _, trials = study_with(McNemarPruner(2.5, 10), [{}, {}])
    for trial, right, macro_f1 in zip(trials, (first(90), first(10)), (0.3, 0.4), strict=True):
        trial.storage.set_trial_system_attr(trial._trial_id, f"{RIGHT}10", packed(right))
        trial.report(macro_f1, 10)
    assert [trial.should_prune() for trial in trials] == [False, False]


def test_steps_that_an_earlier_release_reported_prune_nobody_and_nan_is_nothing_to_compare_with() -> None:
    _, trials = study_with(McNemarPruner(2.5, 10), [{}, {10: first(10)}, {}])
    trials[0].report(0.9, 10)
    trials[2].report(math.nan, 10)
    assert [trial.should_prune() for trial in trials] == [False] * 3


# Through the driver, and over a stop ----------------------------------------------------------------------------


def num_pruned(session: Session) -> int:
    return [trial.state for trial in session.run().trials].count(TrialState.PRUNED)


def test_trials_in_lockstep_are_pruned_where_a_comparison_with_finished_ones_never_fires(tmp_path: Path) -> None:
    def session(name: str, pruner: BasePruner) -> Session:
        return Session(tmp_path / name, 8, pruner=pruner, engine=ScriptedEngine(8))

    assert num_pruned(session("finished", MedianPruner(2))) == 0
    assert num_pruned(session("peers", McNemarPruner(0.5, TOTAL_STEPS))) >= 3


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_study_that_is_stopped_and_resumed_gives_the_same_verdicts(tmp_path: Path, num_slots: int) -> None:
    def session(name: str) -> Session:
        return Session(tmp_path / name, 12, pruner=McNemarPruner(0.5, TOTAL_STEPS), engine=ScriptedEngine(num_slots))

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
        return open_study(open_storage(tmp_path), "pruned", {}, sampler, McNemarPruner(2.5, 10), new=False)

    study = opened()
    trials = [study.ask() for _ in range(6)]
    for trial, accuracy in zip(trials, (0.3, 0.8, 0.5, 0.9, 0.1, 0.6), strict=True):
        report(trial, first(round(100 * accuracy)), 10)
    before = [trial.should_prune() for trial in trials]
    assert set(before) == {False, True}
    resumed = opened()
    for trial in resumed.get_trials(states=(TrialState.RUNNING,)):
        resumed._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    again = [resumed.ask() for _ in range(3)]  # the others still wait
    assert [trial.number for trial in again] == [0, 1, 2]
    assert [trial.should_prune() for trial in again] == before[:3]
