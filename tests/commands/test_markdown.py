import json
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.commands.markdown import comparison_url, gallery, link, percent, plain, table
from agnews_lora.tracking.runs import RunPage


@pytest.mark.parametrize(
    "hostile",
    [
        "![x](https://example.org/x.png)",
        "<img src=x onerror=alert(1)>",
        "[click](javascript:alert(1))",
        "@someone :bomb: http://example.org www.example.org",
        "a | b\n# heading\n| --- |",
        "`code` **bold** ~~gone~~ _it_",
    ],
)
def test_a_text_from_data_stays_a_text(hostile: str) -> None:
    shown = plain(hostile)
    assert "\n" not in shown and "<" not in shown
    for markup in ("http://", "https://", "javascript:", "www.", "@", ":bomb:", "<img"):
        assert markup not in shown
    for character in "|`*[]~":
        assert shown.replace(f"\\{character}", "").count(character) == 0


@given(st.text())
def test_no_text_makes_a_line_a_cell_or_a_mention(text: str) -> None:
    shown = plain(text)
    assert len(shown.splitlines()) <= 1
    assert "@" not in shown and ":" not in shown
    assert "|" not in shown.replace("\\|", "")


def test_percent_is_held_together_and_unknown_is_a_dash() -> None:
    assert percent(0.893) == "89.30\N{NO-BREAK SPACE}%"
    assert percent(1.0) == "100.00\N{NO-BREAK SPACE}%"
    assert percent(None) == percent(float("nan")) == "–"


def test_table_has_a_line_a_row() -> None:
    lines = table(["a", "b"], [["1", "2"], ["3", "4"]]).splitlines()
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert [line.replace("&emsp;", "") for line in lines[2:]] == ["| 1 | 2 |", "| 3 | 4 |"]


def test_gallery_shows_two_figures_a_row_each_a_link_to_the_whole_one(tmp_path: Path) -> None:
    page = RunPage(None, "1", "ab" * 16)  # type: ignore[arg-type]
    lines = gallery(page, {"a.png": "A", "b.png": "B", "c.png": "C"}).splitlines()
    assert len(lines) == 5
    assert lines[0] == "| A | B |" and lines[3].startswith("| C")
    for line, names in ((lines[2], "ab"), (lines[4], "c")):
        assert line.count("[![") == len(names)
        for name in names:
            assert f"(get-artifact?path=thumbnails%2F{name}.png&run_uuid={'ab' * 16})" in line
            assert f"(#/experiments/1/runs/{'ab' * 16}/artifacts/{name}.png)" in line


def test_comparison_names_every_run() -> None:
    url = comparison_url("7", ["a1", "b2"])
    query = parse_qs(url.partition("?")[2])
    assert json.loads(unquote(query["runs"][0])) == ["a1", "b2"]
    assert json.loads(unquote(query["experiments"][0])) == ["7"]
    assert not set(url) & set(" ()[]\"'")


def test_link_keeps_its_label_plain() -> None:
    assert link("a](http://x) b", "#/here") == "[a\\](http&#58;//x) b](#/here)"
