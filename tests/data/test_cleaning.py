import csv
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agnews_lora.data.cleaning import clean


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Messier #39;s lawyer", "Messier's lawyer"),
        ("investors #39; faith", "investors' faith"),
        ("war in Iraq was  #39; #39;illegal #39; #39; because", "war in Iraq was ''illegal'' because"),
        ("natural gas.  quot;I am, quot; he said", 'natural gas. "I am," he said'),
        (" quot;Quoted quot; at the start", '"Quoted" at the start'),
        ("#39;Wells notice #39; over", "'Wells notice' over"),
        ("AT amp;T and Johnson  amp; Johnson", "AT&T and Johnson & Johnson"),
        (r"Fined \$1.35 Million, US\$400M", "Fined $1.35 Million, US$400M"),
        (r"the lowest since\ #36;108 on\Monday", "the lowest since $108 on Monday"),
        (r"to Ask Jeeves\\Topix.net today\\", "to Ask Jeeves Topix.net today"),
        ("finance &lt;b&gt;...&lt;/b&gt;", "finance ..."),
        ("Oil &lt;p&gt;\\&lt;/p&gt;&lt;p&gt; LONDON", "Oil LONDON"),
        (
            'UAL Corp.&lt;A HREF="http://x.y/Quote.aspx?ticker=U target=/stocks"&gt;UALAQ.OB&lt;/A&gt;, the airline',
            "UAL Corp. UALAQ.OB, the airline",
        ),
        ("&lt;b&gt;IBM&lt;/b&gt;'s line&lt;br/&gt;of servers", "IBM's line of servers"),
        ("lt;a href= quot;http://x.y/?id=352 quot; gt;see here lt;/a gt; now", "see here now"),
        (
            "Inc. &lt;DELL.O&gt;, the maker; Suzuki  lt;7269.T gt; said",
            "Inc. <DELL.O>, the maker; Suzuki <7269.T> said",
        ),
        ("be true  #151; at least; Ch&#225;vez, &#x201C;x&#8221;", "be true — at least; Chávez, “x”"),
        ("two\n lines\tand  spaces ", "two lines and spaces"),
        ("double &amp;lt;i&amp;gt;escapes&amp;lt;/i&amp;gt;", "double escapes"),
        ("R&amp;amp;#38;#x26;D &amp;#39;s", "R&D 's"),
        ("&" + 50_000 * "amp;" + "lt;b&gt;deep" + 50_000 * "&amp;", "deep" + 50_000 * "&"),
    ],
)
def test_what_ag_news_broke_is_mended(raw, cleaned):
    assert clean(raw) == cleaned


@pytest.mark.timeout(30)
def test_tags_nested_without_end_are_not_peeled_without_end() -> None:
    assert clean("nested " + 30_000 * "</b" + 10_000 * ">").startswith("nested </b</b")


@pytest.mark.parametrize(
    "text",
    [
        "C#39; and C# 39;",
        "ranked #12; and the #7; seeds",
        "the trade; the copy; a reg; and so on",
        "The &foo; of &notanentity; R&D; x",
        "a < b and c > d, 3 <4> 5",
        "the <blink> of an <article>",
        "<MSFT.O> rose, <A.N> fell",
        "unquot; and (quot; stay",
        "Café — “naïve”",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert clean(text) == text


PARTS = r"& # ; \ $ < > / quot amp lt gt #39; b p br &amp; &#92; x"
residue = st.sampled_from([*PARTS.split(), " ", "\n"])


@given(st.lists(residue, max_size=12).map("".join) | st.text(max_size=40))
@example("& amp;amp;lt;b&gt;")
@example("&#92;$ &#38;#39;")
def test_cleaning_twice_is_cleaning_once(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert "\\" not in cleaned
    assert cleaned == " ".join(cleaned.split())


@given(st.text(alphabet=st.characters(exclude_characters="\\;<>", exclude_categories=["Cs"]), max_size=60))
def test_ordinary_text_only_has_its_white_space_folded(text):
    assert clean(text) == " ".join(text.split())


@pytest.mark.skipif("AG_NEWS_DIR" not in os.environ, reason="AG_NEWS_DIR names no folder with the real AG News rows")
def test_no_residue_is_left_in_real_rows():
    path = Path(os.environ["AG_NEWS_DIR"], "train.csv")
    with path.open(encoding="utf-8", newline="") as file:
        raw = [f"{row[1]} {row[2]}" for row in csv.reader(file)]
    residue = re.compile(r"#\d+;|\b(?:quot|amp|nbsp);|&\w+;|\\|</?(?:a|b|br|font|p|strong)\b[^.<>]*>", re.IGNORECASE)
    assert sum(map(len, map(residue.findall, raw))) > 5_000
    assert [found for text in raw if (found := residue.findall(clean(text)))] == []
