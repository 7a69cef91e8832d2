"""What live sweeps and recipes are compared with: figures of the committed tables."""

import numpy as np
import pytest

from benchmarks.recipes import BEST, chosen
from benchmarks.search_live import best_of, random_search
from benchmarks.search_table import RESULTS, SEEDS, Table, read_table


@pytest.fixture(scope="module", params=["ag_news", "newswire"])
def table(request: pytest.FixtureRequest) -> Table:
    return read_table(RESULTS / f"search-table-{request.param}.jsonl")


def test_a_configuration_is_chosen_by_one_run_and_trained_again_as_the_other(table: Table) -> None:
    data = table.about["data"]
    pairs = chosen(data)
    assert len(pairs) == len(set(pairs)) == SEEDS * BEST[data]
    accuracies = {(each.number, each.run): each.test_accuracy for each in table.trainings}
    for run in range(SEEDS):
        own = {number: accuracies[number, 1 - run] for number, of in pairs if of == run}
        others = [accuracy for (number, of), accuracy in accuracies.items() if of != run and number not in own]
        assert min(own.values()) >= max(others)


def test_a_random_search_finds_more_the_longer_it_is_and_no_more_than_there_is(table: Table) -> None:
    few, many = (random_search(table, num_trials) for num_trials in (2, 20))
    known = {each.test_accuracy for each in table.trainings}
    assert {*few, *many} <= known
    assert few.mean() < many.mean()
    _, worth, unlucky = best_of(table)
    assert unlucky <= worth <= max(known)
    assert np.array_equal(few, random_search(table, 2)), "it has a seed"
