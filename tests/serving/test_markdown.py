"""Texts from data come out of Markdown as they are."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.serving.markdown import code, one_line, text

HOSTILE = [
    "a | b || c",
    "`code` and ``more``",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![image](https://example.org/x.png)",
    "*bold* **bold** _slanted_ __x__ ~~gone~~",
    "line\n\n# a heading\n- a list",
    "&lt;b&gt; &amp; &#60;",
    "back\\slash \\| \\`",
    "\x1b[31mred\x1b[0m \u202egnorw",
]


def read_back(markdown: str) -> str:
    """What a reader of Markdown shows of escaped text."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|~_])", r"\1", markdown))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_markup_in_a_text_is_shown_and_not_meant(hostile: str) -> None:
    written = text(hostile)
    assert not re.search(r"(?<!\\)(\\\\)*[`*\[\]|~]|[<>\n\r\x1b\u202e]", written)
    assert not re.search(r"(?<![\\A-Za-z0-9])_", written)


@given(st.text())
def test_nothing_is_lost_but_white_space_and_what_cannot_be_shown(given_text: str) -> None:
    assert read_back(text(given_text)) == one_line(given_text)
    assert "\n" not in text(given_text)


def test_words_stay_readable() -> None:
    assert text("learning_rate 2e-5, t0007-qv-r8 (89.3 %): p = 0.05; it's fine!") == (
        "learning_rate 2e-5, t0007-qv-r8 (89.3 %): p = 0.05; it's fine!"
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("tiny-bert", "`tiny-bert`"),
        ("a`b", "``a`b``"),
        ("``a", "``` ``a ```"),
        ("a\nb <b>", "`a b <b>`"),
    ],
)
def test_a_code_span_ends_where_it_should(value: str, written: str) -> None:
    assert code(value) == written
