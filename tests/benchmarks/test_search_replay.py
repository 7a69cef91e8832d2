"""The replay of searches: which training stands for a configuration, and what a replayed study counts."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import RandomSampler

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.search.pruner import McNemarPruner
from benchmarks.pruning import accuracy, below, interval, rules, seed_noise
from benchmarks.search_replay import Outcome, Rows, replay
from benchmarks.search_table import BASELINE, Table, Training, configuration

SHAPE = shape_of("embedded:minilm")
STEPS = (20, 40, 60, 80)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """The baseline and 24 draws, whose curves rise to a level that the learning rate decides."""
    trainings = []
    for number in range(25):
        spec = configuration(number, SHAPE)
        level = 0.5 + 30 * min(spec.learning_rate, 0.01)
        for run in (0, 1):
            scores = {step: 0.25 + (level - 0.25) * step / 80 - 0.01 * run for step in STEPS}
            right = {step: np.arange(200) < round(200 * score) for step, score in scores.items()}
            losses = [1 - score for score in scores.values()]
            trainings.append(Training(number, run, spec, losses, losses, right, right[80]))
    about = {"monitor": list(range(200)), "training": {"warmup": 0.1, "log_every": 20}}
    return Rows(Table(about, trainings), SHAPE)


def study(rows: Rows, pruner: BasePruner, num_slots: int, backwards: bool = False) -> Outcome:
    return replay(rows, RandomSampler(seed=1), lambda trained: pruner, 14, num_slots, 1, backwards)


def test_every_configuration_stands_for_itself_and_for_what_is_close_to_it(rows: Rows) -> None:
    for training in rows.table.trainings:
        assert rows.nearest(training.spec, training.run) is training
        assert (other := rows.other(training)).number == training.number and other.run != training.run
        if training.spec != BASELINE:
            close = replace(training.spec, learning_rate=training.spec.learning_rate * 1.0001)
            assert rows.nearest(close, training.run) is training


@pytest.mark.parametrize("num_slots", [1, 4])
def test_without_pruning_every_step_is_trained(rows: Rows, num_slots: int) -> None:
    outcome = study(rows, NopPruner(), num_slots)
    assert (outcome.saved, outcome.pruned) == (0.0, frozenset())
    assert outcome.worth <= max(training.test.mean() for training in rows.table.trainings)


@pytest.mark.parametrize("num_slots", [1, 4])
def test_pruned_trials_save_their_steps(rows: Rows, num_slots: int) -> None:
    outcome = study(rows, McNemarPruner(1.5, rows.table.total_steps), num_slots)
    assert 0 not in outcome.pruned
    assert len(outcome.pruned) / 4 / 14 <= outcome.saved <= 3 * len(outcome.pruned) / 4 / 14
    assert outcome.saved > 0.05
    assert outcome == study(rows, McNemarPruner(1.5, rows.table.total_steps), num_slots, backwards=True)


def test_known_configurations_are_pruned_only_where_they_are_judged(rows: Rows) -> None:
    def known(judge_known: bool) -> Outcome:
        pruner, sampler = McNemarPruner(0.1, rows.table.total_steps), RandomSampler(seed=1)
        return replay(rows, sampler, lambda trained: pruner, 8, 1, 1, num_known=3, judge_known=judge_known)

    assert not known(judge_known=False).pruned & {0, 1, 2, 3}
    assert known(judge_known=True).pruned & {1, 2, 3}
    assert known(judge_known=True).lost >= known(judge_known=False).lost >= 0


def test_a_training_that_diverged_fails_and_saves_nothing_that_it_trained(rows: Rows) -> None:
    first, second, *others = rows.table.trainings
    wild = [
        replace(each, right={20: each.right[20]}, eval_losses=each.eval_losses[:1], test=np.zeros(0, dtype=bool))
        for each in others
    ]
    outcome = study(replace(rows, table=replace(rows.table, trainings=[first, second, *wild])), NopPruner(), 4)
    assert outcome.worth in (first.test.mean(), second.test.mean())
    assert outcome.saved == pytest.approx(13 * 0.5 / 14)  # they end at step 40 of 80


def test_a_rule_of_the_table_judges_as_its_numbers_say(rows: Rows) -> None:
    low, *others = sorted((each for each in rows.table.trainings if each.run == 0), key=lambda each: accuracy(each, 0))
    assert below(0.5, accuracy)(low, others, 0) and not below(0.5, accuracy)(others[-1], [low], 0)
    assert not below(0.5, accuracy, guard=100)(low, others, 0)
    assert len(rules(rows.table)) > 10


def test_the_noise_between_seeds_is_mcnemars_statistic(rows: Rows) -> None:
    # Of 200 rows the second seed misses two more: (2 - 0) / sqrt(2 + 0). Levels are rounded to rows.
    assert list(seed_noise(rows.table)) == list(STEPS)
    assert all(size == pytest.approx(2**0.5, rel=0.1) for size in seed_noise(rows.table).values())


def test_interval() -> None:
    # Student's t with three degrees of freedom: 3.182; standard error of the mean 0.01 * sqrt(5 / 3) / 2.
    assert interval(np.array([0.01, 0.02, 0.03, 0.04])) == "+2.50 ± 2.05"
    assert interval(np.zeros(5)) == "+0.00 ± 0.00"
