"""Texts from data as Markdown: shown as they are, whatever they hold, and never read as markup."""

import re
from typing import Final

# An underscore inside a word is no markup.
_MARKUP: Final = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def text(value: object) -> str:
    """A value as plain text on one line, also inside a table's cell or a heading."""
    line = _MARKUP.sub(r"\\\g<0>", one_line(value))
    return "".join(_ENTITIES.get(character, character) for character in line)


def code(value: object) -> str:
    """A value as a code span; not for a table, whose cells end at a `|` even there."""
    line = one_line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"


def one_line(value: object) -> str:
    """White space folded, and what would steer a terminal or a reader's eye replaced."""
    folded = " ".join(str(value).split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in folded)
