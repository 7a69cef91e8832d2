"""The known configurations: inside any space, and the first trials of a new study alone."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import require_within_budget
from agnews_lora.adapters.spec import HEADS, PRESETS
from agnews_lora.config.sweep import Range, Space
from agnews_lora.search.prior import known_good, rate_for
from agnews_lora.search.space import outside, suggest
from agnews_lora.search.study import SOURCE, SPEC, SweepStudy, enqueue_baseline, enqueue_known, open_storage, open_study
from tests.search.scripted import BUDGET, INSIDE, OUTSIDE, SHAPE, SPACE

SHAPES = (shape_of("roberta-base"), shape_of("embedded:minilm"), SHAPE)


def some_of(values: tuple[object, ...]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


def ranges(low: float, high: float) -> st.SearchStrategy[Range[float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda ends: Range(low=min(ends), high=max(ends)))


SPACES = st.builds(
    Space,
    targets=some_of(tuple(PRESETS)),
    heads=some_of(HEADS),
    alpha_ratio=some_of((1, 2, 3, 8, 64)),
    dropout=ranges(0.0, 0.9),
    learning_rate=ranges(1e-6, 1.0),
)


@settings(max_examples=60, deadline=None)
@given(space=SPACES, shape=st.sampled_from(SHAPES), budget=st.integers(1, 2_000_000), at_most=st.integers(0, 9))
def test_all_lie_inside_the_space_and_fit_each_once(space: Space, shape: object, budget: int, at_most: int) -> None:
    found = list(known_good(space, shape, budget, INSIDE, at_most))
    for spec in found:
        assert outside(spec, space, shape, budget) == []
        require_within_budget(spec, shape, budget)
    every = list(known_good(space, shape, budget, INSIDE, 99))
    assert found == every[:at_most]
    if every:
        assert every[1:] == list(known_good(space, shape, budget, every[0], 99))


def test_rates_follow_the_width_of_the_base() -> None:
    large = replace(SHAPES[0], hidden_size=1_024)
    assert [rate_for(shape) for shape in (large, *SHAPES[:2])] == pytest.approx([2.9e-4, 4.5e-4, 1.27e-3], rel=0.01)


def begun(root: Path, num_known: int) -> SweepStudy:
    """The study as a command finds it, which knows so many configurations."""
    study = open_study(open_storage(root), "known", {}, RandomSampler(seed=0), NopPruner(), new=False)
    enqueue_baseline(study, OUTSIDE, SPACE, SHAPE, BUDGET)
    enqueue_known(study, known_good(SPACE, SHAPE, BUDGET, OUTSIDE, num_known), SPACE, SHAPE, BUDGET)
    return study


def test_they_are_enqueued_once_behind_the_baseline_and_not_in_a_study_that_has_begun(tmp_path: Path) -> None:
    expected = known_good(SPACE, SHAPE, BUDGET, OUTSIDE, 2)
    assert len(expected) == 2
    begun(tmp_path, 0)
    begun(tmp_path, 1)  # killed before the second
    study = begun(tmp_path, 2)
    assert len(begun(tmp_path, 2).trials) == 3
    baseline, *known = [study.ask() for _ in range(3)]
    assert {suggest(trial, SPACE, SHAPE, BUDGET): trial.user_attrs[SOURCE] for trial in known} == expected
    assert SOURCE not in baseline.user_attrs
    assert SOURCE not in study.ask().user_attrs


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE])
def test_a_study_that_knew_none_gets_none_when_it_is_resumed(tmp_path: Path, state: TrialState) -> None:
    study = begun(tmp_path, 0)
    trial = study.ask()
    trial.set_user_attr(SPEC, OUTSIDE.as_dict())
    values = [0.5] if state is TrialState.COMPLETE else None
    study._storage.set_trial_state_values(trial._trial_id, state, values)
    assert len(begun(tmp_path, 2).trials) == 1
