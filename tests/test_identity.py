"""Whose trials are these? What people do to studies with Optuna's own tools neither wins, counts nor ends a sweep."""

import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.pruners import NopPruner
from optuna.trial import TrialState, create_trial

from agnews_lora.errors import StorageError, StudyError
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing, open_confirmation
from agnews_lora.search.driver import num_left
from agnews_lora.search.racing import repeated as with_repetitions
from agnews_lora.search.results import SweepResult
from agnews_lora.search.study import SweepStudy, open_storage, require_compatible, study_names, work_folder
from agnews_lora.search.trials import TrialSummary, best_first, summaries
from tests.project import agnews_lora
from tests.search.conftest import no_wait_for_the_disk  # noqa: F401  # it speeds up every database
from tests.search.scripted import BUDGET, SHAPE, SPACE, TOTAL_STEPS, ScriptedEngine, Session
from tests.search.test_confirmation import Round
from tests.search.test_results import facts


def url(root: Path) -> str:
    return f"sqlite:///{root}/optuna.db"


def by_hand(root: Path, name: str = "scripted") -> optuna.Study:
    """The study as a person loads it."""
    return optuna.load_study(study_name=name, storage=url(root))


def dump(study: optuna.Study) -> list[Any]:
    return [study.user_attrs, study.directions, study.get_trials()]


def finished(root: Path, trials: int = 4) -> Session:
    session = Session(root, trials, pruner=NopPruner())
    session.run()
    return session


# Trials that the sweep did not train ---------------------------------------------------------------------------

RANGES = {"learning_rate": FloatDistribution(1e-6, 10.0, log=True), "dropout": FloatDistribution(0.0, 1.0)}
AT_EACH_STEP = dict.fromkeys(range(10, TOTAL_STEPS + 1, 10), 0.999)


def copied(study: optuna.Study) -> None:
    study.add_trial(study.best_trial)


def all_copied(study: optuna.Study) -> None:
    study.add_trials(study.get_trials())


def known_from_elsewhere(study: optuna.Study) -> None:
    best = study.best_trial
    study.add_trial(create_trial(params=best.params, distributions=best.distributions, value=0.99))


def outside_every_range(study: optuna.Study) -> None:
    values = {"learning_rate": 9.0, "dropout": 0.9}
    study.add_trial(create_trial(params=values, distributions=RANGES, value=math.inf, intermediate_values=AT_EACH_STEP))


def pruned(study: optuna.Study) -> None:
    study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values=AT_EACH_STEP))


def failed(study: optuna.Study) -> None:
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=study.best_trial.user_attrs))


def running(study: optuna.Study) -> None:
    study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=AT_EACH_STEP | {20: math.nan}))


def asked(study: optuna.Study) -> None:
    study.tell(study.ask(), 0.98)


def waiting_with_reports(study: optuna.Study) -> None:
    attributes = study.best_trial.user_attrs
    study.add_trial(create_trial(state=TrialState.WAITING, intermediate_values=AT_EACH_STEP, user_attrs=attributes))


ADDED = (
    *(copied, all_copied, known_from_elsewhere, outside_every_range, pruned, failed, running, asked),
    waiting_with_reports,
)


@pytest.mark.parametrize("add", ADDED)
def test_trials_that_others_added_neither_win_count_nor_prune(
    tmp_path: Path, add: Callable[[optuna.Study], None]
) -> None:
    before = summaries(finished(tmp_path / "a").study)
    add(by_hand(tmp_path / "a"))
    others = [trial for trial in by_hand(tmp_path / "a").trials if trial.number >= len(before)]
    again = Session(tmp_path / "a", 8)
    assert summaries(again.study) == before and num_left(again.study, 4) == 0
    study = again.run()
    rows = summaries(study)
    assert len(rows) == 8 and rows[: len(before)] == before
    assert all(row.number < 4 or row.number >= 4 + len(others) for row in rows)
    assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"}
    assert repr(by_hand(tmp_path / "a").trials[4 : 4 + len(others)]) == repr(others)  # NaN is not NaN
    result = SweepResult.from_study(study, None, facts(), state="COMPLETE")
    assert sum(result.counts.values()) == 8
    assert result.winner is not None and result.winner.run_id in {row.run_id for row in rows}
    assert all(0 < (row.score("accuracy") or 0) < 0.95 for row in rows)
    assert len({row.run_id for row in rows}) == 8
    assert all(0.999 not in trial.intermediate_values.values() for trial in study.trials)


def test_what_was_added_is_never_repeated(tmp_path: Path) -> None:
    study = finished(tmp_path).study
    best = best_first(summaries(study), "accuracy")[0]
    known_from_elsewhere(by_hand(tmp_path))
    copied(by_hand(tmp_path))
    rounds = Round(Session(tmp_path, 4, pruner=NopPruner()))
    repeated = rounds.run()
    names = {trial.user_attrs[keys.CONFIRMS] for trial in repeated.trials}
    assert best.trial in names and names <= {row.trial for row in summaries(study)}
    # Nor does a repetition that a person added change the mean.
    known = with_repetitions(summaries(study), find_confirmation(study), "accuracy")
    by_hand(tmp_path, "scripted/confirmation").add_trial(repeated.trials[0])
    by_hand(tmp_path, "scripted/confirmation").enqueue_trial({"targets": "qk"})
    again = find_confirmation(study)
    assert again is not None and len(again.trials) == len(repeated.trials)
    assert with_repetitions(summaries(study), again, "accuracy") == known


@pytest.mark.parametrize(("state", "value"), [(TrialState.COMPLETE, 0.999), (TrialState.FAIL, None)])
@pytest.mark.parametrize("step", [12, TOTAL_STEPS])
def test_a_trial_that_somebody_ended_counts_but_cannot_win(
    tmp_path: Path, state: TrialState, value: float | None, step: int
) -> None:
    session = Session(tmp_path, 3, pruner=NopPruner())
    session.engine.script["t0001", step] = lambda: by_hand(tmp_path).tell(1, value, state=state)
    rows = summaries(session.run())
    assert [row.state for row in rows] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert rows[1].reason == "ended in the study by somebody else"
    assert rows[1] not in best_first(rows, "accuracy")


@pytest.mark.parametrize("of", ["best", "baseline", "running"])
def test_attributes_that_were_copied_into_the_queue_are_not_taken_over(tmp_path: Path, of: str) -> None:
    session = Session(tmp_path, 3, pruner=NopPruner())
    if of == "running":
        session.engine.script["t0002", 15] = session.stop
    session.run()
    study = by_hand(tmp_path)
    source = {"best": study.trials[1], "baseline": study.trials[0], "running": study.trials[2]}[of]
    study.enqueue_trial({"targets": "qv"}, user_attrs=source.user_attrs)
    again = Session(tmp_path, 4, pruner=NopPruner())
    rows = summaries(again.run())
    assert [row.state for row in rows] == ["COMPLETE"] * 4
    assert (rows[3].trial, rows[3].run_id, rows[3].baseline) == ("t0003", "run-of-t0003", False)
    assert rows[3].spec is not None and rows[3].spec.targets == "qv"
    assert len({row.seed for row in rows}) == 4


def test_a_range_that_optuna_does_not_store_beside_the_spaces_own_is_named(tmp_path: Path) -> None:
    session = Session(tmp_path, 1)
    session.run()
    choices = {"learning_rate": CategoricalDistribution(["high", "low"])}
    by_hand(tmp_path).add_trial(create_trial(params={"learning_rate": "low"}, distributions=choices, value=0.9))
    with pytest.raises(StudyError, match=r"trial 1, added by hand, has learning_rate as .*--new"):
        require_compatible(Session(tmp_path, 1).study, SPACE, SHAPE, BUDGET)


def test_a_kill_between_the_steps_of_a_start_leaves_the_trial_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(SystemExit):
        pass

    def kill(*arguments: Any) -> None:
        raise Killed

    session = finished(tmp_path, 2)
    by_hand(tmp_path).enqueue_trial({"targets": "qk"})
    for broken in ("set_trial_user_attr", "set_trial_state_values"):
        study = Session(tmp_path, 4).study
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(study._storage, broken, kill)
            study.ask()
    assert [trial.number for trial in session.study.trials] == [0, 1, 2]
    rows = summaries(Session(tmp_path, 4).run())
    assert [row.number for row in rows] == [0, 1, 2, 3] and rows[2].spec is not None and rows[2].spec.targets == "qk"


# Studies that were deleted, copied, or are another's -------------------------------------------------------------


def test_a_study_that_was_deleted_and_made_again_takes_no_confirmation_of_the_old(tmp_path: Path) -> None:
    session = finished(tmp_path)
    Round(session).run()
    old = dump(by_hand(tmp_path, "scripted/confirmation"))
    optuna.delete_study(study_name="scripted", storage=url(tmp_path))
    again = finished(tmp_path)
    assert again.study.identity != session.study.identity
    assert find_confirmation(again.study) is None and num_missing(again.study, 2, 3) == 2
    result = SweepResult.from_study(again.study, find_confirmation(again.study), facts(), state="COMPLETE")
    assert result.confirmed == ()
    opened = open_confirmation(again.study, 2, 3, 13)
    assert opened is not None and len(opened.trials) == 2
    assert find_confirmation(Session(tmp_path, 4).study).study_name == opened.study_name != "scripted/confirmation"  # type: ignore[union-attr]
    assert dump(by_hand(tmp_path, "scripted/confirmation")) == old


def test_a_study_that_is_deleted_while_it_trains_ends_the_sweep_with_its_reason(tmp_path: Path) -> None:
    session = Session(tmp_path, 3, engine=ScriptedEngine(2))
    session.engine.script["t0001", 12] = lambda: optuna.delete_study(study_name="scripted", storage=url(tmp_path))
    with pytest.raises(StorageError, match=r"somebody deleted it.*Start the sweep again"):
        session.run()
    assert [recorded.ends[-1][0] for recorded in session.tracker.trials.values()] == ["INTERRUPTED"] * 2
    assert not session.screen.running
    shutil.rmtree(tmp_path / "work")
    assert len(summaries(Session(tmp_path, 3).run())) == 3


def test_studies_of_one_name_have_their_own_work_folders(tmp_path: Path) -> None:
    """In two storages, or one made anew after the other was deleted."""
    first, work = Session(tmp_path, 2).study, tmp_path / "work"
    folder = work_folder(first, work)
    (folder / "t0000").mkdir()
    second = Session(tmp_path / "other", 2).study
    other = work_folder(second, work)
    assert (first.study_name, list(other.iterdir())) == (second.study_name, [other / "study"])
    (other / "t0000").mkdir()
    optuna.delete_study(study_name="scripted", storage=url(tmp_path))
    assert not (work_folder(Session(tmp_path, 2).study, work) / "t0000").exists()
    for study, expected in ((first, folder), (second, other)):
        assert work_folder(study, work) == expected and (expected / "t0000").exists()


def test_a_copy_is_left_alone_and_the_original_goes_on(tmp_path: Path) -> None:
    session = finished(tmp_path / "a")
    Round(session).run()
    where = {"from_storage": url(tmp_path / "a"), "to_storage": url(tmp_path / "a")}
    optuna.copy_study(from_study_name="scripted", to_study_name="a copy", **where)
    optuna.copy_study(from_study_name="scripted/confirmation", to_study_name="a copy/confirmation", **where)
    copies = [dump(by_hand(tmp_path / "a", name)) for name in ("a copy", "a copy/confirmation")]
    again = Session(tmp_path / "a", 6, pruner=NopPruner())
    assert again.study.study_name == "scripted" and len(summaries(again.run())) == 6
    assert find_confirmation(again.study).study_name == "scripted/confirmation"  # type: ignore[union-attr]
    assert study_names(open_storage(tmp_path / "a"), "scripted") == ["scripted"]
    assert [dump(by_hand(tmp_path / "a", name)) for name in ("a copy", "a copy/confirmation")] == copies
    # The copy is no second one; copied back under its name, it is the study again.
    optuna.delete_study(study_name="scripted", storage=url(tmp_path / "a"))
    with pytest.raises(StudyError, match=r"its study scripted is gone, and a copy is a copy of it.*--new"):
        Session(tmp_path / "a", 4)
    assert dump(by_hand(tmp_path / "a", "a copy")) == copies[0]
    optuna.copy_study(from_study_name="a copy", to_study_name="scripted", **where)
    back = Session(tmp_path / "a", 5, pruner=NopPruner())
    assert num_missing(back.study, 2, 3) == 0
    assert [row.number for row in summaries(back.run())] == [0, 1, 2, 3, 4]


def test_a_copy_in_another_storage_and_a_file_that_was_moved_go_on(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    (tmp_path / "b").mkdir()
    optuna.copy_study(from_study_name="scripted", from_storage=url(tmp_path / "a"), to_storage=url(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "optuna.db").write_bytes((tmp_path / "a" / "optuna.db").read_bytes())
    for folder in ("b", "c"):
        assert [row.number for row in summaries(Session(tmp_path / folder, 5).run())] == [0, 1, 2, 3, 4]
    assert len(by_hand(tmp_path / "a").trials) == 4


def make_nothing(study: optuna.Study) -> None: ...


def make_trials(study: optuna.Study) -> None:
    study.optimize(lambda trial: trial.suggest_float("x", -5, 5) ** 2, n_trials=2)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("make", [make_nothing, make_trials])
def test_a_study_of_another_project_is_refused_and_left_untouched(
    tmp_path: Path, direction: str, make: Callable[[optuna.Study], None]
) -> None:
    make(optuna.create_study(study_name="scripted", storage=url(tmp_path), direction=direction))
    before = dump(by_hand(tmp_path))
    with pytest.raises(StudyError, match=rf"no sweep made \(direction {direction}.*--storage.*--new"):
        Session(tmp_path, 2)
    assert dump(by_hand(tmp_path)) == before
    assert optuna.get_all_study_names(url(tmp_path)) == ["scripted"]


def as_an_earlier_release(root: Path) -> None:
    """Take away what an earlier release did not write."""
    with sqlite3.connect(root / "optuna.db") as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'bound'")
        database.execute("DELETE FROM trial_user_attributes WHERE key = 'identity'")
        database.execute(
            "DELETE FROM study_user_attributes WHERE key = 'identity' AND study_id IN "
            "(SELECT study_id FROM studies WHERE study_name LIKE '%/confirmation')"
        )


def test_studies_of_an_earlier_release_go_on_with_their_trials(tmp_path: Path) -> None:
    session = Session(tmp_path, 5, pruner=NopPruner(), engine=ScriptedEngine(1))
    session.engine.script["t0004", 15] = session.stop
    session.run()
    Round(session).run()
    known = summaries(session.study), num_missing(session.study, 2, 3)
    as_an_earlier_release(tmp_path)
    by_hand(tmp_path).add_trial(create_trial(value=0.99))
    where = {"from_storage": url(tmp_path), "to_storage": url(tmp_path)}
    optuna.copy_study(from_study_name="scripted", to_study_name="a copy", **where)
    again = Session(tmp_path, 5, pruner=NopPruner())
    assert again.study.study_name == "scripted"
    assert (summaries(again.study), num_missing(again.study, 2, 3)) == known
    assert again.engine.plans == [] and [row.state for row in summaries(again.run())] == ["COMPLETE"] * 5
    assert [plan.trial for plan in again.engine.plans] == ["t0004"]
    copied(by_hand(tmp_path))
    assert len(summaries(Session(tmp_path, 5).study)) == 5


# Values by hand --------------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": "2e-3"},
    "rank_share": {"targets": "qk", "rank_share": "4"},
    "rank": {"rank": 2, "learning_rate": 1e-3},
    "lr": {"lr": 0.002},
    "nan": {"learning_rate": math.nan},
    "inf": {"rank_share": math.inf},
    "-inf": {"dropout": -math.inf},
    "5.0": {"targets": "qk", "learning_rate": 5.0},
    "-0.001": {"learning_rate": -0.001},
    "dropout 1.0": {"dropout": 1.0},
    "alpha_ratio 16": {"alpha_ratio": 16},
    "alpha_ratio '2'": {"alpha_ratio": "2"},
    "True": {"alpha_ratio": True},
    "query": {"targets": "query"},
    "['qk', 'qv']": {"targets": ["qk", "qv"]},
    "None": {"targets": None},
    "False": {"dropout": False},
    "rank_share -1": {"rank_share": -1},
    "1000000000": {"learning_rate": 10**400},
    "rank_share 1000000000": {"rank_share": 10**400},
    "head": {"head": "full"},
    "{}": {"learning_rate": {}},
}


def test_values_that_no_trial_can_have_fail_their_own_trials_and_are_named(tmp_path: Path) -> None:
    Session(tmp_path, 2)
    study = by_hand(tmp_path)
    for wrong in WRONG.values():
        study.enqueue_trial(wrong)
    session = Session(tmp_path, len(WRONG) + 2)
    assert list(keys.enqueued_specs(session.study, SPACE, SHAPE, BUDGET)) == []
    rows = summaries(session.run())
    assert [row.state for row in rows] == ["COMPLETE", *["FAIL"] * len(WRONG), "COMPLETE"]
    for (named, wrong), row in zip(WRONG.items(), rows[1:], strict=False):
        assert row.reason is not None and all(word in row.reason for word in named.split()), (named, row.reason)
        assert any(name in row.reason for name in wrong), row.reason
    assert summaries(Session(tmp_path, len(WRONG) + 2).study) == rows


@pytest.mark.parametrize(
    "parameters",
    [{}, {"targets": "ffn"}, {"learning_rate": 1e-3, "alpha_ratio": 4.0}, {"dropout": 0, "rank_share": 1}],
)
def test_what_a_person_left_open_is_drawn(tmp_path: Path, parameters: dict[str, Any]) -> None:
    Session(tmp_path, 2)
    by_hand(tmp_path).enqueue_trial(parameters)
    rows = summaries(Session(tmp_path, 2).run())
    assert [row.state for row in rows] == ["COMPLETE"] * 2
    assert by_hand(tmp_path).trials[1].params.items() >= parameters.items()


# Whole commands --------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_a_finished_project_whose_study_people_worked_on(finished_project: Path) -> None:
    storage = url(finished_project / "mlruns")
    study = optuna.load_study(study_name="small", storage=storage)
    known_from_elsewhere(study)
    copied(study)
    study.enqueue_trial({"learning_rate": "2e-3", "rank": 2})
    optuna.copy_study(from_study_name="small", from_storage=storage, to_storage=storage, to_study_name="backup")
    backup = dump(optuna.load_study(study_name="backup", storage=storage))
    done = agnews_lora(finished_project, "sweep", "small", "--trials", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "t0005 failed" in done.stdout and "3 complete, 0 pruned, 1 failed" in done.stdout
    assert dump(optuna.load_study(study_name="backup", storage=storage)) == backup
    result = SweepResult.from_json((finished_project / "mlruns" / "results" / "small.json").read_text("utf-8"))
    assert [row.number for row in result.trials] == [0, 1, 2, 5]
    assert all(isinstance(row, TrialSummary) and (row.accuracy or 0) < 0.98 for row in result.trials)
    shared = optuna.create_study(study_name="small", storage=url(finished_project), direction="minimize")
    refused = agnews_lora(finished_project, "sweep", "small", "--storage", url(finished_project))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "--storage" in refused.stderr
    assert dump(shared) == [{}, shared.directions, []]
    assert isinstance(SweepStudy("small", open_storage(finished_project / "mlruns")).identity, str)
