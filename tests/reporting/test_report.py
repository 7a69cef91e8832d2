"""The report of a sweep as its two forms show it, from results made by hand."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agnews_lora.errors import StorageError
from agnews_lora.reporting.figures import draw
from agnews_lora.reporting.report import compose, write_report
from agnews_lora.search.racing import Selection
from agnews_lora.search.results import SweepResult
from tests.reporting.results import (
    HOSTILE,
    PROFILE,
    TRIALS,
    answers,
    bare,
    confirmed,
    curves,
    facts,
    registration,
    result,
)


class Page(HTMLParser):
    """A page as a reader sees it, and everything that a browser would load or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        names = ("src", "srcset", "data", "poster", "action", "href")
        self.loads += [str(given[name]) for name in names if name in given]

    def handle_data(self, data: str) -> None:
        self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.seen).split())


def first_page(of: SweepResult) -> str:
    """Every string of the first page."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for each in value.values() for text in strings(each)]
        return [text for each in value for text in strings(each)] if isinstance(value, list) else [str(value)]

    return "\n".join(strings(compose(of, {"score_against_parameters.png"})["first"]))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The report of a finished sweep."""
    folder = tmp_path_factory.mktemp("reports")
    return write_report(result(), draw(result(), curves(result()), folder / "figures"), folder / "new")


def test_the_first_page_has_all_that_a_decision_needs() -> None:
    page = first_page(result())
    for words in (
        "Trial t0001 is the winner by accuracy: its adapter (qv r=10 alpha=20 dropout=0.05 lr=0.003) labels",
        "labels 88.75% of the 400 test rows correctly",
        "with a macro-F1 of 88.70%",
        "88.75%\n400 rows; 95% interval 85.28% to 91.49%; scored once, after the choice; macro-F1 88.70%",
        "90.00%\n250 rows; 95% interval 85.65% to 93.13%; macro-F1 89.00%",
        "89.33%\n250 rows; 95% interval 84.81% to 92.63%; the winner's configuration, 3 runs; macro-F1 89.00%",
        "Majority class\n25.60%\n250 rows; always the most common label; macro-F1 10.19%",
        "the winner gains +34.80 points of accuracy (95% interval +27.79 to +41.26; McNemar p < 0.001)",
        "81.25%\n250 rows; with logistic regression",
        "94.00%",  # best possible
        "93,700\n93.7% of 100,000: head 1,540 + rank 10 × 9,216",
        "5 complete, 2 pruned, 1 failed",
        "training 2 min 24 s, evaluation 36 s",
        "Wall time\n7 min 30 s\nof training and evaluation, over all starts; summed over 12 runs",
        "score_against_parameters.png",
        "1 trial failed.",
        "agnews-lora predict --sweep small",
    ):
        assert words in page, words


def test_by_macro_f1_the_first_page_leads_with_it() -> None:
    page = first_page(result(facts=facts(objective="macro_f1")))
    for words in (
        "is the winner by macro-F1",
        "Test macro-F1\n88.70%\n400 rows; accuracy 88.75% (95% interval 85.28% to 91.49%)",
        "89.00%\n250 rows; accuracy 89.33% (95% interval 84.81% to 92.63%); the winner's configuration, 3 runs",
        "the winner gains +34.80 points of macro-F1",
        "TF-IDF\n80.00%\n250 rows; accuracy 81.25%",
    ):
        assert words in page, words
    assert "McNemar" not in page


FAILED_CHECK = ({"rule": "not worse than the champion", "found": "p = 0.01", "passed": False},)
EVEN = {"both": 200, "only_winner": 9, "only_baseline": 4, "neither": 37}
MANY = tuple(replace(TRIALS[n % 2], number=n, trial=f"t{n:04d}", baseline=n == 0) for n in range(12))
CASES: dict[str, tuple[SweepResult, list[str], list[str]]] = {
    # result, texts that are on the first page, texts that are not
    "not confirmed": (
        bare(facts=facts(planned_trials=12)),
        ["90.00% of the 250 validation rows", "; 12 planned", "Not confirmed", "Not promoted"],
        ["Test accuracy"],
    ),
    "no winner": (
        bare(trials=tuple(replace(row, state="FAIL", accuracy=None) for row in TRIALS)),
        ["No winner: 8 trials ended", "8 trials failed", "agnews-lora sweep small --new"],
        ["Few trials", "Not promoted", "Trainable parameters"],
    ),
    "not promoted": (
        result(registration=replace(registration(), aliases=("candidate",), checks=(), test=None)),
        ["90.00% of the 250 validation rows", "Not promoted", "agnews-lora promote small"],
        ["Test accuracy"],
    ),
    "a check failed": (
        result(registration=replace(registration(), aliases=(), checks=FAILED_CHECK, test=None)),
        ["failed a promotion check", "agnews-lora sweep small --trials 18"],
        ["Not promoted"],
    ),
    "the baseline wins": (
        bare(trials=TRIALS[:1]),
        ["No trial beats the baseline", "Few trials: only 1 trial completed"],
        ["the winner gains"],
    ),
    "a gain that may be chance": (
        bare(answers=replace(answers(), against_baseline=EVEN)),
        ["The gain over the baseline may be chance (McNemar p = 0.267)"],
        [],
    ),
    "a gain that seeds do not confirm": (
        result(selection=Selection("t0001", ("t0001", "t0007"), 0.71, 0.8)),
        ["The gain over the baseline may be chance (the probability", "Not distinguishable from the baseline"],
        ["McNemar p = 0.267"],
    ),
    "a gain within the interval": (
        bare(trials=(replace(TRIALS[0], accuracy=0.89), *TRIALS[1:])),
        ["the baseline lies within the winner's 95% interval"],
        [],
    ),
    "no better than without an encoder": (
        result(answers=replace(answers(), tfidf_accuracy=0.9), facts=facts(majority_accuracy=0.95)),
        ["No better than TF-IDF", "No better than majority class"],
        [],
    ),
    "a repetition failed": (
        result(confirmed=confirmed()[1:], selection=None),
        ["1 repetition of the winner failed"],
        [],
    ),
    "uncommitted changes": (
        result(facts=facts(provenance={"git.dirty": "true"})),
        ["uncommitted changes"],
        [],
    ),
    "rows that splits share": (
        result(facts=facts(profile={**PROFILE, "warnings": ["1 of 400 rows (0.25%) of the test split"]})),
        ["1 of 400 rows (0.25%) of the test split"],
        [],
    ),
    "nothing to worry about": (
        result(trials=MANY, facts=facts(planned_trials=12)),
        ["None is known."],
        ["Few trials", "chance", "planned", "No better than"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_risks_and_next_step_follow_the_state_of_the_sweep(case: str) -> None:
    of, present, absent = CASES[case]
    page = first_page(of)
    assert [words for words in present if words not in page] == []
    assert [words for words in absent if words in page] == []


def test_sections_come_in_order_and_empty_ones_are_left_out(written: tuple[Path, Path]) -> None:
    everything = [
        "Data",
        "Leaderboard",
        "Confirmation over seeds",
        "Promotion checks",
        "The search in figures",
        "Mistakes",
        "Configuration",
        "Provenance",
    ]
    page = written[0].read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == everything
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 6
    short = compose(bare(trials=()), set())
    assert [section["title"] for section in short["sections"]] == ["Data", "Configuration", "Provenance"]


def test_the_sections_tell_the_rest(written: tuple[Path, Path]) -> None:
    text = Page(written[0].read_text(encoding="utf-8")).text
    for words in (
        "0 of train and validation, 1 of train and test",
        "over 80 tokens, so cut",
        "t0000 (baseline)",
        "88.80%, 89.20%",  # the repetitions
        "digest 4aba46d1367b",
        "is wrong on 25 of 250 validation rows",
        "Shares of the chip maker rose",
        "0.0005 to 0.01",
        "learning_rate: {low: 5e-4, high: 1e-2}",
        "0123456789abcdef0123456789abcdef01234567",
        "1 March 2026",
    ):
        assert words in text, words


def test_many_classes_are_cut_to_the_largest() -> None:
    classes = {f"class {n}": {"train": n, "validation": 1, "test": 1} for n in range(1, 201)}
    many = compose(bare(facts=facts(profile={**PROFILE, "classes": classes})), set())
    names = [row["cells"][0] for row in many["sections"][0]["blocks"][0]["rows"]]
    assert names[:2] == ["class 200", "class 199"] and names[20] == "(180 other classes)"
    old = compose(bare(facts=facts(profile={})), set())
    assert "Data" not in [section["title"] for section in old["sections"]]


def test_a_long_leaderboard_is_cut_but_keeps_the_baseline() -> None:
    rows = [replace(TRIALS[1], number=n, trial=f"t{n:04d}", accuracy=0.8 + n / 1000) for n in range(1, 30)]
    [section] = [
        each for each in compose(bare(trials=(TRIALS[0], *rows)), set())["sections"] if each["title"] == "Leaderboard"
    ]
    names = [row["cells"][1] for row in section["blocks"][0]["rows"]]
    assert names == [*(f"t{n:04d}" for n in range(29, 19, -1)), "t0000 (baseline)"]


def test_nothing_is_loaded_and_nothing_runs(written: tuple[Path, Path]) -> None:
    page = Page(written[0].read_text(encoding="utf-8"))
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object", "form"}
    assert "url(" not in written[0].read_text(encoding="utf-8")


def test_the_same_result_gives_the_same_bytes(written: tuple[Path, Path], tmp_path: Path) -> None:
    again = write_report(result(), draw(result(), curves(result()), tmp_path / "figures"), tmp_path / "new")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    assert sorted(path.name for path in again[0].parent.iterdir()) == ["small-2.html", "small-2.pdf"]


def hostile() -> SweepResult:
    """HOSTILE wherever a text of data can be."""
    given = answers(f"{HOSTILE}\n{HOSTILE}")
    checks = ({"rule": HOSTILE, "found": HOSTILE, "passed": True},)
    return result(
        facts=facts(
            sweep=HOSTILE,
            experiment=HOSTILE,
            base=HOSTILE,
            settings={HOSTILE: HOSTILE},
            space={HOSTILE: [HOSTILE, HOSTILE]},
            data={HOSTILE: HOSTILE},
            texts={HOSTILE: HOSTILE},
            labels=(HOSTILE[:12],) * 4,
            provenance={HOSTILE: HOSTILE},
        ),
        trials=tuple(replace(row, reason=HOSTILE + "x" * 300) for row in TRIALS),
        registration=replace(registration(), model=HOSTILE, checks=checks),
        answers=replace(
            given, mistakes=tuple(each | {"label": HOSTILE, "predicted": HOSTILE} for each in given.mistakes)
        ),
    )


def test_hostile_texts_are_shown_and_not_read_as_markup(tmp_path: Path) -> None:
    page, paper = write_report(hostile(), draw(hostile(), {}, tmp_path), tmp_path)
    shown = Page(page.read_text(encoding="utf-8"))
    assert "script" not in shown.tags
    assert shown.text.count(HOSTILE) > 20
    assert paper.read_bytes().startswith(b"%PDF")  # Typst would have stopped at `#panic`
    assert pdf_text(paper).count("#panic") > 20 if shutil.which("pdftotext") else True


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_a_report_of_any_number_of_labels_is_bounded(num_classes: int, tmp_path: Path) -> None:
    labels = tuple(f"标签 😀 {'long name ' * 6}{HOSTILE[: 1 + label % 60]} {label}" for label in range(num_classes))
    rows = tuple((label, (label + 1) % num_classes, 1) for label in range(num_classes))
    mistakes = tuple(each | {"label": labels[0], "predicted": labels[1]} for each in answers().mistakes)
    of = result(facts=facts(labels=labels), answers=replace(answers(), confusion=rows, mistakes=mistakes))
    page, paper = write_report(of, draw(of, {}, tmp_path), tmp_path)
    assert f"is wrong on {num_classes:,} of {num_classes:,}" in Page(page.read_text(encoding="utf-8")).text
    assert paper.stat().st_size < 2**20 and page.stat().st_size < 2**20


def pdf_text(paper: Path) -> str:
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    return subprocess.run(["pdftotext", paper, "-"], capture_output=True, text=True, check=True).stdout


def test_the_pdf_says_the_same_and_numbers_figures_and_tables(written: tuple[Path, Path]) -> None:
    text = " ".join(pdf_text(written[1]).split())
    for words in ("Trial t0001 is the winner", "85.28% to 91.49%", "agnews-lora serve small", "Table 1", "Figure 6"):
        assert words in text, words


def test_a_result_without_much_is_a_report_all_the_same(tmp_path: Path) -> None:
    page, paper = write_report(bare(trials=()), {}, tmp_path)
    assert "Provenance" in page.read_text(encoding="utf-8")
    assert paper.read_bytes().startswith(b"%PDF")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="name another one with --to"):
        write_report(bare(trials=()), {}, tmp_path / "file")
