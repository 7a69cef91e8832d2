"""Labelled rows, divided by class and by seed alone, and the rule that their texts keep."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from agnews_lora.data.cleaning import clean

MAX_CHARACTERS: Final = 100_000  # of a text: a book's chapter; what is longer is a file that was read as one text
CLEANING: Final = {"ag_news": clean}  # `clean:` of the data: a rule by its name; without one, texts stay as they are
# Unicode's default ignorable characters and blanks that `str.isprintable` takes for letters, marks or symbols.
_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """Texts and their labels (indices into the data's label names), in order."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

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


def stratified_subset(labels: Sequence[int], num_rows: int, seed: int, keep: int = 0) -> list[int]:
    """Ids of `num_rows` rows, ascending, in which every class keeps its share; all ids where there are no more rows.

    The shares are made whole by largest remainder (ties: the lower label). A rare class gives one row at least, at the
    cost of the largest ones, where there are as many rows as classes. Which rows of a class are taken depends on `seed`
    alone.

    Args:
        keep: rows of every class that are not taken.
    """
    if num_rows >= len(labels) and not keep:
        return list(range(len(labels)))
    if not labels:
        return []
    row_labels = np.asarray(labels)
    classes, counts = np.unique(row_labels, return_counts=True)
    quotas, remainders = np.divmod(counts * num_rows, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: num_rows - quotas.sum()]] += 1
    least, most = (counts > keep).astype(int), np.maximum(counts - keep, 0)
    if least.sum() <= num_rows:
        quotas = np.clip(quotas, least, most)
        while quotas.sum() > num_rows:
            quotas[np.argmax(quotas - least)] -= 1
        while quotas.sum() < min(num_rows, most.sum()):
            quotas[np.argmax(most - quotas)] += 1
    random = np.random.Generator(np.random.PCG64(seed))
    taken = [
        random.permutation(np.flatnonzero(row_labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return sorted(np.concatenate(taken).tolist())


def stratified_split(
    labels: Sequence[int], num_validation: int, seed: int, keep: int = 0
) -> tuple[list[int], list[int]]:
    """(training ids, validation ids), both ascending and together all rows; see `stratified_subset` for the shares."""
    validation = stratified_subset(labels, num_validation, seed, keep)
    held_out = set(validation)
    return [row for row in range(len(labels)) if row not in held_out], validation


class TextFault(ValueError):
    """A text cannot be used; the message says why, as what is said of the text ("has nothing visible in it")."""


def usable_text(text: str, cleaning: str | None) -> str:
    """The text that is tokenised. Training, `predict` and `serve` share this rule.

    Args:
        cleaning: a name in `CLEANING`, or None.

    Raises:
        TextFault: over `MAX_CHARACTERS`, half a surrogate pair, or nothing left after cleaning but spaces, control
            characters and other invisible ones.
    """
    if len(text) > MAX_CHARACTERS:
        raise TextFault(f"has {len(text):,} characters, over the most that a text may have, {MAX_CHARACTERS:,}")
    if _SURROGATE.search(text):
        raise TextFault("is not Unicode: it has half a surrogate pair")
    cleaned = CLEANING[cleaning](text) if cleaning else text
    if not any(character.isprintable() and not character.isspace() for character in _INVISIBLE.sub("", cleaned)):
        raise TextFault(f"has nothing visible in it{' after cleaning' if cleaning else ''}")
    return cleaned
