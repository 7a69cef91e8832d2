"""How trials stand: what a reader gets of them, and which is the best."""

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState

from agnews_lora.search import study as keys
from agnews_lora.search.claims import give_back
from agnews_lora.search.standings import Standing, best_of, standings, trial_name
from tests.search.test_study import SPEC, opened


def test_standings(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.enqueue_trial({}, user_attrs={keys.BASELINE: True})
    for accuracy in (0.8, 0.3, None, 0.6):
        trial = study.ask()
        trial.set_user_attr(keys.SPEC, replace(SPEC, rank=trial.number + 1).as_dict())
        trial.set_user_attr(keys.TRAINABLE, 1000 + trial.number)
        trial.set_user_attr(keys.RUN_ID, f"run-{trial.number}")
        if accuracy:
            trial.report(accuracy - 0.1, step=20)
            trial.report(accuracy, step=100)
    complete, pruned, failed, given_back = [trial.number for trial in study.trials]
    study._storage.set_trial_user_attr(study.trials[complete]._trial_id, keys.LOSS, 0.5)
    study._storage.set_trial_user_attr(study.trials[complete]._trial_id, keys.MACRO_F1, 0.79)
    study._storage.set_trial_user_attr(study.trials[pruned]._trial_id, keys.REASON, "below the median")
    study._storage.set_trial_user_attr(study.trials[failed]._trial_id, keys.REASON, "out of memory")
    study.tell(complete, 0.81)
    study.tell(pruned, state=TrialState.PRUNED)
    study.tell(failed, state=TrialState.FAIL)
    give_back(study, study.trials[given_back]._trial_id)
    study.enqueue_trial({"x": 0.5})  # never started

    rows = standings(opened(tmp_path))
    assert [(row.trial, row.number, row.state) for row in rows] == [
        ("t0000", 0, "COMPLETE"),
        ("t0001", 1, "PRUNED"),
        ("t0002", 2, "FAIL"),
        ("t0003", 3, "WAITING"),
    ]
    assert rows[0] == Standing(
        trial="t0000",
        number=0,
        state="COMPLETE",
        spec=replace(SPEC, rank=1),
        baseline=True,
        accuracy=0.81,
        loss=0.5,
        macro_f1=0.79,
        trainable_parameters=1000,
        run_id="run-0",
        reason=None,
    )
    assert [row.accuracy for row in rows] == [0.81, 0.3, None, 0.6]
    assert [row.baseline for row in rows] == [True, False, False, False]
    assert [row.reason for row in rows] == [None, "below the median", "out of memory", None]
    assert [row.spec for row in rows] == [replace(SPEC, rank=rank) for rank in (1, 2, 3, 4)]


def test_trial_names_sort_as_their_numbers_do() -> None:
    assert [trial_name(number) for number in (0, 7, 123, 12_345)] == ["t0000", "t0007", "t0123", "t12345"]


def row(number: int, state: str = "COMPLETE", accuracy: float | None = 0.5, loss: float | None = 0.5) -> Standing:
    return Standing(trial_name(number), number, state, SPEC, False, accuracy, loss, 0.5, 1000, "run", None)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([], None),
        ([row(0, "PRUNED", 0.9), row(1, "FAIL", None), row(2, "RUNNING", 0.9), row(3, "WAITING", 0.9)], None),
        ([row(0, accuracy=0.5), row(1, accuracy=0.7), row(2, accuracy=0.6), row(3, "PRUNED", 0.9)], 1),
        ([row(0, accuracy=0.0), row(1, "PRUNED", 0.9)], 0),
        ([row(0, loss=0.5), row(1, loss=0.4), row(2, loss=0.45)], 1),
        ([row(1, loss=0.4), row(0, loss=0.4), row(2, loss=0.4)], 0),
        ([row(0, loss=float("nan")), row(1, loss=0.4)], 1),
        ([row(0, loss=None), row(1, loss=0.4)], 1),
        ([row(0, loss=float("nan")), row(1, loss=float("inf"))], 0),
        ([row(0, accuracy=0.7, loss=float("nan")), row(1, accuracy=0.6)], 0),
    ],
)
def test_the_best(rows: list[Standing], best: int | None) -> None:
    for order in (rows, rows[::-1]):
        found = best_of(order)
        assert (found.number if found else None) == best


def test_optuna_completes_no_trial_without_a_number(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for value in (float("nan"), None):
        trial = study.ask()
        with pytest.raises(ValueError, match=r"not acceptable|No values were told"):
            study.tell(trial, value, state=TrialState.COMPLETE)
        with pytest.raises(ValueError, match="Values were told"):
            study.tell(trial, 0.5, state=TrialState.PRUNED)
        study.tell(trial, state=TrialState.FAIL)
    trial = study.ask()
    trial.report(float("nan"), step=1)
    study.tell(trial, state=TrialState.PRUNED)
    assert [trial.value for trial in study.trials] == [None, None, None]
    assert best_of(standings(study)) is None
