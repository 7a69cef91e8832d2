import pytest

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.commands.board import result_metrics
from agnews_lora.search.standings import Standing

SPEC = TrialSpec("qv", 2, 4.0, 0.1, 1e-3)


def standing(number: int, state: str, accuracy: float | None, *, baseline: bool = False) -> Standing:
    loss = None if state != "COMPLETE" else 0.5
    return Standing(
        f"t{number:04d}", number, state, SPEC, baseline, accuracy, loss, float("nan"), 10_000, f"run{number}", None
    )


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
