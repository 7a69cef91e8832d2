"""The confirmation: what it repeats and when, and how it is resumed."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from agnews_lora.errors import TrainingError
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing, open_confirmation
from agnews_lora.search.driver import num_left
from agnews_lora.search.racing import Confirmed, choose, repeated
from agnews_lora.search.trials import best_first, summaries, trial_name
from tests.search.scripted import TOTAL_STEPS, ScriptedEngine, Session

SEED = 7


@dataclass
class Round:
    """One start of the confirmation of a session's study."""

    session: Session
    trials: int = 2
    seeds: int = 3
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        opened = open_confirmation(self.session.study, self.trials, self.seeds, SEED)
        assert opened is not None
        self.study = opened
        self.driver = self.session.drive(opened, len(opened.trials))

    def run(self) -> optuna.Study:
        """Train round after round."""
        while num_missing(self.session.study, self.trials, self.seeds) and not self.session.stopped:
            self.open()
            self.driver.run(self.engine)
        return self.study


def ranked(study: optuna.Study, trials: int = 2, seeds: int = 3) -> tuple[Confirmed, ...]:
    settings = {"trials": trials, "seeds": seeds, "prefer": "best"}
    objective = keys.objective_of(study)
    return choose(repeated(summaries(study), find_confirmation(study), objective), objective, settings)[0]


@pytest.fixture
def searched(tmp_path: Path) -> Session:
    session = Session(tmp_path, trials=8)
    session.run()
    return session


def names(study: optuna.Study) -> list[str]:
    return [trial_name(trial) for trial in study.get_trials(deepcopy=False)]


def test_the_best_are_repeated_with_other_seeds_and_the_same_configuration(searched: Session) -> None:
    first, second = best_first(summaries(searched.study), "accuracy")[:2]
    engine = ScriptedEngine()
    repeats = Round(searched, engine=engine).run()
    assert names(repeats) == [f"{row.trial}-s{number}" for number in (2, 3) for row in (first, second)]
    assert num_left(repeats, len(repeats.trials)) == 0
    by_name = {plan.trial: plan for plan in engine.plans}
    for row in (first, second):
        plans = [by_name[f"{row.trial}-s{number}"] for number in (2, 3)]
        assert [plan.spec for plan in plans] == [row.spec, row.spec]
        own = searched.tracker.trials[row.trial].facts["seed"]
        assert len({own, *(plan.seed for plan in plans)}) == 3
    facts = searched.tracker.trials[f"{first.trial}-s2"].facts
    assert facts["confirms"] == first.trial and not facts["baseline"]


def test_the_seeds_depend_on_the_sweeps_seed_and_the_trial_alone(tmp_path: Path) -> None:
    def seeds(folder: str, trials: int) -> dict[str, int]:
        session = Session(tmp_path / folder, trials=6)
        session.run()
        opened = open_confirmation(session.study, trials, 3, SEED)
        assert opened is not None
        return {trial_name(trial): trial.user_attrs[keys.SEED] for trial in opened.get_trials(deepcopy=False)}

    few, many = seeds("a", 1), seeds("b", 3)
    assert few.items() <= many.items()
    assert len(set(many.values())) == 3


def test_the_search_learns_nothing_from_the_round(searched: Session) -> None:
    before = [(trial.state, trial.params, trial.value) for trial in searched.study.trials]
    Round(searched).run()
    assert [(trial.state, trial.params, trial.value) for trial in searched.study.trials] == before


def test_nothing_is_pruned_however_bad_it_is(tmp_path: Path) -> None:
    session = Session(tmp_path, trials=9)
    session.run()
    assert any(row.state == "PRUNED" for row in summaries(session.study)), "the pruner of the search is awake"
    repeats = Round(session, trials=8, seeds=4, engine=ScriptedEngine(num_slots=4)).run()
    assert {trial.state for trial in repeats.trials} == {TrialState.COMPLETE}
    assert all(max(trial.intermediate_values) == TOTAL_STEPS for trial in repeats.trials)


def test_a_round_that_was_stopped_goes_on_where_it_ended(searched: Session, tmp_path: Path) -> None:
    engine = ScriptedEngine()
    best = best_first(summaries(searched.study), "accuracy")[0].trial
    engine.script[f"{best}-s3", 15] = searched.stop
    Round(searched, engine=engine).run()
    assert num_missing(searched.study, 2, 3) == 2
    again = Session(tmp_path, trials=8)
    rest = ScriptedEngine()
    study = Round(again, engine=rest).run()
    assert num_missing(again.study, 2, 3) == 0 and num_left(study, len(study.trials)) == 0
    assert rest.plans[0].trial == f"{best}-s3" and rest.plans[0].checkpoint is not None
    assert len(names(study)) == 4


def test_opening_it_twice_enqueues_nothing_twice(searched: Session) -> None:
    assert num_missing(searched.study, 2, 3) == 2
    Round(searched)
    assert names(Round(searched).study) == names(Round(searched).study)
    assert num_missing(searched.study, 2, 3) == 2


def test_a_longer_search_repeats_only_what_is_new(searched: Session, tmp_path: Path) -> None:
    Round(searched).run()
    more = Session(tmp_path, trials=30)
    more.run()
    best = {row.trial for row in best_first(summaries(more.study), "accuracy")[:2]}
    engine = ScriptedEngine()
    Round(more, engine=engine).run()
    trained = {plan.trial.split("-")[0] for plan in engine.plans}
    assert trained <= best and trained, "thirty trials find better ones than eight"
    assert num_missing(more.study, 2, 3) == 0


def test_a_repetition_that_fails_puts_its_trial_behind(searched: Session) -> None:
    first, second = (row.trial for row in best_first(summaries(searched.study), "accuracy")[:2])
    engine = ScriptedEngine()
    engine.script[f"{first}-s2", 10] = fail
    Round(searched, engine=engine).run()
    rows = ranked(searched.study)
    assert [row.own.trial for row in rows] == [second, first]
    assert [row.num_failed for row in rows] == [0, 1]
    assert [len(row.runs) for row in rows] == [3, 2]
    assert num_missing(searched.study, 2, 3) == 0


def test_a_study_by_macro_f1_repeats_its_best_by_that_score_and_chooses_by_its_mean(tmp_path: Path) -> None:
    session = Session(tmp_path, trials=6, objective="macro_f1")
    session.run()
    best = [row.trial for row in best_first(summaries(session.study), "macro_f1")[:2]]
    assert best != [row.trial for row in best_first(summaries(session.study), "accuracy")[:2]]
    study = Round(session).run()
    assert study.metric_names == ["macro_f1"] and names(study)[:2] == [f"{trial}-s2" for trial in best]
    rows = ranked(session.study)
    assert all(trial.value == trial.user_attrs[keys.SCORES]["macro_f1"] for trial in study.trials)
    assert [row.own.trial for row in rows] == best
    assert (rows[0].mean("macro_f1") or 0.0) >= (rows[1].mean("macro_f1") or 0.0)


def fail() -> None:
    raise TrainingError("the loss is not finite")


def test_without_a_complete_trial_there_is_no_round(tmp_path: Path) -> None:
    session = Session(tmp_path, trials=1)
    session.engine.script["t0000", 3] = fail
    session.run()
    assert open_confirmation(session.study, 3, 3, SEED) is None
    assert find_confirmation(session.study) is None
    assert num_missing(session.study, 3, 3) == 0
    assert ranked(session.study) == ()


# Beside the end of the search ------------------------------------------------------------------------------------


def outcome(session: Session) -> list[tuple[Any, ...]]:
    """What a sweep found, the best first: each confirmed trial with the scores of its runs."""
    return [
        (row.own.trial, row.own.spec, *((run.trial, run.seed, run.accuracy, run.loss) for run in row.runs))
        for row in ranked(session.study)
    ]


@pytest.mark.parametrize(("slots", "trials", "best", "seeds"), [(1, 6, 2, 3), (2, 8, 3, 2), (4, 13, 6, 2)])
def test_repetitions_fill_the_slots_that_the_search_leaves_free(
    tmp_path: Path, slots: int, trials: int, best: int, seeds: int
) -> None:
    apart = Session(tmp_path / "apart", trials, engine=ScriptedEngine(slots))
    apart.run()
    Round(apart, best, seeds, apart.engine).run()
    beside = Session(tmp_path / "beside", trials, engine=ScriptedEngine(slots), confirmation=(best, seeds))
    beside.run()
    assert summaries(beside.study) == summaries(apart.study)
    assert outcome(beside) == outcome(apart) and len(outcome(beside)) == best
    assert (beside.engine.num_idle < apart.engine.num_idle) == (slots > 1)
    orders = [[plan.trial for plan in session.engine.plans] for session in (apart, beside)]
    assert slots > 1 or orders[0] == orders[1]


class Killed(BaseException):
    """Ends a process that puts nothing back."""


@pytest.mark.parametrize(("at", "killed"), [(20, False), (55, True), (65, False), (80, True)])
def test_whenever_it_is_stopped_or_killed_the_best_of_all_are_confirmed(tmp_path: Path, at: int, killed: bool) -> None:
    def end() -> None:
        if first.engine.num_steps < 4 * at:
            return
        if killed:
            raise Killed
        first.stop()

    first = Session(tmp_path, trials=9, engine=ScriptedEngine(4, each_step=end), confirmation=(3, 2))
    with suppress(Killed):
        first.engine.run(first.driver, first.driver)
        first.run()
    again = Session(tmp_path, trials=9, engine=ScriptedEngine(4), confirmation=(3, 2))
    again.run()
    best = [row.trial for row in best_first(summaries(again.study), "accuracy")[:3]]
    rows = ranked(again.study)
    assert sorted(row.own.trial for row in rows) == sorted(best) and [len(row.runs) for row in rows] == [2, 2, 2]
    assert num_missing(again.study, 3, 2) == 0 and again.driver.is_done()
    assert len(names(again.study)) == 9


def test_a_trial_that_can_still_be_displaced_is_not_repeated(searched: Session) -> None:
    assert open_confirmation(searched.study, 2, 3, SEED, num_left=2) is None
    first, second = best_first(summaries(searched.study), "accuracy")[:2]
    sure = open_confirmation(searched.study, 2, 3, SEED, num_left=1)
    assert sure is not None and names(sure) == [f"{first.trial}-s2"]
    both = open_confirmation(searched.study, 2, 3, SEED)
    assert both is not None and names(both)[1:] == [f"{second.trial}-s2"]


# The choice --------------------------------------------------------------------------------------------------


def tell(study: optuna.Study, luck: Callable[[str], float], losses: Mapping[str, float] | None = None) -> None:
    """End all trials of a round, each with an accuracy by name."""
    for _ in study.get_trials(deepcopy=False):
        trial = study.ask()
        accuracy, loss = luck(trial_name(trial)), (losses or {}).get(trial_name(trial), 0.5)
        trial.set_user_attr(keys.SCORES, {"accuracy": accuracy, "macro_f1": 1 - accuracy, "loss": loss})
        study.tell(trial, accuracy)


def test_the_mean_chooses_and_not_the_lucky_run(searched: Session) -> None:
    lucky, steady = best_first(summaries(searched.study), "accuracy")[:2]
    assert lucky.accuracy is not None and steady.accuracy is not None
    opened = open_confirmation(searched.study, 2, 3, SEED)
    assert opened is not None
    tell(opened, lambda name: 0.1 if name.startswith(lucky.trial) else 0.999)
    best, other = ranked(searched.study)
    assert (best.own.trial, other.own.trial) == (steady.trial, lucky.trial)
    assert other.mean("accuracy") == pytest.approx((lucky.accuracy + 0.1) / 2)
    assert other.drop("accuracy") == pytest.approx(lucky.accuracy - (lucky.accuracy + 0.1) / 2)
    assert (best.drop("accuracy") or 0.0) < 0 < (other.drop("accuracy") or 0.0)


def test_ties_go_to_the_lower_mean_loss(searched: Session) -> None:
    rows = best_first(summaries(searched.study), "accuracy")[:2]
    assert all(row.accuracy is not None for row in rows)
    opened = open_confirmation(searched.study, 2, 2, SEED)
    assert opened is not None
    # Each repetition makes up for its own run's accuracy, so that both means are the same.
    accuracy = {f"{row.trial}-s2": 1 - float(row.accuracy or 0) for row in rows}
    tell(opened, accuracy.__getitem__, {f"{rows[0].trial}-s2": 0.9, f"{rows[1].trial}-s2": 0.01})
    assert [row.own.trial for row in ranked(searched.study)] == [rows[1].trial, rows[0].trial]


def test_a_round_belongs_to_one_study(tmp_path: Path) -> None:
    sessions: list[Any] = [Session(tmp_path / name, trials=3) for name in "ab"]
    for session in sessions:
        session.run()
    Round(sessions[0]).run()
    assert find_confirmation(sessions[1].study) is None
