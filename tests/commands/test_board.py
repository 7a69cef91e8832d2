from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.commands.board import PAUSE_SECONDS, result_metrics, stretches
from agnews_lora.search.standings import Standing

SPEC = TrialSpec("qv", 2, 4.0, 0.1, 1e-3)


def standing(number: int, state: str, accuracy: float | None, *, baseline: bool = False) -> Standing:
    loss = None if state != "COMPLETE" else 0.5
    return Standing(
        f"t{number:04d}", number, state, SPEC, baseline, accuracy, loss, float("nan"), 10_000, f"run{number}", None
    )


def test_a_trial_that_was_stopped_and_resumed_trained_twice() -> None:
    times = {"t0000": [0.0, 5.0, 10.0, 500.0, 505.0], "t0001": [12.0, 13.0], "t0002": []}
    states = {"t0000": "COMPLETE", "t0001": "PRUNED", "t0002": "FAIL"}
    frame = stretches(times, states)
    assert frame.values.tolist() == [
        ["t0000", 0.0, 10.0, "STOPPED"],
        ["t0000", 500.0, 505.0, "COMPLETE"],
        ["t0001", 12.0, 13.0, "PRUNED"],
    ]


def test_a_slow_trial_is_not_taken_for_a_stopped_one() -> None:
    signs = [100.0 * number for number in range(10)]
    assert len(stretches({"t0000": [*signs, 1_600.0]}, {"t0000": "COMPLETE"})) == 1


def test_a_study_without_a_run_has_no_stretch() -> None:
    frame = stretches({}, {})
    assert frame.empty and frame.columns.tolist() == ["trial", "began", "ended", "state"]


@given(st.lists(st.floats(0, 10 * PAUSE_SECONDS), min_size=1, max_size=30))
def test_stretches_are_ordered_and_hold_every_sign(gaps: list[float]) -> None:
    signs = list(accumulate(gaps))
    frame = stretches({"t0000": signs}, {"t0000": "PRUNED"})
    assert frame["began"].iloc[0] == signs[0] and frame["ended"].iloc[-1] == signs[-1]
    assert (frame["began"] <= frame["ended"]).all()
    assert (frame["began"].to_numpy()[1:] > frame["ended"].to_numpy()[:-1]).all()
    assert frame["state"].tolist() == ["STOPPED"] * (len(frame) - 1) + ["PRUNED"]
    for sign in signs:
        assert ((frame["began"] <= sign) & (sign <= frame["ended"])).any()


def test_metrics_of_a_study_leave_out_what_is_unknown() -> None:
    rows = [standing(0, "COMPLETE", 0.2, baseline=True), standing(1, "COMPLETE", 0.9), standing(2, "PRUNED", 0.4)]
    assert result_metrics([*rows, standing(3, "FAIL", None)], rows[1]) == pytest.approx(
        {
            "trials/complete": 2,
            "trials/pruned": 1,
            "trials/failed": 1,
            "best/accuracy": 0.9,
            "best/loss": 0.5,
            "best/trainable_parameters": 10_000,
            "baseline/accuracy": 0.2,
            "best/gain": 0.7,
        }
    )
    assert result_metrics(rows[2:], None) == {"trials/complete": 0, "trials/pruned": 1, "trials/failed": 0}
