"""The one rule by which texts are cleaned, whatever source they come from."""

import html
import re
from html.entities import html5
from typing import Final

# Entities that lost their ampersand. A closed list: `trade;` or `copy;` after a space is English.
_ORPHANS: Final = "quot|apos|amp|lt|gt|nbsp|hellip|mdash|ndash|lsquo|rsquo|ldquo|rdquo|eacute"
_ENTITY: Final = re.compile(
    rf"&(?P<entity>#\d{{1,6}}|#[xX][0-9a-fA-F]{{1,5}}|[A-Za-z][A-Za-z0-9]*);|(?:\A|\s)(?P<orphan>#\d{{2,5}}|{_ORPHANS});"
)
# An ampersand that was escaped again and again: one a pass would take as many passes as there are.
_AMPERSANDS: Final = re.compile(r"&(?:(?:amp|AMP|#0{0,3}38|#[xX]0{0,3}26);)+")
_MAX_PASSES: Final = 100  # real texts take three; tags in tags in tags, sent to a server, would take hours
_INLINE: Final = "a|abbr|b|big|cite|code|em|font|i|nobr|s|small|span|strong|sub|sup|tt|u"
_BLOCK: Final = "blockquote|br|center|div|h[1-6]|hr|img|li|ol|p|pre|table|tbody|td|th|tr|ul"
_INLINE_END: Final = re.compile(rf"</(?:{_INLINE})\s*>", re.IGNORECASE)
_TAG: Final = re.compile(rf"</?(?:{_INLINE}|{_BLOCK})(?:[\s/][^<>]*)?>", re.IGNORECASE)


def clean(text: str) -> str:
    """Repair the damaged characters and markup of AG News, and fold white space.

    In this order, again and again until nothing changes (so cleaning twice is cleaning once), 100 times at most:

    1. `\\$` is `$`. Every other backslash stood for a line end and becomes a space.
    2. Entities become their characters: whole ones (`&lt;`, `&#8212;`; an ampersand that was escaped several times is
       one at once), and those whose ampersand was turned into a space (`Messier #39;s`, ` quot;`, `T amp;T`). Of the
       latter only the numbers 32 to 99999 and the names quot, apos, amp, lt, gt, nbsp, hellip, mdash, ndash, lsquo,
       rsquo, ldquo, rdquo and eacute count, and only at the start of the text or behind white space, which goes with
       them: `C#39;` and `the trade;` stay as they are. Numbers from 128 to 159 are read as Windows-1252, as browsers do
       (`#151;` is a dash).
    3. HTML tags go, by a list of names: the end of an inline tag leaves nothing (`<b>IBM</b>'s`), every other tag a
       space. Other text in angle brackets stays, such as a ticker (`<MSFT.O>`).
    4. White space is folded into single spaces, and none is left at the ends.
    """
    for _ in range(_MAX_PASSES):
        if (mended := _mend(text)) == text:
            break
        text = mended
    return text


def _mend(text: str) -> str:
    if "\\" in text:
        text = text.replace("\\$", "$").replace("\\", " ")
    if ";" in text:
        text = _ENTITY.sub(_character, _AMPERSANDS.sub("&", text))
    if "<" in text:
        text = _TAG.sub(" ", _INLINE_END.sub("", text))
    return " ".join(text.split())


def _character(match: re.Match[str]) -> str:
    """The character of an entity, or the match itself where it names none."""
    name = match["entity"] or match["orphan"]
    if name.startswith("#"):
        if match["orphan"] and int(name[1:]) < 32:
            return match[0]
        return html.unescape(f"&{name};")
    return html5.get(f"{name};", match[0])
