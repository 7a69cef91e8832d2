"""The queue: the baseline once and first, and what a person enqueued, counted before it is started."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.adapters.budget import require_within_budget, trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.errors import BudgetError
from agnews_lora.search.space import suggest
from agnews_lora.search.study import BASELINE, SPEC, enqueue_baseline, enqueued_specs, open_storage, open_study
from tests.search.scripted import BOTH_HEADS, BUDGET, INSIDE, OUTSIDE, SHAPE, SPACE


def opened(root: Path) -> optuna.Study:
    return open_study(open_storage(root), "queued", {}, RandomSampler(seed=0), NopPruner(), new=False)


def with_baseline(root: Path, baseline: TrialSpec = OUTSIDE, space: Space = SPACE) -> optuna.Study:
    study = opened(root)
    enqueue_baseline(study, baseline, space, SHAPE, BUDGET)
    return study


def waiting(study: optuna.Study, space: Space = SPACE) -> dict[int, TrialSpec]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(enqueued_specs(study, space, SHAPE, BUDGET))


# The baseline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SPACE, BOTH_HEADS])
def test_a_baseline_inside_the_space_is_asked_from_it(tmp_path: Path, space: Space) -> None:
    trial = with_baseline(tmp_path, INSIDE, space).ask()
    assert (trial.number, trial.user_attrs[BASELINE]) == (0, True)
    assert suggest(trial, space, SHAPE, BUDGET) == INSIDE
    assert trial.params["learning_rate"] == INSIDE.learning_rate


@pytest.mark.parametrize(
    "baseline",
    [
        OUTSIDE,
        replace(INSIDE, rank=19),
        replace(INSIDE, alpha=12.0),
        replace(INSIDE, dropout=0.5),
        replace(INSIDE, targets="all-linear", rank=1, alpha=2.0),
        replace(INSIDE, head="out_proj"),
    ],
)
def test_a_baseline_outside_the_space_has_no_parameters(tmp_path: Path, baseline: TrialSpec) -> None:
    [trial] = with_baseline(tmp_path, baseline).trials
    assert (trial.params, trial.system_attrs, trial.user_attrs[BASELINE]) == ({}, {"fixed_params": {}}, True)


def test_the_baseline_is_enqueued_once(tmp_path: Path) -> None:
    assert len(with_baseline(tmp_path).trials) == 1
    study = with_baseline(tmp_path)
    assert len(study.trials) == 1
    study.tell(study.ask(), 0.5)
    assert len(with_baseline(tmp_path).trials) == 1
    opened(tmp_path).tell(opened(tmp_path).ask(), 0.5)
    assert [BASELINE in trial.user_attrs for trial in with_baseline(tmp_path).trials] == [True, False]


def test_the_baseline_comes_after_what_is_there_already(tmp_path: Path) -> None:
    opened(tmp_path).enqueue_trial({"targets": "qv"})
    study = with_baseline(tmp_path)
    assert [trial.user_attrs.get(BASELINE) for trial in study.trials] == [None, True]
    assert len(with_baseline(tmp_path).trials) == 2
    assert [opened(tmp_path).ask().number for _ in range(2)] == [0, 1]


# What a person enqueued ---------------------------------------------------------------------------------------


def test_a_rank_beyond_the_budget_is_seen_before_the_trial_is_started(tmp_path: Path) -> None:
    study = with_baseline(tmp_path)
    study.enqueue_trial(
        {"targets": "qv", "rank_share": 19 / 18, "alpha_ratio": 2, "dropout": 0.1, "learning_rate": 1e-3}
    )
    study.enqueue_trial({"targets": "qv", "rank_share": 1.0, "alpha_ratio": 2, "dropout": 0.1, "learning_rate": 1e-3})
    specs = waiting(study)
    assert specs == {
        1: TrialSpec("qv", rank=19, alpha=38.0, dropout=0.1, learning_rate=1e-3),
        2: TrialSpec("qv", rank=18, alpha=36.0, dropout=0.1, learning_rate=1e-3),
    }
    assert trainable_parameters(specs[2], SHAPE) <= BUDGET
    with pytest.raises(
        BudgetError, match=r"> budget 6,000 .*rank 19 on qv, head full.*the largest rank that fits is 18"
    ):
        require_within_budget(specs[1], SHAPE, BUDGET)
    assert [trial.state.name for trial in study.trials] == ["WAITING"] * 3  # nothing was started for it


@pytest.mark.parametrize(
    ("space", "parameters", "spec"),
    [
        (SPACE, {}, TrialSpec("qk", 1, 1.0, 0.0, 1e-4)),
        (SPACE, {"targets": "ffn"}, TrialSpec("ffn", 1, 1.0, 0.0, 1e-4)),
        (SPACE, {"targets": "ffn", "rank_share": 40.0}, TrialSpec("ffn", 480, 480.0, 0.0, 1e-4)),
        (SPACE, {"alpha_ratio": 8, "learning_rate": 0.01}, TrialSpec("qk", 1, 8.0, 0.0, 0.01)),
        (BOTH_HEADS, {"head": "out_proj"}, TrialSpec("qk", 1, 1.0, 0.0, 1e-4, "out_proj")),
        (
            BOTH_HEADS,
            {"targets": "qv", "head": "out_proj", "rank_share": 1.0},
            TrialSpec("qv", 22, 22.0, 0.0, 1e-4, "out_proj"),
        ),
    ],
)
def test_what_is_left_open_takes_the_smallest_values(
    tmp_path: Path, space: Space, parameters: dict[str, Any], spec: TrialSpec
) -> None:
    study = opened(tmp_path)
    study.enqueue_trial(parameters)
    assert waiting(study, space) == {0: spec}


def test_values_that_optuna_refuses_leave_no_configuration(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for parameters in ({"targets": "all"}, {"alpha_ratio": 3}, {"dropout": "none"}, {"learning_rate": -1.0}):
        study.enqueue_trial(parameters)
    study.enqueue_trial({"targets": "ffn"})
    assert list(waiting(study)) == [4]


def test_trials_that_were_given_back_ended_or_run_are_not_waiting(tmp_path: Path) -> None:
    study = with_baseline(tmp_path)
    for rank in (2, 3, 4, 5):
        study.enqueue_trial({"targets": "qv", "rank_share": rank / 18})
    trials = [study.ask() for _ in range(4)]
    for trial in trials[1:]:
        trial.set_user_attr(SPEC, suggest(trial, SPACE, SHAPE, BUDGET).as_dict())
    study._storage.set_trial_state_values(trials[1]._trial_id, TrialState.WAITING)
    study.tell(trials[2], 0.5)
    assert {number: spec.rank for number, spec in waiting(opened(tmp_path)).items()} == {4: 5}
