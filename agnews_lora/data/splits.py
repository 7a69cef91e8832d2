"""Labelled rows, and how they are divided: by class, by seed, and by nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")


@dataclass(frozen=True)
class Rows:
    """Texts and their labels (indices into `LABELS`), in order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts and {len(self.labels)} labels: every text needs one label")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, ids: Sequence[int]) -> "Rows":
        """The rows of these ids, in the order of the ids."""
        return Rows(tuple(self.texts[row] for row in ids), tuple(self.labels[row] for row in ids))

    def digest(self) -> str:
        """SHA-256 (hex) over every row in order; each text goes in behind its length, so that no two lists collide."""
        sha = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            encoded = text.encode()
            sha.update(f"{label} {len(encoded)}\n".encode())
            sha.update(encoded)
        return sha.hexdigest()


def stratified_subset(labels: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """Ids of `num_rows` rows, ascending, in which every class keeps its share; all ids where there are no more rows.

    The shares are made whole by largest remainder (ties: the lower label). Which rows of a class are taken depends on
    `seed` alone.

    Raises:
        ValueError: `num_rows` below 0.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows must be at least 0, but got {num_rows}")
    if num_rows >= len(labels):
        return list(range(len(labels)))
    row_labels = np.asarray(labels)
    classes, counts = np.unique(row_labels, return_counts=True)
    random = np.random.Generator(np.random.PCG64(seed))
    taken = [
        random.permutation(np.flatnonzero(row_labels == label))[:quota]
        for label, quota in zip(classes, _quotas(counts.tolist(), num_rows), strict=True)
    ]
    return sorted(int(row) for part in taken for row in part)


def stratified_split(labels: Sequence[int], num_validation: int, seed: int) -> tuple[list[int], list[int]]:
    """(training ids, validation ids), both ascending and together all rows; see `stratified_subset` for the shares."""
    validation = stratified_subset(labels, num_validation, seed)
    held_out = set(validation)
    return [row for row in range(len(labels)) if row not in held_out], validation


def _quotas(counts: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to `counts`, in whole numbers by largest remainder; no quota exceeds its count."""
    size = sum(counts)
    quotas = [count * total // size for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda index: (-(counts[index] * total % size), index))
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    return quotas
