"""What the rows of an experiment are like: classes, lengths, duplicates, rows that splits share, and what to watch.

A profile is JSON-ready: the command `data` prints it, and the result of a sweep keeps it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import DataError

MAX_SHARED: Final = 0.01  # share of the test rows that may be among the others
CUT: Final = 0.05  # share of rows that are cut, above which it is said
PERCENTILES: Final = {"median": 50, "p90": 90, "p99": 99, "max": 100}
TOTAL: Final = "(all)"

Profile = Mapping[str, Any]


def shared_rows(splits: Mapping[str, Rows]) -> dict[str, int]:
    """How many rows of a split have a text of an earlier one, by `<earlier>-<split>`; splits in order."""
    texts = {name: set(rows.texts) for name, rows in splits.items()}
    names = list(splits)
    return {
        f"{first}-{second}": sum(text in texts[first] for text in splits[second].texts)
        for place, second in enumerate(names)
        for first in names[:place]
    }


def require_apart(splits: Mapping[str, Rows], files: Sequence[str]) -> None:
    """Check that hardly any row to score on has been trained on.

    Args:
        splits: `train`, `validation` and `test`.
        files: those of validation and test that are no share of the training rows.

    Raises:
        DataError: over `MAX_SHARED` of the test rows, or of the validation rows of a file, are among the others.
    """
    for split in dict.fromkeys((*files, "test")):
        others = ("train", "validation") if split == "test" else ("train",)
        seen = {text for name in others for text in splits[name].texts}
        count, rows = sum(text in seen for text in splits[split].texts), len(splits[split])
        if count > MAX_SHARED * rows:
            raise DataError(
                f"Cannot score on the {split} split: {_of(count, rows)} have a text of {' or '.join(others)} as well, "
                f"over the {MAX_SHARED:.0%} that is accepted. Remove the repeated rows, name another file, or accept "
                "them with `allow_overlap: true`."
            )


def profile(
    splits: Mapping[str, Rows], labels: Sequence[str], tables: Mapping[str, TokenTable], max_length: int
) -> Profile:
    """Describe the rows.

    Args:
        splits: `train`, `validation` and `test`.
        tables: token tables of splits; lengths of the others are not told.
    """
    counts = {name: Counter(rows.labels) for name, rows in splits.items()}
    classes = {label: {name: counts[name][number] for name in splits} for number, label in enumerate(labels)}
    found: dict[str, Any] = {
        "rows": {name: len(rows) for name, rows in splits.items()},
        "classes": classes,
        "max_length": max_length,
        "tokens": {name: _lengths(table, max_length) for name, table in tables.items()},
        "duplicates": {name: len(rows) - len(set(rows.texts)) for name, rows in splits.items()},
        "conflicting": _conflicting(list(splits.values())),
        "shared": shared_rows(splits),
    }
    return found | {"warnings": _warnings(found)}


def profile_table(found: Profile, most: int) -> list[list[str]]:
    """Rows to show: a title, and a value for each split. most: classes that are shown, the largest ones."""
    names, classes = list(found["rows"]), sorted(found["classes"].items(), key=lambda each: -each[1]["train"])
    shown = [[label, *(f"{counts[name]:,}" for name in names)] for label, counts in classes[:most]]
    if len(classes) > most:
        shown.append([f"({len(classes) - most} other classes)", *("" for _ in names)])
    shown.append([TOTAL, *(f"{count:,}" for count in found["rows"].values())])
    shown.append(["repeated texts", *(f"{count:,}" for count in found["duplicates"].values())])
    for part in (*PERCENTILES, "cut"):
        lengths = [found["tokens"].get(name, {}).get(part) for name in names]
        title, form = (
            (f"over {found['max_length']} tokens, so cut", "{:.1%}") if part == "cut" else (f"tokens, {part}", "{:,}")
        )
        shown.append([title, *("–" if each is None else form.format(each) for each in lengths)])
    return shown


def profile_sentence(found: Profile) -> str:
    """What is said of all rows together."""
    shared = ", ".join(f"{count:,} of {pair.replace('-', ' and ')}" for pair, count in found["shared"].items())
    return (
        f"{sum(found['rows'].values()):,} rows of {len(found['classes'])} classes. Shared rows: {shared}. Rows whose "
        f"text stands with another label as well: {found['conflicting']:,}."
    )


def _lengths(table: TokenTable, max_length: int) -> dict[str, float]:
    """Percentiles of the tokens of a row before it is cut, special ones included, and the share of rows that are."""
    lengths = table.lengths if table.uncut is None else table.uncut
    found: dict[str, float] = {
        name: int(np.percentile(lengths, at, method="higher")) for name, at in PERCENTILES.items()
    }
    return found | {"cut": float(np.mean(lengths > max_length))}


def _conflicting(parts: Sequence[Rows]) -> int:
    """Rows whose text is there with another label as well, in any split."""
    labels: dict[str, list[int]] = defaultdict(list)
    for rows in parts:
        for text, label in zip(rows.texts, rows.labels, strict=True):
            labels[text].append(label)
    return sum(len(given) for given in labels.values() if len(set(given)) > 1)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """Sentences that stay on the report."""
    rows, said = found["rows"], []
    for pair, count in found["shared"].items():
        first, _, second = pair.partition("-")
        if count:
            said.append(f"{_of(count, rows[second])} of the {second} split have a text of {first} as well.")
    if count := found["conflicting"]:
        said.append(f"{_of(count, sum(rows.values()))} have a text that stands with another label as well.")
    if (count := found["duplicates"]["train"]) > MAX_SHARED * rows["train"]:
        said.append(f"{_of(count, rows['train'])} of the training split repeat the text of another.")
    for name, lengths in found["tokens"].items():
        if name == "train" and lengths["cut"] > CUT:
            said.append(
                f"{lengths['cut']:.1%} of the training rows are cut to `max_length: {found['max_length']}` tokens."
            )
    for name in ("validation", "test"):
        missing = [label for label, counts in found["classes"].items() if not counts[name]]
        if missing:
            more = f" and {len(missing) - 3} other classes" if len(missing) > 3 else ""
            said.append(f"The {name} split has no row of {' or '.join(map(repr, missing[:3]))}{more}.")
    return said


def _of(count: int, rows: int) -> str:
    return f"{count:,} of {rows:,} rows ({count / rows:.2%})"
