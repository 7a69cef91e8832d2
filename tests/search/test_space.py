"""The space under the budget: nothing infeasible is asked for, ranges are static, configurations can be enqueued."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import feasible_ranks, trainable_parameters
from agnews_lora.adapters.spec import PRESETS, ModelShape, TrialSpec
from agnews_lora.config.sweep import Range, Space
from agnews_lora.errors import BudgetError
from agnews_lora.search.space import describe, distributions, outside, parameters_of, rank_of, shared, smallest, suggest

ROBERTA_BASE = shape_of("roberta-base")
MINILM = shape_of("embedded:minilm")
MILLION = 1_000_000
# Under it, with the full head only qk, qv and qkv fit; with out_proj all presets do.
MIXED_BUDGET = 650_000


def space(**changes: Any) -> Space:
    values = {"dropout": Range(low=0.0, high=0.2), "learning_rate": Range(low=5e-5, high=1e-3), **changes}
    return Space(**values)


BOTH_HEADS = space(heads=("full", "out_proj"))
CASES = {
    "one head": (space(), ROBERTA_BASE, MILLION),
    "both heads": (BOTH_HEADS, ROBERTA_BASE, MILLION),
    "both heads, some presets with one": (BOTH_HEADS, ROBERTA_BASE, MIXED_BUDGET),
    "both heads, all presets with one": (BOTH_HEADS, ROBERTA_BASE, 600_000),
    "single values": (
        space(
            targets=("ffn",),
            alpha_ratio=(2,),
            dropout=Range(low=0.1, high=0.1),
            learning_rate=Range(low=1e-3, high=1e-3),
        ),
        MINILM,
        30_000,
    ),
}
SAMPLERS = {"random": RandomSampler, "tpe": TPESampler}


def new_study(sampler: BaseSampler | None = None) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler or RandomSampler(seed=0))


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", CASES)
def test_every_configuration_fits_and_lies_inside(case: str, sampler: str) -> None:
    given_space, shape, budget = CASES[case]
    study = new_study(SAMPLERS[sampler](seed=1))
    asked: set[tuple[str, str]] = set()
    for _ in range(200):
        trial = study.ask()
        spec = suggest(trial, given_space, shape, budget)
        count = trainable_parameters(spec, shape)
        assert count <= budget
        assert outside(spec, given_space, shape, budget) == []
        again = optuna.trial.FixedTrial(parameters_of(spec, given_space, shape, budget))
        assert suggest(again, given_space, shape, budget) == spec
        asked.add((spec.targets, spec.head))
        study.tell(trial, count / budget)
    feasible = feasible_ranks(list(given_space.targets), list(given_space.heads), shape, budget)
    assert asked <= set(feasible)
    assert asked == set(feasible) or sampler == "tpe"  # TPE may leave what does not pay


@pytest.mark.parametrize("case", CASES)
def test_every_range_is_static_and_described(case: str) -> None:
    given_space, shape, budget = CASES[case]
    offered = distributions(given_space, shape, budget)
    common = shared(given_space, shape, budget)
    study = new_study()
    asked: set[str] = set()
    for _ in range(200):
        trial = study.ask()
        suggest(trial, given_space, shape, budget)
        assert {name: offered[name] for name in trial.distributions} == trial.distributions
        assert set(common) <= set(trial.params)
        asked |= set(trial.params)
    assert asked == set(offered)
    assert {name: offered[name] for name in common} == common
    described = describe(given_space, shape, budget)
    assert json.loads(json.dumps(described)) == described
    assert set(described) == set(offered)


def test_the_names_and_ranges_of_the_real_space() -> None:
    assert describe(space(), ROBERTA_BASE, MILLION) == {
        "targets": list(PRESETS),
        "rank_share": [0.0, 1.0],
        "alpha_ratio": [1, 2, 4, 8],
        "dropout": [0.0, 0.2],
        "learning_rate": [5e-5, 1e-3],
    }
    learning_rate = distributions(space(), ROBERTA_BASE, MILLION)["learning_rate"]
    assert learning_rate == FloatDistribution(5e-5, 1e-3, log=True)
    names = ["targets", "rank_share", "alpha_ratio", "dropout", "learning_rate"]
    assert list(shared(space(), ROBERTA_BASE, MILLION)) == names


def test_presets_and_heads_that_do_not_fit_are_never_asked_for() -> None:
    described = describe(BOTH_HEADS, ROBERTA_BASE, MIXED_BUDGET)
    assert described["targets"] == list(PRESETS)
    assert described["head"] == ["full", "out_proj"]
    assert "head" not in shared(BOTH_HEADS, ROBERTA_BASE, MIXED_BUDGET)
    assert "head" in shared(BOTH_HEADS, ROBERTA_BASE, MILLION)
    assert describe(space(), ROBERTA_BASE, MIXED_BUDGET)["targets"] == ["qk", "qv", "qkv"]


def test_a_space_of_which_nothing_fits_is_an_error_with_the_numbers_in_it() -> None:
    for function in (distributions, shared, describe):
        with pytest.raises(BudgetError, match=r"budget 600,000 fits no adapter. .* needs 630,532"):
            function(space(), ROBERTA_BASE, 600_000)
    with pytest.raises(BudgetError):
        suggest(new_study().ask(), space(), ROBERTA_BASE, 600_000)


@settings(max_examples=50)
@given(st.data(), st.sampled_from(sorted(CASES)))
def test_an_enqueued_configuration_comes_back_exactly(data: st.DataObject, case: str) -> None:
    given_space, shape, budget = CASES[case]
    feasible = feasible_ranks(list(given_space.targets), list(given_space.heads), shape, budget)
    (preset, head), highest = data.draw(st.sampled_from(sorted(feasible.items())))
    rank = data.draw(st.integers(1, highest))
    spec = TrialSpec(
        targets=preset,
        rank=rank,
        alpha=float(rank * data.draw(st.sampled_from(given_space.alpha_ratio))),
        dropout=data.draw(st.floats(given_space.dropout.low, given_space.dropout.high)),
        learning_rate=data.draw(st.floats(given_space.learning_rate.low, given_space.learning_rate.high)),
        head=head,
    )
    study = new_study()
    study.enqueue_trial(parameters_of(spec, given_space, shape, budget))
    assert suggest(study.ask(), given_space, shape, budget) == spec


@pytest.mark.parametrize("case", CASES)
def test_the_smallest_values_stand_in_for_what_is_left_open(case: str) -> None:
    given_space, shape, budget = CASES[case]
    values = smallest(given_space, shape, budget)
    assert set(values) == set(distributions(given_space, shape, budget))
    for preset in describe(given_space, shape, budget)["targets"]:
        spec = suggest(optuna.trial.FixedTrial(values | {"targets": preset}), given_space, shape, budget)
        assert (spec.targets, spec.rank, spec.alpha) == (preset, 1, float(given_space.alpha_ratio[0]))
        assert outside(spec, given_space, shape, budget) == []


def test_a_study_in_storage_goes_on_with_the_same_parameters(tmp_path: Path) -> None:
    """Optuna refuses a parameter whose choices changed: a resumed study meets the very same ranges."""
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    for part in range(2):
        study = optuna.create_study(
            storage=storage, study_name="resumed", sampler=TPESampler(seed=part), load_if_exists=True
        )
        for _ in range(6):
            trial = study.ask()
            spec = suggest(trial, BOTH_HEADS, ROBERTA_BASE, MILLION)
            study.tell(trial, spec.learning_rate)
    for frozen in optuna.load_study(storage=storage, study_name="resumed").trials:
        again = suggest(optuna.trial.FixedTrial(frozen.params), BOTH_HEADS, ROBERTA_BASE, MILLION)
        canonical = optuna.trial.FixedTrial(parameters_of(again, BOTH_HEADS, ROBERTA_BASE, MILLION))
        assert suggest(canonical, BOTH_HEADS, ROBERTA_BASE, MILLION) == again


@given(st.integers(1, 2_000), st.integers(1, 2_000))
def test_each_rank_has_an_equal_part_of_the_shares(rank: int, highest: int) -> None:
    rank = min(rank, highest)
    assert rank_of(rank / highest, highest) == rank
    assert rank_of((rank - 0.5) / highest, highest) == rank
    assert (rank_of(0.0, highest), rank_of(1.0, highest)) == (1, highest)
    assert rank_of(1 + 1 / highest, highest) == highest + 1


INSIDE = TrialSpec("qv", rank=8, alpha=16.0, dropout=0.1, learning_rate=1e-4)


@pytest.mark.parametrize(
    ("spec", "reasons"),
    [
        (INSIDE, []),
        (TrialSpec("ffn", 4, 8.0, 0.1, 1e-4), ["targets ffn is not among qk, qv"]),
        (TrialSpec("qv", 8, 16.0, 0.1, 1e-4, "out_proj"), ["head out_proj is not among full"]),
        (TrialSpec("qv", 12, 24.0, 0.1, 1e-4), ["rank 12 is above 11, the largest that fits the budget 1,000,000"]),
        (TrialSpec("qv", 8, 12.0, 0.1, 1e-4), ["alpha / rank 1.5 is not among 1, 2, 4, 8"]),
        (TrialSpec("qv", 8, 16.0, 0.3, 1e-4), ["dropout 0.3 is not within 0 to 0.2"]),
        (
            TrialSpec("qv", 16, 16.0, 0.1, 2e-5),
            [
                "rank 16 is above 11, the largest that fits the budget 1,000,000",
                "learning_rate 2e-05 is not within 5e-05 to 0.001",
            ],
        ),
    ],
)
def test_what_lies_outside_is_named(spec: TrialSpec, reasons: list[str]) -> None:
    narrow = space(targets=("qk", "qv"))
    assert outside(spec, narrow, ROBERTA_BASE, MILLION) == reasons
    if reasons:
        with pytest.raises(ValueError, match="lies outside the space"):
            parameters_of(spec, narrow, ROBERTA_BASE, MILLION)


@settings(max_examples=50)
@given(
    st.builds(
        ModelShape,
        st.sampled_from(["roberta", "bert"]),
        st.integers(1, 1024),
        st.integers(1, 24),
        st.integers(1, 4096),
        st.integers(2, 20),
    ),
    st.integers(1, 5_000_000),
)
def test_no_shape_and_budget_lead_beyond_the_budget(shape: ModelShape, budget: int) -> None:
    study = new_study()
    for _ in range(5):
        try:
            spec = suggest(study.ask(), BOTH_HEADS, shape, budget)
        except BudgetError:
            return
        assert trainable_parameters(spec, shape) <= budget
