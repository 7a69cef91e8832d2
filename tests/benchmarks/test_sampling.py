"""The comparison of samplers: what the surrogate makes of a table, and what a study on it is scored by."""

import numpy as np
import pytest

from agnews_lora.adapters.spec import TrialSpec
from benchmarks.sampling import CONTESTANTS, SHAPE, SHIPPED, Surrogate, search
from benchmarks.search_table import BASELINE, Table, Training, configuration

STEPS, ROWS = 100, 2_000


def accuracy(spec: TrialSpec) -> float:
    """The best rate is 2e-3; beyond 5e-3 a training diverges."""
    return 0.9 - 0.1 * (np.log10(spec.learning_rate) + 2.7) ** 2 if spec.learning_rate < 5e-3 else 0.25


def training(number: int, run: int) -> Training:
    spec = configuration(number, SHAPE)
    right = np.arange(ROWS) < ROWS * (accuracy(spec) + 0.002 * run)
    diverged = accuracy(spec) < 0.5
    return Training(number, run, spec, [], [], {STEPS: right}, right[:0] if diverged else right)


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate(Table({}, [training(number, run) for number in range(49) for run in (0, 1)]))


def test_the_surrogate_knows_what_the_table_shows(surrogate: Surrogate) -> None:
    for spec in (configuration(number, SHAPE) for number in range(49)):
        assert surrogate.test(spec) == pytest.approx(max(accuracy(spec), 0.85), abs=0.005)
    assert max(surrogate.test.left_out) < 0.02
    assert surrogate.seed_noise == pytest.approx(0.002 / np.sqrt(2), rel=0.01)
    best, worth = surrogate.best(256)
    assert 1e-3 < best.learning_rate < 4e-3
    assert worth == surrogate.test(best) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("name", ["random", SHIPPED])
def test_a_study_is_worth_what_it_chose(surrogate: Surrogate, name: str) -> None:
    worth = [search(surrogate, CONTESTANTS[name], 12, seed) for seed in (1, 2, 1)]
    assert worth[0] == worth[2]
    assert surrogate.test(BASELINE) - 0.005 < min(worth) and max(worth) < 0.91
