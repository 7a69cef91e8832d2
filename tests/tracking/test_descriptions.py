"""What MLflow's UI shows: the result first, every value escaped, and nothing of a candidate once it is champion."""

import html
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting.figures import ANSWER_FIGURES, FIGURES
from agnews_lora.reporting.summary import certainty, next_steps
from agnews_lora.search.results import Registration, SweepResult
from agnews_lora.tracking.descriptions import (
    code,
    gallery,
    link,
    model_description,
    one_line,
    opening_description,
    percent,
    plain,
    sweep_description,
    text,
    trial_description,
    version_description,
    winner_description,
)
from agnews_lora.tracking.runs import MAX_DESCRIPTION, RunPage
from agnews_lora.tracking.versions import Version
from agnews_lora.tracking.views import address
from agnews_lora.training.interface import EvalPoint, TrialResult
from tests.reporting.results import HOSTILE, TRIALS, bare, facts, result

SPEC = TrialSpec("ffn", 4, 4.0, 0.142, 0.00356)
NBSP = "\N{NO-BREAK SPACE}"
CANDIDATE = Registration("small", 3, ("candidate",))
VERSION = "#/models/small/versions/3?workflowType=machine_learning"
LINKS = {page: address("experiments/1/runs", viewStateShareKey=page) for page in ("trials", "charts")}
STEPS = next_steps(bare(state="INTERRUPTED"))


def page(run_id: str) -> RunPage:
    return RunPage(None, "1", run_id)  # type: ignore[arg-type]


def told(shown: SweepResult) -> str:
    return sweep_description(shown, page, FIGURES, next_steps(shown), certainty(shown))


# A sweep -------------------------------------------------------------------------------------------------------------


def test_the_first_three_lines_hold_result_budget_and_next_step() -> None:
    first, second, third, *_ = told(result(registration=CANDIDATE)).splitlines()
    run = page("run1").url
    assert first == (
        f"**accuracy 90.00{NBSP}% on 250 rows by [t0001-qv-r10]({run})**, baseline 55.20{NBSP}%, TF-IDF 81.25{NBSP}%"
    )
    assert second == "**Budget:** 93,700 of 100,000 trainable parameters"
    assert third == (
        "**Next:** `agnews-lora promote small`: check the winner, and make it champion "
        f"([version 3 of small]({VERSION}), candidate)"
    )


def test_an_unconfirmed_winner_has_no_mean() -> None:
    shown = told(bare(facts=facts(bound=None)))
    assert shown.startswith(f"**accuracy 90.00{NBSP}% on 250 rows by [t0001-qv-r10]") and "best possible" not in shown
    assert "mean of" not in shown and "`agnews-lora promote small`: check the winner" in shown


def test_after_a_promotion_nothing_speaks_of_the_candidate() -> None:
    shown = told(result())
    first, _, third, *_ = shown.splitlines()
    assert third.startswith("**Next:** `agnews-lora predict --sweep small 'Oil rose.'`: ask the champion ([version 3")
    assert third.endswith("champion)") and first.endswith(f"test accuracy 88.75{NBSP}%")
    assert f"On the test split, scored once: accuracy 88.75{NBSP}% (95&nbsp;% interval" in shown
    assert "candidate" not in shown and "promote" not in shown


def test_a_sweep_shows_its_best_trials_counts_figures_and_links() -> None:
    shown = told(replace(result(), links=LINKS))
    table = [line for line in shown.splitlines() if re.match(r"\| \d&emsp;", line)]
    assert [re.search(r"t\d{4}", line)[0] for line in table] == ["t0001", "t0007", "t0004", "t0005", "t0000"]  # type: ignore[index]
    assert f"89.33{NBSP}%" in table[0] and "–" in table[2]
    assert "Trials: 5 complete, 2 pruned, 1 failed." in shown
    assert " ".join(certainty(result())) in shown
    assert "| gain&emsp; | | +34.80 points&emsp; | | | |" in shown
    for name in FIGURES:
        assert f"thumbnails%2F{name}" in shown
    for url in (
        page("parent").artifact_url("leaderboard.json"),
        f"[as a table]({LINKS['trials']})",
        f"[as charts]({LINKS['charts']})",
    ):
        assert url in shown
    links = re.findall(r"\]\((#/[^)]*)\)", shown)
    assert links and all("?workflowType=machine_learning" in link for link in links)
    assert len(shown) <= MAX_DESCRIPTION
    assert all(
        f"thumbnails%2F{name}" not in sweep_description(result(), page, {}, next_steps(result())) for name in FIGURES
    )


def test_a_sweep_says_what_it_searches() -> None:
    searched = facts(adapter=SPEC, heads=("full", "out_proj"), confirmation={"trials": 3, "seeds": 2})
    for shown in (opening_description(searched, STEPS, LINKS), told(result(facts=searched))):
        assert "with the best accuracy and at most 100,000 trainable parameters, in 8 trials of 60 steps" in shown
        assert "the best 3 raced over up to 2 seeds: experiment small, 960 training and 250 validation rows." in shown
        assert f"the experiment's own configuration, `{SPEC}`" in shown
        for line in (
            "| targets&emsp; | qk (r ≤ 10), qv (r ≤ 10), qkv (r ≤ 7), qkvo (r ≤ 5), ffn (r ≤ 4), all-linear (r ≤ 2) |",
            "| head&emsp; | full, out_proj |",
            "| alpha / rank&emsp; | 1, 2, 4, 8 |",
            "| dropout&emsp; | 0 to 0.2 |",
            "| learning rate&emsp; | 0.0005 to 0.01, in its logarithm |",
        ):
            assert line in shown


def test_a_sweep_under_way_says_how_to_resume_it() -> None:
    shown = opening_description(facts(), STEPS, LINKS)
    assert shown.startswith("**Under way") and "**Next:** `agnews-lora sweep small`: resume it" in shown
    assert "### Result" not in shown


def test_a_sweep_without_a_winner_says_so() -> None:
    shown = told(bare(trials=TRIALS[2:4]))
    assert shown.startswith("**No winner:** no trial was completed, 1 pruned, 1 failed\n**Budget:** 100,000")
    assert "What is searched" in shown and "promote" not in shown


# Its trials ----------------------------------------------------------------------------------------------------------


def ended(state: str, final: EvalPoint | None = None, reason: str | None = None) -> Any:
    steps = TrialResult("t0011", 80, 80, final, None, 93_700, 1_280, 15.0, 2.0, 1 << 30)
    return SimpleNamespace(state=state, result=None if state == "FAILED" else steps, reason=reason)


def test_a_trial_says_what_it_is_while_it_trains() -> None:
    known = {"trainable_parameters": 93_700, "budget": 100_000, "baseline": False}
    shown = trial_description(SPEC, known)
    assert "Under way" in shown and "`ffn r=4 alpha=4 dropout=0.142 lr=0.00356`" in shown
    assert f"93,700 trainable parameters of 100,000 (93.70{NBSP}%)" in shown and "baseline" not in shown
    assert "never pruned" in trial_description(SPEC, known | {"baseline": True})
    assert "known to be good (Hu et al. 2021), never" in trial_description(SPEC, known | {"source": "Hu et al. 2021"})
    assert "trains t0003 again" in trial_description(SPEC, known | {"confirms": "t0003"})
    assert trial_description(SPEC, {}).splitlines()[1] == f"`{SPEC}`"


def test_a_trial_says_how_it_ended() -> None:
    final = EvalPoint("t0011", 80, 0.893, 0.8928, 0.377, 1_000, True, 0)
    complete = trial_description(SPEC, {}, page("run"), ended("COMPLETE", final))
    assert complete.startswith(f"**Complete**: accuracy **89.30{NBSP}%**")
    assert "on 1,000 validation rows, after 80 steps" in complete and "thumbnails%2Faccuracy_curve.png" in complete
    pruned = trial_description(SPEC, {}, page("run"), ended("PRUNED", reason="below the median"))
    assert pruned.startswith("**Pruned**: below the median") and "thumbnails%2Floss_curve.png" in pruned


def test_a_failure_shows_its_reason_as_a_text_and_no_curves() -> None:
    hostile = "out of memory\n\n# <script>alert(1)</script> ![x](http://example.org/x.png) | @someone"
    shown = trial_description(SPEC, {}, page("run"), ended("FAILED", reason=hostile))
    assert shown.splitlines()[0].startswith("**Failed**: out of memory # &lt;script&gt;")
    assert "http://" not in shown and "![" not in shown.replace("!\\[", "") and "@" not in shown
    assert "thumbnails" not in shown


def test_a_winner_says_so_until_another_takes_its_place() -> None:
    shown = winner_description(result(), page, ANSWER_FIGURES)
    parent = page("parent").url
    assert shown.startswith(f"**Winner of [the sweep]({parent})**, registered as [version 3 of small](#/models/")
    assert "= 93,700 of 100,000" in shown and "confusion_matrix.png" in shown and "mistakes.json" in shown
    overtaken = winner_description(result(), page, ANSWER_FIGURES, TRIALS[7])
    assert overtaken.startswith(f"**Won [the sweep]({parent}) once**") and "registered" not in overtaken


# The model and its versions ------------------------------------------------------------------------------------------

TAGS = {
    "trial": "t0011",
    "sweep": "small",
    "study": "small-2",
    "base_hub_id": "sentence-transformers/all-MiniLM-L6-v2",
    "base_revision": "c9745ed1",
    "budget": "100000",
    "trainable_parameters": "93700",
    "data_digest": "4aba46d1",
    "validation_accuracy": "0.893",
    "validation_rows": "1000",
    "data": '{"source": "newswire", "rows": "10000"}',
}
SCORE = {
    "test_accuracy": "0.899",
    "test_macro_f1": "0.898",
    "test_rows": "4000",
    "test_accuracy_low": "0.889",
    "test_accuracy_high": "0.908",
}


def version(**tags: str) -> Version:
    return Version("small", 1, "run", TAGS | tags, ())


@pytest.mark.parametrize(
    ("tags", "first", "checks"),
    [
        ({}, "Not checked yet: validation accuracy 89.30", "not made yet"),
        (
            {"promotion": "failed"},
            "Refused by the promotion checks: validation accuracy 89.30",
            "**refused**, [report](",
        ),
        ({"promotion": "passed", **SCORE}, "Passed the promotion checks: test accuracy 89.90", "**passed**, [report]("),
    ],
)
def test_a_version_says_how_it_was_judged_and_where_it_comes_from(
    tags: dict[str, str], first: str, checks: str
) -> None:
    shown = version_description(version(**tags), page("run"), page("parent"))
    assert shown.startswith(first) and checks in shown
    assert shown.splitlines()[0].endswith("93,700 of 100,000 trainable parameters.")
    assert f"[t0011]({page('run').url})" in shown and f"[small-2]({page('parent').url})" in shown
    assert "source newswire; rows 10000; digest 4aba46d1" in shown
    assert "of study small-2, sweep" in version_description(version(**tags), page("run"), None)


def test_a_version_shows_its_confirmation() -> None:
    tags = {"confirmation_seeds": "3", "confirmation_mean_accuracy": "0.9", "confirmation_low_accuracy": "0.88"}
    tags["confirmation_high_accuracy"] = "0.92"
    shown = version_description(version(**tags), page("run"), None)
    assert f"mean accuracy 90.00{NBSP}% over 3 seeds (95&nbsp;% interval 88.00{NBSP}% to 92.00{NBSP}%)" in shown


def test_a_model_says_what_its_aliases_are_for() -> None:
    shown = model_description("small", facts())
    assert all(f"- `{alias}`" in shown for alias in ("champion", "candidate", "previous"))


# Texts from data -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_no_text_makes_a_line_a_cell_or_a_mention(given_text: str) -> None:
    shown = plain(given_text)
    assert len(shown.splitlines()) <= 1
    assert "@" not in shown and ":" not in shown
    assert "|" not in shown.replace("\\|", "")


def test_no_description_lets_a_text_from_data_through() -> None:
    tags = dict.fromkeys(("trial", "sweep", "study", "base_hub_id", "base_revision", "data_digest"), HOSTILE)
    data = json.dumps({"source": HOSTILE})
    spoiled = facts(base=HOSTILE, sweep=HOSTILE, experiment=HOSTILE)
    shown = [
        told(result(facts=spoiled, trials=tuple(replace(row, trial=HOSTILE) for row in TRIALS))),
        opening_description(spoiled, STEPS, LINKS),
        winner_description(result(registration=Registration(HOSTILE, 1, ())), page, {}),
        model_description(HOSTILE, spoiled),
        version_description(version(**tags, data=data), page("run"), page("parent")),
        trial_description(SPEC, {"confirms": HOSTILE}, None, ended("FAILED", reason=HOSTILE)),
    ]
    for description in shown:
        outside = re.sub(r"(`+) ?.*?#panic.*? ?\1", "", description)  # a code span shows all texts as they are
        assert "<script>" not in outside and "@winner" not in outside and "*bold*" not in outside.replace("\\*", "")


MARKUP = [
    "a | b || c",
    "`code` and ``more``",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![image](https://example.org/x.png)",
    "*bold* **bold** _slanted_ __x__ ~~gone~~",
    "line\n\n# a heading\n- a list",
    "&lt;b&gt; &amp; &#60;",
    "back\\slash \\| \\`",
    "@someone :bomb: http://example.org www.example.org",
    "\x1b[31mred\x1b[0m \u202egnorw",
]


def read_back(markdown: str) -> str:
    """What a reader of Markdown shows of escaped text."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|~_])", r"\1", markdown))


@pytest.mark.parametrize("hostile", MARKUP)
def test_markup_in_a_text_is_shown_and_not_meant(hostile: str) -> None:
    written = text(hostile)
    assert not re.search(r"(?<!\\)(\\\\)*[`*\[\]|~]|[<>\n\r\x1b\u202e]", written)
    assert not re.search(r"(?<![\\A-Za-z0-9])_", written)
    shown = plain(hostile)
    for meant in ("http://", "https://", "javascript:", "www.", "@", ":bomb:"):
        assert meant not in shown
    assert plain(shown) == shown  # not escaped twice


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


def test_percent_is_held_together_and_unknown_is_a_dash() -> None:
    assert percent(0.893) == f"89.30{NBSP}%" and percent(1.0) == f"100.00{NBSP}%"
    assert percent(None) == percent(float("nan")) == "–"


def test_gallery_shows_two_figures_a_row_each_a_link_to_the_whole_one() -> None:
    lines = gallery(page("run"), {"a.png": "A", "b.png": "B", "c.png": "C"}).splitlines()
    assert len(lines) == 5
    assert lines[0].replace("&emsp;", "") == "| A | B |" and lines[3].startswith("| C")
    for line, names in ((lines[2], "ab"), (lines[4], "c")):
        assert line.count("[![") == len(names)
        for name in names:
            assert f"(get-artifact?path=thumbnails%2F{name}.png&run_uuid=run)" in line
            assert f"(#/experiments/1/runs/run/artifacts/{name}.png?workflowType=machine_learning)" in line


def test_link_keeps_its_label_plain() -> None:
    assert link("a](http://x) b", "#/here") == "[a\\](http&#58;//x) b](#/here)"
    assert link("a", None) == "a"
