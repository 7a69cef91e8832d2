from pathlib import Path

import pytest

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.commands.cards import model_card, trial_card, version_card, winner_card
from agnews_lora.search.standings import Standing
from agnews_lora.search.trial_log import End
from agnews_lora.tracking.registry import Version
from agnews_lora.tracking.runs import RunPage
from agnews_lora.training.interface import EvalPoint, TrialResult

SPEC = TrialSpec("ffn", 4, 4.0, 0.142, 0.00356)
PAGE = RunPage(None, "1", "ab" * 16)  # type: ignore[arg-type]
PARENT = RunPage(None, "1", "cd" * 16)  # type: ignore[arg-type]
FACTS = {"trainable_parameters": 93_700, "seed": 7, "baseline": False}
TAGS = {
    "trial": "t0011",
    "sweep": "embedded",
    "study": "embedded",
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
    "promotion": "passed",
    "test_accuracy": "0.899",
    "test_macro_f1": "0.898",
    "test_rows": "4000",
    "test_accuracy_low": "0.889",
    "test_accuracy_high": "0.908",
    "test_digest": "77ab",
}


def result(final: EvalPoint | None) -> TrialResult:
    return TrialResult("t0011", 80, 80, final, Path("adapter") if final else None, 93_700, 1_280, 15.0, 2.0, 1 << 30)


def version(**tags: str) -> Version:
    return Version("embedded", 1, "ab" * 16, TAGS | tags, ())


def test_a_trial_says_what_it_is_while_it_trains() -> None:
    told = trial_card(SPEC, FACTS, 100_000)
    assert "Under way" in told and "`ffn r=4 alpha=4 dropout=0.142 lr=0.00356`" in told
    assert "93,700 trainable parameters of 100,000 (93.70\N{NO-BREAK SPACE}%)" in told
    assert "never pruned" in trial_card(SPEC, FACTS | {"baseline": True}, 100_000)
    assert "trains t0003 again" in trial_card(SPEC, FACTS | {"confirms": "t0003"}, 100_000)
    assert "of 100,000" not in trial_card(SPEC, FACTS, None)


def test_a_trial_says_how_it_ended() -> None:
    final = EvalPoint("t0011", 80, 0.893, 0.8928, 0.377, 1_000, True, 0)
    complete = trial_card(SPEC, FACTS, 100_000, PAGE, End("COMPLETE", result(final)))
    assert complete.startswith("**Complete**: accuracy **89.30\N{NO-BREAK SPACE}%**")
    assert "on 1,000 validation rows, after 80 steps" in complete and "thumbnails%2Faccuracy_curve.png" in complete
    pruned = trial_card(SPEC, FACTS, 100_000, PAGE, End("PRUNED", result(None), "below the median"))
    assert pruned.startswith("**Pruned**: below the median") and "thumbnails%2Floss_curve.png" in pruned


def test_a_failure_shows_its_reason_as_a_text_and_no_curves() -> None:
    hostile = "out of memory\n\n# <script>alert(1)</script> ![x](http://example.org/x.png) | @someone"
    told = trial_card(SPEC, FACTS, 100_000, PAGE, End("FAILED", None, hostile, "Traceback"))
    first = told.splitlines()[0]
    assert first.startswith("**Failed**: out of memory # &lt;script&gt;")
    assert "http://" not in told and "![" not in told.replace("!\\[", "") and "@" not in told
    assert "thumbnails" not in told


def test_a_winner_says_so_until_another_takes_its_place() -> None:
    row = Standing("t0011", 11, "COMPLETE", SPEC, False, 0.893, 0.377, 0.8928, 93_700, "ab" * 16, None)
    told = winner_card(row, PAGE, PARENT, version(), "1 + 1 = 2")
    assert told.startswith(f"**Winner of [the sweep]({PARENT.url})**, registered as [version 1 of embedded](#/models/")
    assert "1 + 1 = 2" in told and "confusion_matrix.png" in told and "mistakes.json" in told
    assert winner_card(row, PAGE, PARENT, None, "").startswith(f"**Won [the sweep]({PARENT.url}) once**")


@pytest.mark.parametrize(
    ("tags", "first", "checks"),
    [
        ({}, "Not checked yet: validation accuracy 89.30", "not checked yet"),
        ({"promotion": "failed"}, "Failed its promotion checks: validation accuracy 89.30", "**refused**, [report]("),
        (SCORE, "Passed its promotion checks: test accuracy 89.90", "**passed**, [report]("),
    ],
)
def test_a_version_says_how_it_was_checked_and_where_it_comes_from(
    tags: dict[str, str], first: str, checks: str
) -> None:
    told = version_card(version(**tags), PAGE, PARENT)
    assert told.startswith(first) and checks in told
    assert told.splitlines()[0].endswith("93,700 of 100,000 trainable parameters.")
    assert f"[t0011]({PAGE.url})" in told and f"[embedded]({PARENT.url})" in told
    assert "source newswire; rows 10000; digest 4aba46d1" in told
    assert "study embedded" in version_card(version(**tags), PAGE, None)


def test_a_model_says_what_its_aliases_are_for() -> None:
    told = model_card("embedded", "embedded")
    assert all(f"- `{alias}`" in told for alias in ("champion", "candidate", "previous"))
