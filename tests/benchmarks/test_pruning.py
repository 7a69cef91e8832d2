"""The replay of the pruning benchmark: its table, the row that stands for a configuration, and what a study counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from optuna.pruners import NopPruner

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.config.sweep import load_sweep
from agnews_lora.search.pruner import PeerMedianPruner
from benchmarks.pruning import interval
from benchmarks.pruning_replay import TRIALS, PeerShare, replay_study
from benchmarks.pruning_table import Row, Table, draw, read_table, write_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> Table:
    """The baseline and 24 draws, whose curves rise to a level that the learning rate decides."""
    sweep = load_sweep(str(ROOT / "sweeps" / "embedded.yaml"))
    shape = shape_of(sweep.experiment.base)
    specs = [draw(sweep, shape, number) for number in range(25)]
    rows = []
    for number, spec in enumerate(specs):
        level = 0.5 + 30 * min(spec.learning_rate, 0.01)
        accuracies = {step: 0.25 + (level - 0.25) * step / 80 for step in (20, 40, 60, 80)}
        rows.append(Row(number, spec, accuracies, 1 - level))
    return Table(rows, sweep, shape)


def test_a_table_is_read_as_it_was_written(table: Table, tmp_path: Path) -> None:
    diverged = replace(table.rows[3], accuracies={20: 0.25}, loss=None)
    rows = [*table.rows[:3], diverged]
    write_table(tmp_path / "table.csv", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    for read, row in zip(read_table(tmp_path / "table.csv"), rows, strict=True):
        assert (read.number, read.spec) == (row.number, row.spec)
        assert read.accuracies == pytest.approx(row.accuracies, abs=1e-6)
        assert read.loss == (None if row.loss is None else pytest.approx(row.loss, abs=1e-6))
    assert read_table(tmp_path / "none.csv") == []


def test_every_row_stands_for_itself_and_for_what_is_close_to_it(table: Table) -> None:
    for row in table.rows:
        assert table.nearest(row.spec) is row
    for row in table.rows[1:]:
        close = replace(row.spec, learning_rate=row.spec.learning_rate * 1.0001)
        assert table.nearest(close) is row


def test_another_preset_stands_for_none_that_the_table_has(table: Table) -> None:
    qv = next(row for row in table.rows[1:] if row.spec.targets == "qv")
    nearest = table.nearest(replace(qv.spec, targets="ffn", rank=1))
    assert nearest.spec.targets == "ffn"
    only = replace(table, rows=[table.rows[0], qv])
    assert only.nearest(replace(qv.spec, targets="ffn", rank=1)) is qv


@pytest.mark.parametrize("num_slots", [1, 8])
def test_without_pruning_every_step_is_trained_and_the_best_that_was_asked_wins(table: Table, num_slots: int) -> None:
    outcome = replay_study(table, NopPruner(), TRIALS, num_slots, seed=1)
    assert (outcome.saved, outcome.pruned) == (0.0, frozenset())
    assert outcome.accuracy <= table.best
    assert outcome == replay_study(table, NopPruner(), TRIALS, 1, seed=1)  # random draws: the slots change nothing


@pytest.mark.parametrize("num_slots", [1, 8])
def test_pruned_trials_save_their_steps(table: Table, num_slots: int) -> None:
    outcome = replay_study(table, PeerMedianPruner(4, 20), TRIALS, num_slots, seed=1)
    assert 0 not in outcome.pruned
    assert len(outcome.pruned) / 4 / TRIALS <= outcome.saved <= 3 * len(outcome.pruned) / 4 / TRIALS
    assert outcome.saved > 0.1
    assert outcome == replay_study(table, PeerMedianPruner(4, 20), TRIALS, num_slots, seed=1, backwards=True)


def test_half_of_the_peers_is_the_median(table: Table) -> None:
    for num_slots in (1, 8):
        median = replay_study(table, PeerMedianPruner(4, 20), TRIALS, num_slots, seed=2)
        assert replay_study(table, PeerShare(0.5, 4, 20), TRIALS, num_slots, seed=2) == median


def test_a_trial_that_diverged_fails_and_saves_nothing_it_trained(table: Table) -> None:
    first, *others = table.rows
    wild = replace(table, rows=[first, *(replace(row, accuracies={20: 0.25}, loss=None) for row in others)])
    outcome = replay_study(wild, NopPruner(), TRIALS, 8, seed=1)
    assert outcome.accuracy == first.accuracies[80]
    assert outcome.saved == pytest.approx((TRIALS - 1) * 0.5 / TRIALS)  # they end at step 40 of 80


def test_interval() -> None:
    # Student's t with three degrees of freedom: 3.182; standard error of the mean 0.01 * sqrt(5 / 3) / 2.
    assert interval(np.array([0.01, 0.02, 0.03, 0.04])) == "+2.50 ± 2.05"
    assert interval(np.zeros(5)) == "+0.00 ± 0.00"
