from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.data.splits import Rows, stratified_split, stratified_subset

labels_lists = st.lists(st.integers(0, 3), max_size=200)
seeds = st.integers(0, 2**32)


@given(labels_lists, st.integers(0, 250), seeds)
def test_subset_keeps_each_class_within_one_row_of_its_share(labels, num_rows, seed):
    subset = stratified_subset(labels, num_rows, seed)
    assert len(subset) == min(num_rows, len(labels))
    assert subset == sorted(set(subset))
    counts, taken = Counter(labels), Counter(labels[row] for row in subset)
    for label, count in counts.items():
        assert abs(taken[label] - count * len(subset) / len(labels)) < 1


@given(labels_lists, st.integers(0, 250), seeds)
def test_split_parts_are_disjoint_and_whole(labels, num_validation, seed):
    train, validation = stratified_split(labels, num_validation, seed)
    assert len(validation) == min(num_validation, len(labels))
    assert sorted(train + validation) == list(range(len(labels)))
    assert train == sorted(train)


def test_the_seed_alone_decides():
    labels = [row % 4 for row in range(400)]
    assert stratified_split(labels, 40, seed=1) == stratified_split(labels, 40, seed=1)
    assert stratified_split(labels, 40, seed=1) != stratified_split(labels, 40, seed=2)


def test_the_split_of_a_seed_never_changes():
    # A study is resumed on the rows that it began with: this order is part of what is published.
    assert stratified_subset([0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3], 5, seed=7) == [0, 2, 3, 6, 8]


def test_remainders_go_to_the_largest_fractions():
    # Of 5 from 6 + 3 + 1: 3, 1.5 and 0.5, so the remaining row goes to the lower label of the tie.
    subset = stratified_subset([0] * 6 + [1] * 3 + [2], 5, seed=0)
    assert [sum(row in part for row in subset) for part in (range(6), range(6, 9), range(9, 10))] == [3, 2, 0]


def test_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="num_rows must be at least 0, but got -1"):
        stratified_subset([0, 1], -1, seed=0)


def test_rows_take_in_the_order_asked():
    rows = Rows(("a", "b", "c"), (0, 1, 2))
    assert rows.take([2, 0]) == Rows(("c", "a"), (2, 0))
    assert len(rows) == 3


def test_rows_need_a_label_each():
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        Rows(("a", "b"), (0,))


row_lists = st.lists(st.tuples(st.text(alphabet="ab\n 01", max_size=6), st.integers(0, 3)), max_size=5)


@given(row_lists, row_lists)
def test_digests_are_equal_exactly_where_rows_are(first, second):
    digests = [Rows(tuple(t for t, _ in rows), tuple(n for _, n in rows)).digest() for rows in (first, second)]
    assert (digests[0] == digests[1]) == (first == second)


def test_digest_tells_where_one_text_ends():
    assert Rows(("ab", "c"), (0, 0)).digest() != Rows(("a", "bc"), (0, 0)).digest()
    assert Rows(("a\n0 1\nb",), (0,)).digest() != Rows(("a", "b"), (0, 0)).digest()
