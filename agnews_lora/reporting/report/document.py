"""The report as both of its forms read it: sections of blocks, with every number and reference resolved.

Prose is written as templates whose fields are values: what comes from data is never read as markup, neither here nor
in a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Final, Literal

from agnews_lora.reporting.report.sources import SOURCES
from agnews_lora.reporting.report.wording import capital


@dataclass(frozen=True)
class Code:
    """A name, a command or a hash."""

    text: str


@dataclass(frozen=True)
class Strong:
    """What a reader must not miss."""

    text: str


@dataclass(frozen=True)
class Ref:
    """The number of a figure or table, by its key: `Figure 2`."""

    key: str


@dataclass(frozen=True)
class Cite:
    """A source, by its key in `SOURCES`; those that are cited are listed at the end."""

    key: str


Inline = str | Code | Strong | Ref | Cite
Text = tuple[Inline, ...]


def say(template: str, **values: Inline | Text) -> Text:
    """A template's words with its fields (`{name}`) filled in."""
    parts: list[Inline] = []
    for words, name, _, _ in Formatter().parse(template):
        if words:
            parts.append(curled(words))
        if name is not None:
            value = values[name]
            parts.extend(value if isinstance(value, tuple) else [value])
    return tuple(parts)


def sentences(*texts: Text | str | None) -> Text:
    """Sentences as one paragraph's text; None is left out."""
    parts: list[Inline] = []
    for text in texts:
        if text:
            parts.extend([" "] if parts else [])
            parts.extend([curled(text)] if isinstance(text, str) else text)
    return tuple(parts)


def curled(words: str) -> str:
    """The report's own words with the apostrophe that print has; what comes from data stays as it is."""
    return words.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: Text


@dataclass(frozen=True)
class Callout:
    """A paragraph that stands out: what a reader must know before anything else."""

    text: Text


@dataclass(frozen=True)
class Sum:
    """Arithmetic spelled out. terms: (number or operator, what it is); an operator is nothing."""

    terms: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Column:
    """wide: takes the room that is left, and breaks its lines."""

    title: str
    align: Literal["left", "right"] = "left"
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """rows: a text for each column. strong: indices of rows that stand out."""

    key: str
    caption: Text
    columns: tuple[Column, ...]
    rows: tuple[tuple[Text, ...], ...]
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows for whom cannot see it."""

    path: Path
    alt: str


@dataclass(frozen=True)
class Figure:
    """width: the picture's, a share of the page's."""

    key: str
    caption: Text
    picture: Picture
    width: float = 0.94


@dataclass(frozen=True)
class Listing:
    """A file or commands, word for word."""

    title: Text
    text: str


Block = Paragraph | Callout | Sum | Table | Figure | Listing


@dataclass(frozen=True)
class Section:
    """A numbered heading with what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """highlights: (number, what it is), the few that a reader takes away. date: in words; stamp: seconds since 1970."""

    title: str
    subtitle: Text
    date: str
    stamp: int
    abstract: Text
    highlights: tuple[tuple[str, str], ...]
    notice: Text | None
    sections: tuple[Section, ...]


KINDS: Final[dict[type, str]] = {Figure: "Figure", Table: "Table"}


@dataclass
class _Numbers:
    """Labels by key, counted kind by kind, and the sources cited, in the order of their first citation."""

    labels: dict[str, str] = field(default_factory=dict)
    cited: list[str] = field(default_factory=list)


def resolved(document: Document) -> dict[str, Any]:
    """The document as JSON-ready values, for both templates: numbers given, references and citations in words.

    Raises:
        KeyError: a reference to a figure or table that the document does not have.
    """
    numbers = _Numbers(labels=dict(_labels(document)))
    body = {
        "title": document.title,
        "subtitle": _text(document.subtitle, numbers),
        "date": document.date,
        "highlights": [{"value": value, "label": label} for value, label in document.highlights],
        "notice": _text(document.notice, numbers) if document.notice else None,
        "abstract": _text(document.abstract, numbers),
        "sections": [
            {
                "number": number,
                "title": section.title,
                "blocks": [_block(block, numbers) for block in section.blocks],
            }
            for number, section in enumerate(document.sections, start=1)
        ],
    }
    return body | {"sources": [{"key": f"source-{key}", "text": SOURCES[key][1]} for key in sorted(numbers.cited)]}


def pictures(document: Document) -> list[Path]:
    """Files of all figures, in the order of `resolved`."""
    return [
        block.picture.path for section in document.sections for block in section.blocks if isinstance(block, Figure)
    ]


def _labels(document: Document) -> Iterator[tuple[str, str]]:
    counts = dict.fromkeys(KINDS.values(), 0)
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Figure | Table):
                kind = KINDS[type(block)]
                counts[kind] += 1
                yield block.key, f"{kind} {counts[kind]}"


def _text(text: Text, numbers: _Numbers) -> list[dict[str, str]]:
    return [_inline(part, numbers) for part in text]


def _inline(part: Inline, numbers: _Numbers) -> dict[str, str]:
    match part:
        case Code(text):
            return {"kind": "code", "text": text}
        case Strong(text):
            return {"kind": "strong", "text": text}
        case Ref(key):
            return {"kind": "link", "text": numbers.labels[key], "to": key}
        case Cite(key):
            if key not in numbers.cited:
                numbers.cited.append(key)
            return {"kind": "link", "text": SOURCES[key][0], "to": f"source-{key}"}
        case _:
            return {"kind": "words", "text": part}


def _block(block: Block, numbers: _Numbers) -> dict[str, Any]:
    match block:
        case Paragraph(text):
            return {"kind": "paragraph", "text": _text(text, numbers)}
        case Callout(text):
            return {"kind": "callout", "text": _text(text, numbers)}
        case Sum(terms):
            return {"kind": "sum", "terms": [{"value": value, "label": label} for value, label in terms]}
        case Listing(title, text):
            return {"kind": "listing", "title": _text(title, numbers), "text": text}
    own: dict[str, Any] = {
        "key": block.key,
        "label": numbers.labels[block.key],
        "caption": _text(block.caption, numbers),
    }
    if isinstance(block, Figure):
        return own | {"kind": "figure", "alt": block.picture.alt, "width": block.width}
    return own | {
        "kind": "table",
        "columns": [{"title": capital(each.title), "align": each.align, "wide": each.wide} for each in block.columns],
        "rows": [
            {"strong": index in block.strong, "cells": [_text(cell, numbers) for cell in row]}
            for index, row in enumerate(block.rows)
        ],
    }
