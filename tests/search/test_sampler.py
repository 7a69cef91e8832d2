"""The sampler: what it proposes depends on seed, number and the study's trials alone, and it learns from them."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import MedianPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.search.sampler import TrialSeededTPE, derived_seed
from agnews_lora.search.space import distributions, shared, suggest
from agnews_lora.search.study import BASELINE, enqueue_baseline, open_storage, open_study
from tests.search.scripted import BOTH_HEADS, BUDGET, OUTSIDE, SHAPE, SPACE, STARTUP_TRIALS, accuracy

SPACES = {"one head": SPACE, "both heads": BOTH_HEADS}
NUM_TRIALS = 25


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def sampler(space: Space = SPACE, seed: int = 3, startup: int = STARTUP_TRIALS) -> TrialSeededTPE:
    return TrialSeededTPE(seed, startup, distributions(space, SHAPE, BUDGET), shared(space, SHAPE, BUDGET))


def in_memory(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler)


def opened(root: Path, space: Space) -> optuna.Study:
    """The study as another process finds it."""
    pruner = MedianPruner(n_startup_trials=4)
    study = open_study(open_storage(root), "sampled", {}, sampler(space), pruner, new=False)
    enqueue_baseline(study, OUTSIDE, space, SHAPE, BUDGET)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return study


def configuration(trial: optuna.Trial, space: Space) -> TrialSpec:
    return OUTSIDE if trial.user_attrs.get(BASELINE) else suggest(trial, space, SHAPE, BUDGET)


def train(study: optuna.Study, trial: optuna.Trial, space: Space) -> None:
    spec = configuration(trial, space)
    for step in (10, 20, 30):
        trial.report(accuracy(spec, step), step)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return
    study.tell(trial, accuracy(spec, 30))


def train_until(num_ended: int, root: Path, space: Space) -> list[FrozenTrial]:
    study = opened(root, space)
    while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < num_ended:
        train(study, study.ask(), space)
    return study.trials


def what_counts(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.state, trial.params, trial.value, trial.intermediate_values) for trial in trials]


@pytest.fixture(scope="module", params=SPACES)
def in_one_go(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Space, Any]:
    space = SPACES[request.param]
    trials = train_until(NUM_TRIALS, tmp_path_factory.mktemp("stores"), space)
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) >= 5
    assert states.count(TrialState.PRUNED) >= 4
    return space, what_counts(trials)


# The same configurations, whatever happens to the process -----------------------------------------------------


def stopped_after_ask(study: optuna.Study, space: Space) -> None:
    trial = study.ask()
    spec = configuration(trial, space)
    trial.report(accuracy(spec, 10), 10)


def killed_before_it_asked_for_anything(study: optuna.Study, space: Space) -> None:
    study.ask()


def killed_between_two_parameters(study: optuna.Study, space: Space) -> None:
    trial = study.ask()
    trial.suggest_categorical("targets", space.targets)
    if len(space.heads) > 1:
        trial.suggest_categorical("head", space.heads)


INTERRUPTIONS: dict[int, Callable[[optuna.Study, Space], None] | None] = {
    2: killed_between_two_parameters,  # while it starts
    3: stopped_after_ask,
    7: None,
    9: killed_between_two_parameters,  # when TPE has something to learn from
    11: killed_before_it_asked_for_anything,
    13: None,
    17: stopped_after_ask,
}


def test_a_study_that_is_interrupted_again_and_again_asks_the_same(
    in_one_go: tuple[Space, Any], tmp_path: Path
) -> None:
    space, expected = in_one_go
    for num_ended, interrupt in INTERRUPTIONS.items():
        train_until(num_ended, tmp_path, space)
        if interrupt is None:
            continue
        before = opened(tmp_path, space)
        interrupt(before, space)
        running = before.trials[-1]
        assert (running.number, running.state) == (num_ended, TrialState.RUNNING)
        study = opened(tmp_path, space)
        trial = study.ask()
        again = study.trials[-1]
        assert (again.number, again.state) == (num_ended, TrialState.RUNNING)
        assert (again.params, again.intermediate_values) == (running.params, running.intermediate_values)
        train(study, trial, space)
    assert what_counts(train_until(NUM_TRIALS, tmp_path, space)) == expected


def test_trials_that_are_asked_at_once_do_not_touch_each_other() -> None:
    specs = []
    for order in ([0, 1, 2], [2, 0, 1]):
        study = in_memory(sampler())
        trials = [study.ask() for _ in range(3)]
        asked = {number: suggest(trials[number], SPACE, SHAPE, BUDGET) for number in order}
        specs.append([asked[number] for number in range(3)])
    assert specs[0] == specs[1]
    assert len(set(specs[0])) == 3


def test_another_seed_asks_something_else() -> None:
    first = [suggest(in_memory(sampler(seed=seed)).ask(), SPACE, SHAPE, BUDGET) for seed in (0, 1, 2, 0)]
    assert len(set(first)) == 3
    assert first[0] == first[3]


def test_seeds_derived_for_trials_and_parameters_differ_and_have_31_bits() -> None:
    seeds = {
        derived_seed(seed, number, name)
        for seed in range(10)
        for number in range(100)
        for name in ("", "rank_share", "head", "dropout")
    }
    assert len(seeds) == 10 * 100 * 4
    assert min(seeds) >= 0
    assert 2**30 < max(seeds) < 2**31
    assert derived_seed(7, 3) == derived_seed(7, 3)


# A Sobol sequence, then TPE ---------------------------------------------------------------------------------------


def test_what_the_start_up_trials_scored_does_not_matter_to_them_but_does_afterwards() -> None:
    specs: list[list[TrialSpec]] = []
    for sign in (1, -1):
        study = in_memory(sampler())
        specs.append([])
        for _ in range(STARTUP_TRIALS + 8):
            trial = study.ask()
            spec = suggest(trial, SPACE, SHAPE, BUDGET)
            specs[-1].append(spec)
            study.tell(trial, sign * accuracy(spec, 30))
    assert specs[0][:STARTUP_TRIALS] == specs[1][:STARTUP_TRIALS]
    assert all(specs[0][number] != specs[1][number] for number in range(STARTUP_TRIALS, STARTUP_TRIALS + 8))


def start(space: Space, sampler: BaseSampler, num_trials: int) -> list[dict[str, Any]]:
    """The parameters of the first trials, none of which has ended."""
    study = in_memory(sampler)
    for _ in range(num_trials):
        suggest(study.ask(), space, SHAPE, BUDGET)
    return [trial.params for trial in study.trials]


def test_start_up_trials_cover_the_space_more_evenly_than_independent_draws() -> None:
    """From every trial on: others come before them, such as the baseline."""

    def discrepancy(params: list[dict[str, Any]], first: int) -> float:
        points = [
            (one["rank_share"], one["dropout"] / 0.2, (math.log10(one["learning_rate"]) + 4) / 2)
            for one in params[first : first + 12]
        ]
        return float(qmc.discrepancy(points))

    seeds = range(12)
    ours = [start(SPACE, sampler(seed=seed, startup=99), 20) for seed in seeds]
    random = [start(SPACE, RandomSampler(seed=seed), 20) for seed in seeds]
    for first in range(8):
        even, independent = (np.mean([discrepancy(params, first) for params in of]) for of in (ours, random))
        assert even < 0.7 * independent


@pytest.mark.parametrize("name", SPACES)
def test_so_many_start_up_trials_meet_every_choice(name: str) -> None:
    """2^k points have one in each 2^k-th of a coordinate, which lies within a choice's part where 2^k >= 2 choices."""
    space = SPACES[name]
    for seed in range(12):
        params = start(space, sampler(space, seed, startup=99), 16)
        for block in (params[:8], params[8:]):
            for choice, given in distributions(space, SHAPE, BUDGET).items():
                if isinstance(given, CategoricalDistribution):
                    assert {one[choice] for one in block} == set(given.choices)


@pytest.mark.parametrize("name", SPACES)
def test_it_learns(name: str) -> None:
    space, num_trials, last = SPACES[name], 40, 15

    def late_mean(sampler: BaseSampler) -> float:
        study = in_memory(sampler)
        enqueue_baseline(study, OUTSIDE, space, SHAPE, BUDGET)
        study.optimize(lambda trial: accuracy(configuration(trial, space), 30), num_trials)
        return float(np.mean([trial.value for trial in study.trials[-last:]]))

    ours = [late_mean(sampler(space, seed)) for seed in range(5)]
    random = [late_mean(RandomSampler(seed=seed)) for seed in range(5)]
    assert min(ours) > max(random)


# The joint distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_baseline_without_parameters_does_not_take_the_joint_distribution_away(name: str) -> None:
    space = SPACES[name]
    study = in_memory(sampler(space))
    enqueue_baseline(study, OUTSIDE, space, SHAPE, BUDGET)
    joint, names = [], {"targets", "rank_share", "alpha_ratio", "dropout", "learning_rate"}
    names |= {"head"} if name == "both heads" else set()
    for _ in range(STARTUP_TRIALS + 4):
        trial = study.ask()
        joint.append(set(trial.relative_params))
        study.tell(trial, accuracy(configuration(trial, space), 30))
    assert study.trials[0].params == {}
    assert joint == [names] * (STARTUP_TRIALS + 4)


def test_parameters_of_a_single_value_do_not_disturb_the_others() -> None:
    given: dict[str, BaseDistribution] = {
        "width": FloatDistribution(0.1, 0.1),
        "choice": CategoricalDistribution(("only",)),
        "free": FloatDistribution(0.0, 1.0),
    }
    study = in_memory(TrialSeededTPE(0, STARTUP_TRIALS, given, given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # TPE warns of a division by zero where it is given a range without width
        for _ in range(30):
            trial = study.ask(given)
            assert (trial.params["width"], trial.params["choice"]) == (0.1, "only")
            assert set(trial.relative_params) <= {"free"}
            study.tell(trial, -abs(trial.params["free"] - 0.8))
    assert np.mean([abs(trial.params["free"] - 0.8) for trial in study.trials[-10:]]) < 0.15
