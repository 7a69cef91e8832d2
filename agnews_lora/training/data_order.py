"""The one definition of data order, used by every engine.

Rows are shuffled by (seed, epoch), cut into chunks of many batches, sorted by length inside a chunk and cut into
batches of like length, and the batches are shuffled again: little padding, every row once an epoch, and an order that
depends on its arguments alone (Khomenko et al. 2016 call it bucketing).
"""

from collections.abc import Sequence

import numpy as np

CHUNK_BATCHES = 50  # batches sorted together: enough for like lengths, few enough to stay random

# Widths of padded batches, in tokens. oneDNN compiles for every shape it meets and keeps what it compiled: with a width
# of its own for every length, a sweep on a CPU takes longer and 2 GB more.
WIDTH_STEP = 8


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """List the row ids of every batch of one epoch, in training order.

    Every row occurs exactly once; all batches but one have `batch_size` rows, and the remaining one may stand anywhere.
    A position in the data is (epoch, index in this list).

    Args:
        lengths: tokens of each row.
        batch_size: rows.
        seed: of the trial.
        epoch: from 0.

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but got {batch_size}")
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    rows = random.permutation(len(lengths))
    row_lengths = np.asarray(lengths)
    chunk = batch_size * CHUNK_BATCHES
    ordered = np.concatenate(
        [part[np.argsort(row_lengths[part], kind="stable")] for part in np.split(rows, range(chunk, len(rows), chunk))]
    )
    cut = [ordered[start : start + batch_size].tolist() for start in range(0, len(ordered), batch_size)]
    return [cut[index] for index in random.permutation(len(cut))]
