"""The race: how sure a difference is, who goes on after each round, and who wins."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search.racing import Confirmed, Selection, choose, difference, race
from agnews_lora.search.trials import TrialSummary
from tests.reporting.results import summary

SPEC = TrialSpec("qv", 2, 4.0, 0.1, 1e-3)
NUM_ROWS = 1_000


def run(number: int, accuracy: float | None, seed: int = 1, easy: int = 0, **changes: object) -> TrialSummary:
    """A run that answers the given share of rows correctly; easy: the first of them."""
    row = summary(number, SPEC, "COMPLETE" if accuracy is not None else "FAIL", accuracy)
    name = row.trial if seed == 1 else f"{row.trial}-s{seed}"
    right = np.roll(np.arange(NUM_ROWS) < round(NUM_ROWS * (accuracy or 0)), easy)
    return replace(row, **{"trial": name, "loss": 0.5, "right": right, "baseline": False, **changes})  # type: ignore[arg-type]


def candidate(number: int, *accuracies: float | None, easy: int = 0, **changes: object) -> Confirmed:
    own, *repeats = (run(number, each, seed, easy, **changes) for seed, each in enumerate(accuracies, 1))
    return Confirmed(own, tuple(repeats))


def wanted(candidates: Sequence[Confirmed], num_seeds: int) -> list[str]:
    return [f"{row.number}-s{number}" for row, number in race(candidates, num_seeds, "accuracy").wanted]


# Differences ---------------------------------------------------------------------------------------------------------


def test_a_difference_counts_rows_and_seeds_and_leaves_out_the_run_that_chose() -> None:
    one, other = candidate(1, 0.99, 0.91, 0.93), candidate(2, 0.90, 0.90, 0.89)
    found = difference(one, other, [one, other], "accuracy")
    gaps = np.mean([row.right for row in one.repeats], axis=0) - np.mean([row.right for row in other.repeats], axis=0)
    seeds = (2 * stdev([0.99, 0.91, 0.93]) ** 2 + 2 * stdev([0.90, 0.90, 0.89]) ** 2) / 4
    rows = gaps.var(ddof=1) / NUM_ROWS
    assert found is not None and found.standard_error == pytest.approx(math.sqrt(rows + seeds))
    freedom = (rows + seeds) ** 2 / (rows**2 / (NUM_ROWS - 1) + seeds**2 / 4)
    expected = stats.t(freedom).cdf((0.92 - 0.895) / found.standard_error)
    assert found.probability == pytest.approx(expected)
    back = difference(other, one, [one, other], "accuracy")
    assert back is not None and back.probability == pytest.approx(1 - expected)


def test_the_baselines_own_run_counts() -> None:
    baseline, other = candidate(0, 0.9, baseline=True), candidate(1, 0.9, 0.91)
    assert [row.trial for row in baseline.fresh_runs] == ["t0000"]
    assert [row.trial for row in candidate(0, 0.9, 0.8, baseline=True).fresh_runs] == ["t0000", "t0000-s2"]
    assert [row.trial for row in other.fresh_runs] == ["t0001-s2"]


def test_what_is_not_known_gives_no_probability() -> None:
    one, other = candidate(1, 0.9, 0.91), candidate(2, 0.9, 0.9)
    assert difference(one, other, [], "accuracy") is None
    assert difference(one, candidate(2, 0.9, 0.9, right=None), [one], "accuracy") is None


def test_among_equals_no_probability_is_likelier_than_it_says() -> None:
    """Over simulated pairs of equals, P < 0.05 comes up at most that often: the test errs towards caution."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(300):
        hard = random.beta(4, 0.5, NUM_ROWS)

        def simulated(number: int, hard: np.ndarray = hard) -> Confirmed:
            rows = np.clip(hard + random.normal(0, 0.1, NUM_ROWS), 0, 1)  # how the configuration answers each
            answers = [random.random(NUM_ROWS) < np.clip(rows + random.normal(0, 0.004), 0, 1) for _ in range(3)]
            runs = [replace(run(number, a.mean(), seed), right=a) for seed, a in enumerate(answers, 1)]
            return Confirmed(runs[0], tuple(runs[1:]))

        pair = [simulated(1), simulated(2)]
        apart = difference(*pair, pair, "accuracy")
        assert apart is not None
        found.append(apart.probability)
    assert 0 < np.mean(np.array(found) < 0.05) < 0.08
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


# Rounds --------------------------------------------------------------------------------------------------------------


def test_the_better_half_goes_on_two_at_least_once_all_have_ended() -> None:
    close = [candidate(number, 0.9 - number / 1e4) for number in range(5)]
    assert wanted(close, 4) == [f"{number}-s2" for number in range(5)]
    second = [0.899, 0.900, 0.898, 0.901, 0.897]
    some = [candidate(n, each.own.accuracy, second[n], easy=40 * n) if n < 4 else each for n, each in enumerate(close)]
    assert wanted(some, 4) == wanted(close, 4)
    ended = [candidate(n, each.own.accuracy, second[n], easy=40 * n) for n, each in enumerate(close)]
    assert wanted(ended, 4)[5:] == ["3-s3", "1-s3", "0-s3"]
    assert wanted(ended[::-1], 4)[5:] == ["3-s3", "1-s3", "0-s3"], "whatever the order"
    third = [candidate(n, 0.9, second[n], 0.9 + n / 1e4, easy=40 * n) for n in (0, 1, 3)] + [ended[2], ended[4]]
    assert wanted(third, 4)[8:] == ["3-s4", "1-s4"]


def test_a_race_ends_once_the_best_is_separated_and_not_without_a_second() -> None:
    apart = [candidate(1, 0.95, 0.951), candidate(2, 0.90, 0.901), candidate(3, 0.90, 0.90)]
    assert wanted(apart, 9) == ["1-s2", "2-s2", "3-s2"]
    assert wanted(apart[:1], 3) == ["1-s2", "1-s3"]


def test_a_later_run_does_not_change_an_earlier_round() -> None:
    before = [candidate(1, 0.9, 0.9), candidate(2, 0.9, 0.899), candidate(3, 0.9, 0.898)]
    after = [*before[:2], candidate(3, 0.9, 0.898, 0.99)]
    assert wanted(after, 3)[3:] == wanted(before, 3)[3:] == ["1-s3", "2-s3"]


def test_one_that_failed_comes_last() -> None:
    raced = race([candidate(1, 0.9, None), candidate(2, 0.8, 0.8), candidate(3, 0.7, 0.7)], 3, "accuracy")
    assert [each.own.number for each in raced.finalists] == [2, 3]
    assert [each.own.number for each in raced.eliminated] == [1]


# The choice ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_mean_spread_and_drop_count_the_trial_itself(accuracies: list[float]) -> None:
    row = candidate(1, *accuracies)
    assert row.mean("accuracy") == pytest.approx(mean(accuracies))
    assert row.std("accuracy") == pytest.approx(stdev(accuracies))
    assert row.drop("accuracy") == pytest.approx(accuracies[0] - mean(accuracies))


def test_one_run_alone_has_no_spread() -> None:
    row = candidate(1, 0.5, None)
    assert row.std("accuracy") is None and row.mean("accuracy") == 0.5 and row.num_failed == 1


CLOSE = (
    candidate(0, 0.80, baseline=True),
    candidate(1, 0.902, 0.901, 0.900, easy=0, trainable_parameters=90_000),
    candidate(2, 0.901, 0.900, 0.900, easy=9, trainable_parameters=30_000),
    candidate(3, 0.900, 0.899, easy=5, trainable_parameters=10_000),
    candidate(4, 0.700),
)


def chosen(rows: Sequence[Confirmed], prefer: str, trials: int = 3) -> tuple[list[int], Selection | None]:
    rows = sorted(rows, key=lambda each: -(each.own.accuracy or 0))
    settings = {"trials": trials, "seeds": 3, "prefer": prefer}
    found, selection = choose({each.own.trial: each for each in rows}, "accuracy", settings)
    return [each.own.number for each in found], selection


def test_of_finalists_that_nothing_separates_the_smallest_wins_or_the_best_mean() -> None:
    order, best = chosen(CLOSE, "best")
    assert order == [1, 2, 3] and best is not None
    order, smallest = chosen(CLOSE, "smallest")
    assert order == [2, 1, 3] and smallest is not None
    for found in (best, smallest):
        assert (found.best_mean, found.indistinguishable) == ("t0001", ("t0001", "t0002"))
        assert (found.probability_better_than_baseline or 0) > 0.999
    assert best.probability_better_than_runner_up == pytest.approx(
        1 - (smallest.probability_better_than_runner_up or 0)
    )
    assert 0.3 < (smallest.probability_better_than_runner_up or 0) < 0.5


def test_one_that_is_clearly_better_wins_whatever_its_size() -> None:
    far = [*CLOSE[:1], candidate(1, 0.95, 0.95, 0.95, trainable_parameters=90_000), *CLOSE[2:]]
    order, found = chosen(far, "smallest")
    assert order[0] == 1 and found is not None and found.indistinguishable == ("t0001",)


def test_a_winner_that_is_the_baseline_is_compared_with_the_runner_up_alone() -> None:
    rows = [candidate(0, 0.95, 0.95, 0.95, baseline=True), *CLOSE[1:]]
    order, found = chosen(rows, "smallest")
    assert order[0] == 0 and found is not None and found.probability_better_than_baseline is None
    assert (found.probability_better_than_runner_up or 0) > 0.95


def test_the_answers_of_an_earlier_release_are_not_known_and_the_best_mean_wins() -> None:
    rows = [Confirmed(replace(each.own, right=None), each.repeats) for each in CLOSE[1:3]]
    order, found = chosen([*rows, *CLOSE[3:]], "smallest")
    unknown = [Confirmed(row.own, tuple(replace(run, right=None) for run in row.repeats)) for row in rows]
    assert order == [2, 1, 3], "the search's own runs are not compared"
    order, found = chosen([*unknown, *CLOSE[3:]], "smallest")
    assert order == [1, 2, 3] and found is not None and found.probability_better_than_runner_up is None


def test_without_a_confirmation_nothing_is_chosen() -> None:
    found = {each.own.trial: replace(each, repeats=()) for each in CLOSE}
    assert choose(found, "accuracy", None) == choose(found, "accuracy", {"trials": 3, "seeds": 3}) == ((), None)
