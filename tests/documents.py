"""The documents of the project, read as text: blocks of commands and examples, links, headings, tables.

A block of commands has the fence ```sh, and is parsed; with the fence ```sh run it is run as well.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
_FENCE: Final = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_HEADING: Final = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)
_LINK: Final = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. fence: the words behind its first fence. heading: what it stands below."""

    page: Path
    line: int
    fence: str
    text: str
    heading: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_of_commands(self) -> bool:
        return self.fence.split()[:1] == ["sh"]

    def lines(self) -> list[str]:
        """What a shell reads as one command: a line, or several where each but the last ends in a backslash."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    def commands(self) -> Iterator[list[str]]:
        """The simple commands in it, as words: those of a pipe, and those of a line, one by one."""
        for line in self.lines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split, lexer.commenters = True, "#"
            for is_word, words in groupby(lexer, key=lambda word: not set(word) <= set("|&;")):
                if is_word:
                    yield list(words)


@dataclass(frozen=True)
class Table:
    """A table. heading: what it stands below."""

    heading: str
    columns: list[str]
    rows: list[list[str]]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        headings = _HEADING.findall(without_blocks(before))
        found.append(Block(page, before.count("\n") + 1, match[1], match[2], headings[-1] if headings else ""))
    return found


def without_blocks(text: str) -> str:
    """A page's text without what is fenced."""
    return _FENCE.sub("", text)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return without_blocks(page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Where the page's links lead, but for those that leave the project."""
    return [to for to in _LINK.findall(prose(page)) if not re.match(r"[a-z]+:", to)]


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: GitHub's form of the headings."""
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page)))
    return {each.replace(" ", "-") for each in words}


def tables(page: Path) -> list[Table]:
    """All tables of a page."""
    found, heading = [], ""
    for is_row, lines in groupby(prose(page).splitlines(), key=lambda line: line.startswith("|")):
        if not is_row:
            headings = [match[1] for line in lines if (match := _HEADING.match(line))]
            heading = headings[-1] if headings else heading
            continue
        columns, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
        found.append(Table(heading, columns, rows))
    return found


def targets() -> dict[str, str]:
    """{target: its recipe} of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z]+):.*\n((?:\t.*\n)*)", makefile, flags=re.MULTILINE))
