import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.training.data_order import CHUNK_BATCHES, batches

lengths = st.lists(st.integers(1, 200), max_size=400)


@given(lengths, st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 5))
def test_every_row_once_an_epoch_in_an_order_of_the_arguments(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    cut = batches(lengths, batch_size, seed, epoch)
    assert sorted(row for batch in cut for row in batch) == list(range(len(lengths)))
    assert sum(len(batch) != batch_size for batch in cut) <= 1
    assert all(0 < len(batch) <= batch_size for batch in cut)
    assert cut == batches(list(lengths), batch_size, seed, epoch)


def test_seeds_and_epochs_give_other_orders() -> None:
    lengths = [5 + row % 60 for row in range(500)]
    orders = {str(batches(lengths, 16, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_batches_are_of_like_length() -> None:
    lengths = [20 + (row * 37) % 80 for row in range(16 * CHUNK_BATCHES)]
    spread = [
        max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches(lengths, 16, 1, 0)
    ]
    assert max(spread) <= 4  # 800 rows over 80 lengths, sorted: a batch of 16 spans two lengths or three


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        batches([3, 4], 0, 1, 0)
