"""The driver between an engine and a study: quota, pruning, failures, and stopping at any point without losing any."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import optuna
import pytest
from mlflow import MlflowClient
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError, StoreAway, TrainingError
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.search import study as keys
from agnews_lora.search.driver import MAX_ATTEMPTS
from agnews_lora.search.pruner import McNemarPruner
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.space import parameters_of
from agnews_lora.search.trials import TrialSummary, best_first, summaries
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialEnd, TrialPlan
from tests.search.scripted import (
    BUDGET,
    EVAL_EVERY,
    INSIDE,
    OUTSIDE,
    SHAPE,
    SPACE,
    TOTAL_STEPS,
    RecordingTracker,
    ScriptedEngine,
    Session,
    accuracy,
    checkpoint,
    eval_point,
    macro_f1,
)

ENDED = {"COMPLETE", "PRUNED", "FAIL"}


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> NoReturn:
        raise error

    return action


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def what_counts(study: optuna.Study) -> list[tuple[Any, ...]]:
    """All of a study that must not depend on how often it was stopped."""
    attributes = (keys.SPEC, keys.TRAINABLE, keys.SCORES)
    return [
        (
            trial.number,
            trial.state,
            trial.params,
            trial.value,
            trial.intermediate_values,
            {key: trial.user_attrs.get(key) for key in attributes},
        )
        for trial in study.trials
    ]


# The quota ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 4])
def test_exactly_as_many_trials_end_as_were_asked_for(tmp_path: Path, num_slots: int) -> None:
    most = 0

    def count() -> None:
        nonlocal most
        now = Counter(states(session.study))
        assert now["RUNNING"] <= num_slots
        assert sum(now.values()) <= 10
        most = max(most, now["RUNNING"])

    session = Session(tmp_path, 10, engine=ScriptedEngine(num_slots, each_step=count))
    study = session.run()
    assert most == num_slots
    assert len(study.trials) == 10
    assert set(states(study)) == {"COMPLETE", "PRUNED"}
    assert [plan.trial for plan in session.engine.plans] == [f"t{number:04d}" for number in range(10)]
    assert session.screen.running == set()


def test_more_trials_can_be_asked_for_later_and_fewer_change_nothing(tmp_path: Path) -> None:
    Session(tmp_path, 3).run()
    for trials, num_started in ((5, 2), (5, 0), (2, 0)):
        session = Session(tmp_path, trials)
        assert len(session.run().trials) == 5
        assert len(session.engine.plans) == num_started


def test_nothing_starts_once_a_stop_is_due(tmp_path: Path) -> None:
    session = Session(tmp_path, 3)
    session.stop()
    assert session.driver.next() is None
    assert states(session.run()) == ["WAITING"]


# What a trial is ----------------------------------------------------------------------------------------------


def test_plans_and_what_the_study_keeps_of_them(tmp_path: Path) -> None:
    session = Session(tmp_path, 6)
    study = session.run()
    for plan, trial in zip(session.engine.plans, study.trials, strict=True):
        recorded = session.tracker.trials[plan.trial]
        assert (plan.folder, plan.checkpoint) == (tmp_path / "work" / plan.trial, None)
        assert trial.user_attrs[keys.SPEC] == plan.spec.as_dict() == recorded.spec.as_dict()
        assert trial.user_attrs[keys.RUN_ID] == recorded.run_id == f"run-of-{plan.trial}"
        count = trainable_parameters(plan.spec, SHAPE)
        assert trial.user_attrs[keys.TRAINABLE] == count <= BUDGET
        assert recorded.facts == {
            "seed": plan.seed,
            "baseline": trial.number == 0,
            "study_trial": trial.number,
            "trainable_parameters": count,
        }
    assert session.engine.plans[0].spec == OUTSIDE
    seeds = [plan.seed for plan in session.engine.plans]
    assert seeds == [42, *(derived_seed(7, number) for number in range(1, 6))]
    assert session.screen.lines[0] == f"t0000 started: {OUTSIDE}, 30 steps"


def test_a_complete_trial(tmp_path: Path) -> None:
    session = Session(tmp_path, 2)
    [_, row] = summaries(session.run())
    plan, recorded = session.engine.plans[1], session.tracker.trials["t0001"]
    final = eval_point(plan, TOTAL_STEPS)
    assert (row.state, row.accuracy, row.loss, row.macro_f1, row.reason) == (
        "COMPLETE",
        final.accuracy,
        final.loss,
        final.macro_f1,
        None,
    )
    [(state, result, reason)] = recorded.ends
    assert (state, reason) == ("COMPLETE", None)
    assert result is not None
    assert result.final == final
    evaluations = [point for point in recorded.points if isinstance(point, EvalPoint)]
    assert evaluations == [eval_point(plan, step) for step in (10, 20, 30)]
    stored = session.study.trials[1]
    assert {key: stored.system_attrs[key] for key in stored.system_attrs if key.startswith(keys.RIGHT)} == {
        f"{keys.RIGHT}{point.step}": point.right for point in evaluations
    }
    assert not any(key.startswith(keys.RIGHT) for key in stored.user_attrs)
    assert [point.step for point in recorded.points if isinstance(point, TrainPoint)] == [5, 10, 15, 20, 25, 30]
    assert session.screen.lines[-1] == "t0001 COMPLETE: None"


def test_the_adapter_is_there_for_the_tracker_and_gone_with_the_work_folder_afterwards(tmp_path: Path) -> None:
    class Keeper(RecordingTracker):
        kept: dict[str, bytes]

        def finish_trial(self, trial: str, end: TrialEnd) -> None:
            super().finish_trial(trial, end)
            if end.result is not None and end.result.adapter is not None:
                self.kept[trial] = (end.result.adapter / "adapter_model.safetensors").read_bytes()

    tracker = Keeper()
    tracker.kept = {}
    study = Session(tmp_path, 8, tracker=tracker).run()
    complete = [row.trial for row in summaries(study) if row.state == "COMPLETE"]
    assert tracker.kept == {trial: trial.encode() for trial in complete}
    assert list((tmp_path / "work").iterdir()) == []


def test_the_sampler_learns_from_a_baseline_inside_the_space(tmp_path: Path) -> None:
    [baseline, _] = Session(tmp_path, 2, baseline=INSIDE).run().trials
    assert baseline.params == parameters_of(INSIDE, SPACE, SHAPE, BUDGET)
    assert baseline.user_attrs[keys.SPEC] == INSIDE.as_dict()
    assert baseline.value == accuracy(INSIDE, TOTAL_STEPS)


# Pruning ------------------------------------------------------------------------------------------------------


def test_the_worse_are_pruned_but_never_the_baseline(tmp_path: Path) -> None:
    session = Session(tmp_path, 14)
    # Trials before the baseline, so that it is compared with better ones.
    session.study._storage.set_trial_state_values(session.study.trials[0]._trial_id, TrialState.FAIL)
    for _ in range(4):
        session.study.enqueue_trial({"targets": "qv", "rank_share": 16 / 18, "learning_rate": 2e-3})
    own = {keys.IDENTITY: session.study.mark(5)}
    session.study.enqueue_trial({}, user_attrs={keys.BASELINE: True, **own})
    rows = summaries(session.run())
    baseline = rows[5]
    assert (baseline.baseline, baseline.state) == (True, "COMPLETE")
    assert baseline.accuracy == accuracy(OUTSIDE, TOTAL_STEPS) < min(row.accuracy or 0 for row in rows[1:5])
    pruned = [row for row in rows if row.state == "PRUNED"]
    assert len(pruned) >= 2
    plans = {plan.trial: plan for plan in session.engine.plans}
    for row in pruned:
        trial, recorded = session.study.trials[row.number], session.tracker.trials[row.trial]
        last = max(trial.intermediate_values)
        assert last in (10, 20)
        earlier = [
            other.intermediate_values[last]
            for other in session.study.trials[: row.number]
            if last in other.intermediate_values
        ]
        assert trial.value == row.accuracy == accuracy(plans[row.trial].spec, last) < max(earlier)
        reason = f"significantly worse than the best other trial at step {last} of 30"
        assert row.reason == reason
        [(state, result, told)] = recorded.ends
        assert (state, told) == ("PRUNED", reason)
        assert result is not None
        assert (result.final, result.adapter, result.steps) == (None, None, last)
        assert f"{row.trial} PRUNED: {reason}" in session.screen.lines


def test_a_configuration_that_is_known_to_be_good_is_not_pruned_where_another_like_it_is(tmp_path: Path) -> None:
    session = Session(tmp_path, 4)
    good = {"targets": "qv", "rank_share": 16 / 18, "learning_rate": 2e-3}
    bad = {"targets": "qk", "rank_share": 1 / 18, "alpha_ratio": 1, "dropout": 0.2, "learning_rate": 1e-4}
    own = {keys.IDENTITY: session.study.mark(2), keys.SOURCE: "Hu et al. 2021"}
    for parameters, attributes in ((good, {}), (bad, own), (bad, {})):
        session.study.enqueue_trial(parameters, user_attrs=attributes)
    _, best, known, other = summaries(session.run())
    assert known.spec == other.spec and (known.accuracy or 1) < (best.accuracy or 0)
    assert (known.state, other.state) == ("COMPLETE", "PRUNED")
    assert session.tracker.trials["t0002"].facts["source"] == "Hu et al. 2021"
    assert "source" not in session.tracker.trials["t0003"].facts


def test_macro_f1_is_what_a_study_by_it_ranks_by_and_every_trial_has_both_scores(tmp_path: Path) -> None:
    """The better a trial's macro-F1, the fewer rows it answers: none is behind by both, and pruned."""
    session = Session(tmp_path, 14, objective="macro_f1")
    session.engine.script["t0003", 14] = session.stop
    assert session.run().metric_names == ["macro_f1"]
    again = Session(tmp_path, 14, objective="macro_f1")
    study, specs = again.run(), {plan.trial: plan.spec for plan in (*session.engine.plans, *again.engine.plans)}
    rows = summaries(study)
    assert {row.state for row in rows} == {"COMPLETE"}
    for row, trial in zip(rows, study.trials, strict=True):
        spec = specs[row.trial]
        assert trial.intermediate_values == {step: macro_f1(spec, step) for step in range(10, row.steps + 1, 10)}
        assert trial.value == row.macro_f1 == macro_f1(spec, row.steps)
        assert (row.accuracy, row.loss) == (accuracy(spec, row.steps), 1 - accuracy(spec, row.steps))
    assert max(study.best_value, -1) == best_first(rows, "macro_f1")[0].macro_f1


class WorstOfThoseThatRun(BasePruner):
    """Prunes the trial that is the worst of all that run, and keeps how many it could compare with."""

    def __init__(self) -> None:
        self.num_compared: list[int] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = max(trial.intermediate_values)
        running = study.get_trials(states=(TrialState.RUNNING,))
        known = [other.intermediate_values[step] for other in running if step in other.intermediate_values]
        self.num_compared.append(len(known))
        return trial.intermediate_values[step] == min(known)


def test_all_points_are_reported_before_the_first_is_judged(tmp_path: Path) -> None:
    pruner = WorstOfThoseThatRun()
    session = Session(tmp_path, 4, pruner=pruner, engine=ScriptedEngine(4))
    study = session.run()
    # Three beside the baseline are judged at the first evaluation, then those that are left; the last one is not.
    assert pruner.num_compared[:3] == [4, 4, 4]
    assert set(pruner.num_compared[3:]) <= {3, 4}
    assert study.trials[0].state is TrialState.COMPLETE


def test_a_final_point_is_reported_but_not_judged(tmp_path: Path) -> None:
    class Never(BasePruner):
        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            assert trial.last_step != TOTAL_STEPS
            return False

    study = Session(tmp_path, 3, pruner=Never()).run()
    assert states(study) == ["COMPLETE"] * 3
    assert all(set(trial.intermediate_values) == {10, 20, 30} for trial in study.trials)


# Failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_failed_trial_keeps_its_reason_and_the_others_go_on(tmp_path: Path, num_slots: int) -> None:
    error = TrainingError("the loss became nan by step 12")
    session = Session(
        tmp_path, 5, pruner=NopPruner(), engine=ScriptedEngine(num_slots, {("t0002", 12): raising(error)})
    )
    study = session.run()
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    row = summaries(study)[2]
    assert (row.reason, row.accuracy) == (str(error), accuracy(session.engine.plans[2].spec, 10))
    [(state, result, report)] = session.tracker.trials["t0002"].ends
    assert (state, result) == ("FAILED", None)
    assert report is not None
    assert report.startswith("Traceback (most recent call last):")
    assert report.endswith(f"TrainingError: {error}\n")
    assert f"t0002 FAIL: {error}" in session.screen.lines
    assert not (tmp_path / "work" / "t0002").exists()


def test_an_error_without_a_text_is_named_by_its_kind(tmp_path: Path) -> None:
    session = Session(tmp_path, 2, engine=ScriptedEngine(1, {("t0001", 1): raising(TrainingError())}))
    assert summaries(session.run())[1].reason == "TrainingError"


def test_a_trial_enqueued_beyond_the_budget_fails_before_the_engine_sees_it(tmp_path: Path) -> None:
    session = Session(tmp_path, 4, pruner=NopPruner())
    session.study.enqueue_trial({"targets": "qv", "rank_share": 19 / 18})
    rows = summaries(session.run())
    assert [row.state for row in rows] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [plan.trial for plan in session.engine.plans] == ["t0000", "t0002", "t0003"]
    assert rows[1].spec is not None
    assert (rows[1].spec.rank, rows[1].trainable_parameters) == (19, 1_188 + 19 * 256)
    reason = "6,052 trainable parameters > budget 6,000 (rank 19 on qv, head full). Lower the rank: the largest rank "
    reason += "that fits is 18"
    assert rows[1].reason == reason
    recorded = session.tracker.trials["t0001"]
    assert recorded.ends == [("FAILED", None, reason)]
    assert rows[1].run_id == recorded.run_id
    assert f"t0001 FAIL: {reason}" in session.screen.lines


@pytest.mark.parametrize("parameters", [{"targets": "all"}, {"targets": "qv", "alpha_ratio": 3}, {"dropout": "none"}])
def test_a_trial_enqueued_with_a_value_that_is_none_fails_and_the_sweep_goes_on(
    tmp_path: Path, parameters: dict[str, Any]
) -> None:
    session = Session(tmp_path, 3)
    session.study.enqueue_trial(parameters)
    rows = summaries(session.run())
    assert [row.state for row in rows] == ["COMPLETE", "FAIL", "COMPLETE"]
    [value] = [value for value in parameters.values() if value != "qv"]
    assert rows[1].reason is not None
    assert rows[1].reason.startswith("enqueued with a value that no trial can have: ")
    assert str(value) in rows[1].reason
    assert (rows[1].spec, rows[1].run_id) == (None, None)
    assert f"t0001 FAIL: {rows[1].reason}" in session.screen.lines


# Stopping, and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_slots", "stopped_at", "running"), [(1, 14, ["t0002"]), (4, 9, ["t0000", "t0001", "t0002", "t0003"])]
)
def test_a_stop_gives_the_running_trials_back_with_their_checkpoints(
    tmp_path: Path, num_slots: int, stopped_at: int, running: list[str]
) -> None:
    first = Session(tmp_path, 6, pruner=NopPruner(), engine=ScriptedEngine(num_slots))
    first.engine.script[running[-1], stopped_at] = first.stop
    study = first.run()
    given_back = [trial for trial in study.trials if trial.state is TrialState.WAITING]
    assert [f"t{trial.number:04d}" for trial in given_back] == running
    assert "RUNNING" not in states(study)
    for trial in given_back:
        name = f"t{trial.number:04d}"
        assert trial.user_attrs[keys.CHECKPOINT] == stopped_at
        reason = f"resumes from checkpoint-{stopped_at} at the next start"
        assert first.tracker.trials[name].ends == [("INTERRUPTED", None, f"stopped; {reason}")]
        assert f"{name} INTERRUPTED: {reason}" in first.screen.lines
    assert first.screen.running == set()

    second = Session(tmp_path, 6, pruner=NopPruner(), engine=ScriptedEngine(num_slots))
    study = second.run()
    assert states(study) == ["COMPLETE"] * 6
    again = second.engine.plans[: len(running)]
    before = {plan.trial: plan for plan in first.engine.plans}
    assert [plan.trial for plan in again] == running
    for plan in again:
        assert plan.checkpoint == tmp_path / "work" / plan.trial / f"checkpoint-{stopped_at}"
        assert (plan.spec, plan.seed) == (before[plan.trial].spec, before[plan.trial].seed)
        assert second.tracker.trials[plan.trial].run_id == f"run-of-{plan.trial}"
        assert [end[0] for end in second.tracker.trials[plan.trial].ends] == ["COMPLETE"]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_checkpoint_that_is_not_sound_is_not_gone_on_from(tmp_path: Path) -> None:
    """The one before is; and where there is none, the trial starts again and says so."""
    first = Session(tmp_path, 2, pruner=NopPruner(), engine=ScriptedEngine())
    first.engine.script["t0001", 14] = first.stop
    first.run()
    folder = tmp_path / "work" / "t0001"
    (folder / "checkpoint-14" / "state").write_text("something else")
    second = Session(tmp_path, 2, pruner=NopPruner(), engine=ScriptedEngine())
    second.engine.script["t0001", 12] = second.stop
    study = second.run()
    assert [(plan.trial, plan.checkpoint) for plan in second.engine.plans] == [("t0001", folder / "checkpoint-10")]
    assert second.screen.lines[1] == "t0001 resumes from checkpoint-10: its checkpoint of step 14 is damaged or missing"
    assert study.trials[1].user_attrs[keys.CHECKPOINT] == 12
    shutil.rmtree(folder)
    third = Session(tmp_path, 2, pruner=NopPruner())
    study = third.run()
    assert third.engine.plans[0].checkpoint is None
    assert third.screen.lines[1] == ("t0001 starts again from step 0: its checkpoint of step 12 is damaged or missing")
    assert study.trials[1].intermediate_values.keys() == {10, 20, 30}
    assert study.trials[1].user_attrs[keys.CHECKPOINT] == 30


def test_a_trial_stopped_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    session = Session(tmp_path, 2, engine=ScriptedEngine(1, {("t0000", 4): raising(KeyboardInterrupt())}))
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert states(session.study) == ["WAITING"]
    reason = "stopped; resumes from its first step at the next start"
    assert session.tracker.trials["t0000"].ends == [("INTERRUPTED", None, reason)]


def test_a_study_that_is_stopped_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", 10)
    expected = what_counts(whole.run())
    assert {"COMPLETE", "PRUNED"} == set(states(whole.study))
    stops = {"t0000": 9, "t0002": 10, "t0004": 1, "t0006": 7}
    seeds: dict[str, int] = {}
    for trial, step in stops.items():
        session = Session(tmp_path / "parts", 10)
        session.engine.script[trial, step] = session.stop
        session.run()
        assert session.stopped
        seeds |= {plan.trial: plan.seed for plan in session.engine.plans}
    last = Session(tmp_path / "parts", 10)
    assert what_counts(last.run()) == expected
    seeds |= {plan.trial: plan.seed for plan in last.engine.plans}
    assert seeds == {plan.trial: plan.seed for plan in whole.engine.plans}


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.search.scripted import RecordingTracker, Session

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

session = Session(Path(sys.argv[1]), 6)
if sys.argv[2] == "training":
    session.engine.script["t0003", 8] = kill
elif sys.argv[2] == "starting a run":
    session.tracker.start_trial = lambda trial, *rest: kill() if trial == "t0003" else f"run-of-{trial}"
    session.tracker.log_points = session.tracker.finish_trial = lambda *_: None
elif sys.argv[2] == "ending a run":
    session.tracker.finish_trial = lambda trial, *_: kill() if trial == "t0003" else None
elif sys.argv[2] == "between checkpoint and close":
    session.engine.script["t0003", 8] = session.stop
    session.driver._close = kill
session.run()
"""


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return what_counts(Session(tmp_path_factory.mktemp("stores"), 6).run())


@pytest.mark.parametrize(
    ("doing", "next_plan"),
    [
        ("training", ("t0003", None)),
        ("starting a run", ("t0003", None)),
        ("ending a run", ("t0004", None)),  # it was trained to its end: only the study does not know yet
        ("between checkpoint and close", ("t0003", "checkpoint-8")),
    ],
)
def test_a_killed_process_loses_nothing(
    tmp_path: Path, doing: str, next_plan: tuple[str, str | None], never_killed: list[tuple[Any, ...]]
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), doing], cwd=Path(__file__).parents[2], check=False
    )
    assert process.returncode == -9
    session = Session(tmp_path, 6)
    assert states(session.study) == [*(["COMPLETE"] * 3), "RUNNING"]
    assert what_counts(session.run()) == never_killed
    plan = session.engine.plans[0]
    assert (plan.trial, plan.checkpoint.name if plan.checkpoint else None) == next_plan


# Errors of the engine and of the stores -----------------------------------------------------------------------


def test_an_engine_that_breaks_leaves_the_failed_trial_failed_and_gives_the_others_back(tmp_path: Path) -> None:
    session = Session(
        tmp_path, 6, engine=ScriptedEngine(3, {("t0001", 7): raising(RuntimeError("the device fell off"))})
    )
    with pytest.raises(RuntimeError, match="the device fell off"):
        session.run()
    assert states(session.study) == ["WAITING", "FAIL", "WAITING"]
    assert summaries(session.study)[1].reason == "the device fell off"
    assert [end[0] for end in session.tracker.trials["t0001"].ends] == ["FAILED"]
    for trial in ("t0000", "t0002"):
        assert [end[0] for end in session.tracker.trials[trial].ends] == ["INTERRUPTED"]
    again = Session(tmp_path, 6)
    assert set(states(again.run())) <= ENDED
    assert [plan.trial for plan in again.engine.plans] == ["t0000", "t0002", "t0003", "t0004", "t0005"]


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path, 2, engine=ScriptedEngine(1, {("t0001", 4): raising(KeyboardInterrupt())}))
    with pytest.raises(KeyboardInterrupt):
        session.run()
    session.driver._close()
    assert len(session.tracker.trials["t0001"].ends) == 1


class Broken(RecordingTracker):
    """A tracker whose store is gone from some call on."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        self._touch("start", trial)
        return super().start_trial(trial, spec, facts, run_id)

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        self._touch("log", trial)
        super().log_points(trial, points)

    def finish_trial(self, trial: str, end: TrialEnd) -> None:
        self._touch("finish", trial)
        super().finish_trial(trial, end)

    def _touch(self, call: str, trial: str) -> None:
        if trial == "t0001" and call == self.call:
            raise OSError(f"the store is gone at {call}")


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_breaks_is_not_hidden_and_no_trial_stays_running(tmp_path: Path, call: str) -> None:
    session = Session(tmp_path, 3, tracker=Broken(call), pruner=NopPruner())
    with pytest.raises(OSError, match=f"the store is gone at {call}"):
        session.run()
    assert states(session.study) == ["COMPLETE", "WAITING"]
    again = Session(tmp_path, 3, pruner=NopPruner())
    assert states(again.run()) == ["COMPLETE"] * 3
    # What had ended was on disk, and only had to be told.
    assert [plan.trial for plan in again.engine.plans] == (["t0002"] if call == "finish" else ["t0001", "t0002"])
    assert [end[0] for end in again.tracker.trials["t0001"].ends] == ["COMPLETE"]


def test_the_time_of_recording_is_counted(tmp_path: Path) -> None:
    seconds: list[float] = []
    session = Session(tmp_path, 2)
    session.engine.each_step = lambda: seconds.append(session.driver.record_seconds)
    session.run()
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[EVAL_EVERY] < seconds[-1]
    assert seconds[0] == seconds[1]  # nothing is recorded between two points


# What reaches the user's screen -------------------------------------------------------------------------------

RESUMED = """
import shutil, sys
from pathlib import Path
import optuna
from agnews_lora.search.study import enqueued_specs
from tests.search.scripted import BUDGET, SHAPE, SPACE, ScriptedEngine, Session

root = Path(sys.argv[1])
first = Session(root, 8, engine=ScriptedEngine(2))
first.study.enqueue_trial({"targets": "qv", "rank_share": 19 / 18, "dropout": 0.2, "learning_rate": 1e-3})
first.study.enqueue_trial({"targets": "nothing"})
first.study.enqueue_trial({"targets": "ffn", "dropout": 0.1})
assert [number for number, _ in enqueued_specs(first.study, SPACE, SHAPE, BUDGET)] == [1, 3]
first.engine.script["t0000", 25] = first.stop
first.run()
shutil.rmtree(root / "work" / "t0000")
second = Session(root, 8)
study = second.run()
assert second.engine.plans[0].trial == "t0000" and second.engine.plans[0].checkpoint is None
assert study.trials[0].intermediate_values.keys() == {10, 20, 30}
assert [trial.state.name for trial in study.trials].count("FAIL") == 2
assert optuna.importance.get_param_importances(study, params=["targets", "learning_rate"])
"""


def test_a_study_with_steps_reported_twice_and_values_out_of_range_says_nothing_by_itself(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", RESUMED, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.stdout, process.stderr, process.returncode) == ("", "", 0)


@pytest.mark.filterwarnings("ignore:The reported value is ignored")
def test_a_step_that_is_reported_again_keeps_its_first_value(tmp_path: Path) -> None:
    session = Session(tmp_path, 1)
    plan = session.driver.next()
    assert plan is not None
    for value in (0.4, 0.9):
        session.driver.evaluated([EvalPoint(plan.trial, 10, value, value, 0.5, 50, False, 1_000)])
    assert session.study.trials[0].intermediate_values == {10: 0.4}
    session.driver._close()


# With the runs of MLflow --------------------------------------------------------------------------------------


def test_with_the_real_tracker_a_study_and_its_runs_agree(tmp_path: Path) -> None:
    client = open_client(tmp_path)

    def session() -> Session:
        runs = SweepRuns(client, "scripted", {"budget": BUDGET}, {}, trial_curves)
        runs.open_parent("scripted", params={}, tags={}, texts={})
        return Session(tmp_path, 6, tracker=runs, engine=ScriptedEngine(2), pruner=McNemarPruner(0.5, TOTAL_STEPS))

    first = session()
    good, bad = {"targets": "qv", "learning_rate": 2e-3}, {"targets": "qk", "learning_rate": 1e-4}
    for parameters in ({"targets": "qv", "rank_share": 19 / 18}, {"targets": "nothing"}, good, good, bad):
        first.study.enqueue_trial(parameters)
    first.engine.script["t0003", 12] = first.stop
    first.run()
    interrupted = [row for row in summaries(first.study) if row.state == "WAITING"]
    assert interrupted
    for row in interrupted:
        run = client.get_run(str(row.run_id))
        assert (run.info.status, run.data.tags["state"]) == ("KILLED", "INTERRUPTED")
        assert run.data.tags["reason"].startswith("stopped; resumes from checkpoint-")

    second = session()
    rows = summaries(second.run())
    assert {row.run_id for row in interrupted} < {row.run_id for row in rows}
    assert [row.state for row in rows[:3]] == ["COMPLETE", "FAIL", "FAIL"]
    assert {row.state for row in rows} == ENDED
    ends = {"COMPLETE": ("FINISHED", "COMPLETE"), "PRUNED": ("KILLED", "PRUNED"), "FAIL": ("FAILED", "FAILED")}
    recorded = [row for row in rows if row.spec is not None]
    assert len(recorded) == 5
    for row in recorded:
        check_run(client, row.run_id, row, ends[row.state])
    experiment = client.get_experiment_by_name("scripted")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert {run.info.run_id for run in children} == {row.run_id for row in recorded}


def test_a_run_that_is_deleted_while_its_trial_trains_is_made_again(tmp_path: Path) -> None:
    client = open_client(tmp_path)
    runs = SweepRuns(client, "scripted", {"budget": BUDGET}, {}, trial_curves)
    runs.open_parent("scripted", identity="of the study", params={}, tags={}, texts={})
    session, deleted = Session(tmp_path, 3, tracker=runs, engine=ScriptedEngine(1)), []

    def delete() -> None:
        deleted.append(str(session.driver.active["t0001"].run_id))
        client.delete_run(deleted[0])

    session.engine.script["t0001", 12] = delete
    rows = summaries(session.run())
    assert [row.state for row in rows] == ["COMPLETE"] * 3
    assert rows[1].run_id not in deleted
    for row in rows:
        check_run(client, row.run_id, row, ("FINISHED", "COMPLETE"))


def check_run(client: MlflowClient, run_id: str | None, row: TrialSummary, end: tuple[str, str]) -> None:
    assert run_id is not None
    assert row.spec is not None
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["state"]) == end
    assert run.data.tags["study_trial"] == str(row.number)
    assert run.data.tags["baseline"] == str(row.baseline).lower()
    assert run.data.params["lora_r"] == str(row.spec.rank)
    assert run.data.params["trainable_parameters"] == str(row.trainable_parameters)
    history = client.get_metric_history(run_id, "eval/accuracy")
    steps = [metric.step for metric in history]
    assert sorted(set(steps)) == sorted(steps)
    assert [metric.value for metric in history] == [accuracy(row.spec, step) for step in steps]
    artifacts = {file.path for file in client.list_artifacts(run_id)}
    if row.state == "FAIL":
        assert "error.txt" in artifacts
    else:
        assert history[-1].value == row.accuracy
        assert {"accuracy_curve.png", "loss_curve.png"} <= artifacts
        assert ("adapter" in artifacts) == (row.state == "COMPLETE")


# Stores that go away ------------------------------------------------------------------------------------------


class Away(RecordingTracker):
    """A tracker whose store is away while told so; it counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.asked = 0

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        self._reach()
        return super().start_trial(trial, spec, facts, run_id)

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        self._reach()
        super().log_points(trial, points)

    def finish_trial(self, trial: str, end: TrialEnd) -> None:
        self._reach()
        super().finish_trial(trial, end)

    def _reach(self) -> None:
        self.asked += 1
        if self.away:
            raise StoreAway("the run store cannot be reached (Connection refused)")


def steps_of(tracker: RecordingTracker, kind: type[TrainPoint | EvalPoint]) -> dict[str, list[int]]:
    return {
        trial: [point.step for point in recorded.points if isinstance(point, kind)]
        for trial, recorded in tracker.trials.items()
    }


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_tracker_that_is_away_for_a_while_gets_everything_in_order_afterwards(
    tmp_path: Path, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agnews_lora.search.retry.RETRY_SECONDS", 0.0)
    tracker = Away()
    engine = ScriptedEngine(num_slots)
    session = Session(tmp_path, 6, pruner=NopPruner(), tracker=tracker, engine=engine)

    def go(away: bool) -> Callable[[], None]:
        return lambda: setattr(tracker, "away", away)

    engine.script["t0001", 12] = go(True)  # t0001 ends in the outage, and others begin
    engine.script["t0003" if num_slots == 1 else "t0004", 7] = go(False)
    study = session.run()
    assert states(study) == ["COMPLETE"] * 6
    assert tracker.asked > 6 * 4
    assert set(steps_of(tracker, EvalPoint)) == {f"t{number:04d}" for number in range(6)}
    assert set(map(tuple, steps_of(tracker, EvalPoint).values())) == {(10, 20, 30)}
    assert set(map(tuple, steps_of(tracker, TrainPoint).values())) == {(5, 10, 15, 20, 25, 30)}
    assert all([end[0] for end in recorded.ends] == ["COMPLETE"] for recorded in tracker.trials.values())
    for trial, row in zip(study.trials, summaries(study), strict=True):
        assert row.run_id == f"run-of-{row.trial}"
        assert trial.intermediate_values.keys() == {10, 20, 30}


def test_a_tracker_that_stays_away_ends_the_sweep_and_the_next_start_delivers_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agnews_lora.search.retry.RETRY_SECONDS", 0.0)
    tracker = Away()
    first = Session(tmp_path, 4, pruner=NopPruner(), tracker=tracker, patience=0.2)
    first.engine.script["t0001", 12] = lambda: setattr(tracker, "away", True)
    first.engine.each_step = lambda: time.sleep(0.01)
    with pytest.raises(StorageError, match=r"Cannot write to the run store.*Nothing is lost"):
        first.run()
    told = states(first.study)
    assert told[0] == "COMPLETE" and set(told[1:]) == {"WAITING"}, "nothing is told that its run does not know"
    again = Session(tmp_path, 4, pruner=NopPruner())
    assert states(again.run()) == ["COMPLETE"] * 4
    trained = [plan.trial for plan in again.engine.plans]
    assert "t0001" not in trained, "it had ended, and was on disk"
    for trial in ("t0001", "t0002", "t0003"):
        assert steps_of(again.tracker, EvalPoint)[trial] == [10, 20, 30]
        assert [end[0] for end in again.tracker.trials[trial].ends] == ["COMPLETE"]


def test_a_storage_that_is_away_for_a_while_gets_everything_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that run go on, without being judged; new ones begin when it is back."""
    monkeypatch.setattr("agnews_lora.search.retry.RETRY_SECONDS", 0.0)
    monkeypatch.setattr("agnews_lora.search.driver.IDLE_SECONDS", 0.01)
    session = Session(tmp_path, 5, pruner=McNemarPruner(0.5, TOTAL_STEPS), engine=ScriptedEngine(2))
    engine = session.study._storage._backend.engine  # type: ignore[attr-defined]
    database, moved, other = (tmp_path / name for name in ("optuna.db", "moved.db", "other.db"))
    other.write_text("This is no database." * 100)

    def leave() -> None:
        database.rename(moved)
        other.rename(database)
        engine.dispose()  # what is open would still reach the file that was moved
        threading.Timer(0.5, come_back).start()

    def come_back() -> None:
        moved.replace(database)
        engine.dispose()

    monkeypatch.setattr("agnews_lora.search.retry._FINAL_CODES", set())
    session.engine.script["t0001", 9] = leave
    study = session.run()
    assert set(states(study)) <= {"COMPLETE", "PRUNED"} and len(study.trials) == 5
    assert study.trials[1].state is TrialState.COMPLETE, "it could not be judged while the storage was away"
    assert all({10} <= trial.intermediate_values.keys() for trial in study.trials)
    assert study.trials[1].intermediate_values.keys() == {10, 20, 30}


def test_a_trial_that_kills_its_process_again_and_again_fails_with_the_reason(tmp_path: Path) -> None:
    for _ in range(MAX_ATTEMPTS):
        session = Session(tmp_path, 3, pruner=NopPruner())
        plan = session.driver.next()
        while plan is not None and plan.trial == "t0000":  # the baseline is sound
            session.engine.run(Given(plan), session.driver)
            plan = session.driver.next()
        assert plan is not None and plan.trial == "t0001"  # and here the process dies
    last = Session(tmp_path, 3, pruner=NopPruner())
    rows = summaries(last.run())
    assert [row.state for row in rows] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert rows[1].reason is not None
    assert rows[1].reason.startswith("5 attempts in a row ended without getting beyond a first checkpoint")
    assert [end[0] for end in last.tracker.trials["t0001"].ends] == ["FAILED"]
    assert [plan.trial for plan in last.engine.plans] == ["t0002"]


class Given:
    """A source of one plan that was taken from the driver already."""

    def __init__(self, plan: TrialPlan) -> None:
        self.plans = [plan]

    def next(self) -> TrialPlan | None:
        return self.plans.pop() if self.plans else None


def test_a_checkpoint_ends_the_row_of_attempts(tmp_path: Path) -> None:
    for attempt in range(2 * MAX_ATTEMPTS):
        engine = ScriptedEngine(1, {("t0000", 11 if attempt % 2 else 5): raising(SystemExit())})
        session = Session(tmp_path, 1, engine=engine)
        session.driver._close = lambda: None  # type: ignore[method-assign]  # as where the process is killed
        with pytest.raises(SystemExit):
            session.run()
        shutil.rmtree(tmp_path / "work" / "t0000" / "checkpoint-10", ignore_errors=True)
    assert states(Session(tmp_path, 1).run()) == ["COMPLETE"]


def test_a_trial_that_somebody_ended_in_the_study_stops_and_keeps_their_verdict(tmp_path: Path) -> None:
    session = Session(tmp_path, 3, pruner=NopPruner())
    session.engine.script["t0001", 12] = lambda: session.study.tell(1, 0.75)
    study = session.run()
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[1].value == 0.75
    assert [end[0] for end in session.tracker.trials["t0001"].ends] == ["PRUNED"]
    assert study.trials[2].intermediate_values.keys() == {10, 20, 30}


# Workers that die ---------------------------------------------------------------------------------------------


def test_the_trials_of_a_dead_worker_go_to_the_next_that_asks_under_their_numbers(tmp_path: Path) -> None:
    session = Session(tmp_path, 4, pruner=NopPruner())
    driver = session.driver
    lost, other = driver.next("first"), driver.next("second")
    assert lost is not None and other is not None
    checkpoint(lost, 10, driver)
    driver.evaluated([eval_point(lost, 10)])
    driver.requeue([lost.trial], "its worker died")
    again = driver.next("second")
    assert again is not None
    assert (again.trial, again.spec, again.seed) == (lost.trial, lost.spec, lost.seed)
    assert again.checkpoint == tmp_path / "work" / lost.trial / "checkpoint-10"
    assert f"{lost.trial} INTERRUPTED: its worker died" in session.screen.lines
    driver._close()
    assert states(session.study) == ["WAITING", "WAITING"]


def test_a_trial_that_took_its_worker_twice_trains_alone(tmp_path: Path) -> None:
    session = Session(tmp_path, 4, pruner=NopPruner())
    driver = session.driver
    for _ in range(2):
        plan = driver.next("first")
        assert plan is not None and plan.trial == "t0000"
        driver.requeue([plan.trial], "its worker died")
    beside = Session(tmp_path, 4, pruner=NopPruner()).driver  # of another start: t0000 is suspect there as well
    first = beside.next("first")
    assert first is not None and first.trial == "t0000"
    assert beside.next("first") is None, "the suspect has its process for itself"
    second = beside.next("second")
    assert second is not None and second.trial == "t0001"
    beside._close()
