"""What a report says, from dossiers made by hand; and what its two forms make of it."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting.report import gallery
from agnews_lora.reporting.report.composition import compose
from agnews_lora.reporting.report.document import Document, Paragraph, Ref, Section, resolved, say
from agnews_lora.reporting.report.dossier import Answers, Dossier, Registered
from agnews_lora.reporting.report.drawing import draw
from agnews_lora.reporting.report.mistakes import class_scores
from agnews_lora.reporting.report.page import html
from agnews_lora.reporting.report.paper import pdf
from agnews_lora.reporting.report.wording import counted, listed, number, p_value, seconds
from agnews_lora.tracking.registry import Version
from tests.reporting.dossiers import HOSTILE, TRIALS, dossier, mistakes, predictions, trial


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Dossier:
    """A finished sweep, with the figures that are drawn of it."""
    folder = tmp_path_factory.mktemp("figures")
    points = pd.DataFrame({"trial": ["t0001"] * 2, "step": [20, 40], "train/loss": [1.2, 0.6]})
    points = points.assign(**{"eval/accuracy": [0.6, 0.9], "eval/macro_f1": 0.5, "eval/loss": [1.1, 0.4]})
    pictures = draw(
        dossier(), {"t0001": lambda: points}, {name: folder / name for name in (*gallery.DRAWN, "unknown.png")}
    )
    assert set(pictures) == set(gallery.DRAWN)
    return dossier(pictures=pictures)


INLINE = {"words", "code", "strong", "link"}


def texts(document: Document) -> list[str]:
    """Every text of a document, paragraph by paragraph and cell by cell."""
    found: list[str] = []

    def walk(value: Any) -> None:
        parts = value if isinstance(value, list) else []
        if parts and all(isinstance(part, dict) and part.get("kind") in INLINE for part in parts):
            found.append("".join(part["text"] for part in parts))
        elif isinstance(value, dict):
            shown = ["title", "label", "value", *(["text"] if value.get("kind") == "listing" else [])]
            found.extend(value[key] for key in shown if isinstance(value.get(key), str))
            for each in value.values():
                walk(each)
        else:
            for each in parts:
                walk(each)

    walk(resolved(document))
    return [text for text in found if text]


class Page(HTMLParser):
    """A page as a reader sees it, and everything that a browser would load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self._styled = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._styled = tag == "style"
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        self.loads += [str(given[name]) for name in ("src", "srcset", "data", "poster", "action") if name in given]
        if tag == "link":
            self.loads.append(str(given.get("href")))
        if tag == "a":
            self.links.append(str(given["href"]))
        if "id" in given:
            self.ids.append(str(given["id"]))

    def handle_endtag(self, tag: str) -> None:
        self._styled = False

    def handle_data(self, data: str) -> None:
        if not self._styled:
            self.seen.append(data)

    @property
    def text(self) -> str:
        return "".join(self.seen)


def pdf_text(document: Document, folder: Path) -> str:
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    path = folder / "report.pdf"
    path.write_bytes(pdf(document))
    return subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, text=True, check=True).stdout


def squeezed(text: str) -> str:
    """Without what typesetting adds or takes: white space, hyphens at line ends, curled quotation marks."""
    for curled, straight in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("ﬁ", "fi"), ("ﬂ", "fl"), ("ﬀ", "ff")):
        text = text.replace(curled, straight)
    return re.sub(r"[\s\-‐­ ]+", "", text)


def said(dossier: Dossier) -> str:
    return "\n".join(texts(compose(dossier)))


def test_a_finished_sweep_is_told_from_its_numbers(full: Dossier) -> None:
    report = said(full)
    for words in (
        "LoRA within 100,000 trainable parameters",
        "Of four trials, two were trained to their end, one was given up on the way",
        "93,700",
        "90.00% of the validation rows",
        "Trained again with other seeds, it reaches 89.00% on average over two runs",
        "88.75% (95% interval 85.28% to 91.49%, 400 rows)",
        "+35.00 percentage points",
        "1,540 + 10 × 9,216 = 93,700",
        "no classifier can expect to label more than 94.00%",
        "below the median of all other trials",
        "git checkout 0123456789abcdef0123456789abcdef01234567",
        "make sweep SWEEP=small\nmake promote SWEEP=small\nmake report SWEEP=small",
        "experiment-small.yaml, as the sweep read it.",
    ):
        assert words in report, words


def test_the_abstract_is_a_paragraph_of_a_few_sentences(full: Dossier) -> None:
    abstract = "".join(part["text"] for part in resolved(compose(full))["abstract"])
    assert 5 <= len(re.findall(r"[a-z%)]\.(?: |$)", abstract)) <= 7


def test_sections_come_in_the_order_of_a_paper(full: Dossier) -> None:
    assert [section["title"] for section in resolved(compose(full))["sections"]] == [
        "Data",
        "Adapter configurations and the budget",
        "Training schedule",
        "Results",
        "The search in figures",
        "The winner against the baseline",
        "Error analysis",
        "How to reproduce",
    ]


def test_figures_and_tables_are_numbered_in_order_and_each_is_referred_to_or_captioned(full: Dossier) -> None:
    blocks = [block for section in resolved(compose(full))["sections"] for block in section["blocks"]]
    for kind in ("Figure", "Table"):
        labels = [block["label"] for block in blocks if block["kind"] == kind.lower()]
        assert labels == [f"{kind} {index}" for index in range(1, len(labels) + 1)]
    assert all(block["caption"] for block in blocks if block["kind"] in ("figure", "table"))


def test_a_reference_to_nothing_is_a_fault_of_the_program(full: Dossier) -> None:
    wrong = replace(compose(full), sections=(Section("A", (Paragraph(say("{x}", x=Ref("absent"))),)),))
    with pytest.raises(KeyError):
        resolved(wrong)


BARE = {
    "answers": Answers(),
    "registered": None,
    "confirmation": None,
    "experiment": None,
    "definition": None,
    "settings": None,
    "shape": None,
    "files": {},
    "datasets": (),
    "bound": None,
    "pictures": {},
    "asked": None,
    "tags": {},
}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing but runs": (BARE, ["Of four trials", "an installed package, version unknown"]),
    "no answers kept": ({"answers": Answers()}, ["labels 55.00% rightly."]),
    "answers of other rows": (
        {"answers": Answers(predictions(0.9), predictions(0.5, num_rows=100))},
        ["labels 55.00% rightly."],
    ),
    "not promoted": ({"registered": Registered(Version("small", 3, "run1", {}, ()), None)}, ["not been put through"]),
    "the baseline wins": ({"winner": "t0000"}, ["– the baseline itself –"]),
    "under way": (
        {"state": "RUNNING", "ended": None, "asked": 9},
        ["Unfinished. The sweep is still under way: 4 of 9 trials had ended", "best trial so far"],
    ),
    "stopped": ({"state": "INTERRUPTED"}, ["was stopped and can go on"]),
    "no trial yet": (
        {**BARE, "trials": pd.DataFrame(TRIALS).head(0), "winner": None, "baseline": None, "state": "RUNNING"},
        ["No trial has been started yet."],
    ),
    "nothing complete": (
        {
            "trials": pd.DataFrame([row | {"state": "FAIL", "reason": "out of memory"} for row in TRIALS]),
            "winner": None,
            "answers": Answers(),
            "registered": None,
            "confirmation": None,
        },
        ["No result. Four trials ended, and none of them was", "All four trials failed.", "out of memory"],
    ),
    "uncommitted changes": ({"tags": {**dossier().tags, "git.dirty": "true"}}, ["with uncommitted changes"]),
    "more trials asked for": ({"asked": 40}, ["agnews-lora sweep small --trials 40"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_store_lacks_is_left_out(case: str) -> None:
    changes, words = CASES[case]
    report = dossier(**changes)
    document = compose(report)
    for expected in words:
        assert expected in "\n".join(texts(document))
    assert all(section["blocks"] for section in resolved(document)["sections"])
    assert "nan" not in said(report).lower().replace("loss is nan", "")
    assert html(document)
    assert pdf(document).startswith(b"%PDF")


def test_both_forms_say_the_same(full: Dossier, tmp_path: Path) -> None:
    document = compose(full)
    page, paper = squeezed(Page(html(document)).text), squeezed(pdf_text(document, tmp_path))
    captions_and_prose = [text for text in texts(document) if len(text) > 12]
    assert len(captions_and_prose) > 80
    for text in captions_and_prose:
        assert squeezed(text) in page, text
    # Cells of a table stand side by side on paper, so there the words are looked for, not whole lines.
    for text in captions_and_prose:
        for word in text.split():
            if len(word) > 4:
                assert squeezed(word) in paper, (word, text)


def test_the_page_loads_nothing(full: Dossier) -> None:
    page = html(compose(full))
    seen = Page(page)
    assert seen.loads
    assert all(load.startswith("data:image/png;base64,") for load in seen.loads)
    assert not seen.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    assert "http://" not in page
    assert "https://" not in page


def test_every_link_of_the_page_leads_somewhere_in_it(full: Dossier) -> None:
    seen = Page(html(compose(full)))
    assert len(seen.ids) == len(set(seen.ids))
    assert {link.removeprefix("#") for link in seen.links} <= set(seen.ids)


HOSTILE_TEXTS = [HOSTILE, "\x00\x07\u202e\ufeff\U0001f600 中文", "#" * 500, "a" * 4000, ']) #read("/etc/passwd")', ""]


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_texts_from_data_are_shown_and_do_nothing(text: str, tmp_path: Path) -> None:
    hostile = dossier(
        trials=pd.DataFrame([*TRIALS, trial(4, TrialSpec("qv", 2, 2.0, 0.0, 1e-3), "FAIL", float("nan"), reason=text)]),
        answers=Answers(predictions(0.9), predictions(0.5), mistakes(text)),
        files={"small.yaml": text, "experiment-small.yaml": text},
        tags={**dossier().tags, "device": text},
        sweep="small",
    )
    document = compose(hostile)
    page = html(document)
    seen = Page(page)
    assert not seen.tags & {"script", "b>"}
    paper = pdf(document)
    assert paper.startswith(b"%PDF")
    if text == HOSTILE:
        assert squeezed(HOSTILE) in squeezed(seen.text)
        shown = squeezed(pdf_text(document, tmp_path))
        for piece in ("#panic", "$x^2$", "*bold*", "@winner", "<script>alert(1)</script>", "{{7*7}}"):
            assert squeezed(piece) in shown


def test_the_same_dossier_gives_the_same_bytes(full: Dossier) -> None:
    assert html(compose(full)) == html(compose(full))
    assert pdf(compose(full)) == pdf(compose(full))


def test_class_scores_by_hand() -> None:
    answers = pd.DataFrame(
        {
            "row": range(5),
            "label": ["a", "a", "a", "b", "b"],
            "predicted": ["a", "a", "b", "b", "a"],
            "a": [0.9, 0.8, 0.3, 0.2, 0.6],
            "b": [0.1, 0.2, 0.7, 0.8, 0.4],
            "c": 0.0,
        }
    )
    first, second, third = class_scores(answers)
    assert (first.precision, first.recall, first.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (second.precision, second.recall, second.f1) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert (third.precision, third.recall, third.f1, third.num_rows) == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(0.00356), "0.00356"),
        (number(2e-5), "2 × 10⁻⁵"),
        (number(0), "0"),
        (number(8.0), "8"),
        (number(123_456.0), "1.23 × 10⁵"),
        (counted(1, "trial"), "one trial"),
        (counted(12, "trial"), "twelve trials"),
        (counted(48, "trial"), "48 trials"),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (p_value(0.0004), "p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}0.001"),
        (p_value(0.25), "p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.250"),
        (seconds(5.44), "5.4 s"),
        (seconds(59.7), "1 min 00 s"),
        (seconds(3_725), "1 h 02 min"),
    ],
)
def test_numbers_in_words(written: str, expected: str) -> None:
    assert written == expected
