"""Markdown as MLflow's UI reads it: GitHub's, with mentions, emoji and bare links. A text from data must make none."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Final
from urllib.parse import quote

from agnews_lora.serving.markdown import text
from agnews_lora.tracking.registry import Version
from agnews_lora.tracking.runs import RunPage

_ENTITIES: Final = {"@": "&#64;", ":": "&#58;", "www.": "www&#46;"}
_ROOM: Final = "&emsp;"
THUMBNAILS: Final = "thumbnails"  # artifact folder of a run: its figures, small enough to stand side by side


def plain(value: object) -> str:
    """A value as plain text on one line, also inside a table's cell: no markup, mention, emoji or link."""
    shown = text(value)
    for read, written in _ENTITIES.items():
        shown = shown.replace(read, written)
    return shown


def link(label: object, url: str) -> str:
    """A link with a plain label. url: one that this program has made, with nothing in it to escape."""
    return f"[{plain(label)}]({url})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already. The UI sets cells without any room between them: a space makes it."""
    lines = [header, ["---"] * len(header), *([f"{cell}{_ROOM}" for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float | None) -> str:
    """`89.30 %`, held together, or a dash where it is unknown."""
    return "–" if share is None or isnan(share) else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def gallery(page: RunPage, figures: Mapping[str, str]) -> str:
    """Thumbnails of a run's figures, two a row, each a link to the figure. figures: captions by artifact name."""
    cells = [
        f"[![{plain(caption)}]({page.image_url(f'{THUMBNAILS}/{name}')})]({page.artifact_url(name)})"
        for name, caption in figures.items()
    ]
    captions = [plain(caption) for caption in figures.values()]
    pairs = list(zip(captions, cells, strict=True))
    rows = [row for start in range(0, len(pairs), 2) for row in zip(*pairs[start : start + 2], strict=True)]
    header, *rest = [(*row, "") if len(row) == 1 else row for row in rows] or [("", "")]
    return table(header, rest)


def version_url(version: Version) -> str:
    """Of a registered version's page."""
    return f"#/models/{quote(version.model, safe='')}/versions/{version.number}"


def comparison_url(experiment_id: str, run_ids: Sequence[str]) -> str:
    """Of the UI's page that compares runs."""
    return f"#/compare-runs?runs={quote(json.dumps(list(run_ids)))}&experiments={quote(json.dumps([experiment_id]))}"
