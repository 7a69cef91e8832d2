from io import StringIO

import pytest
from rich.console import Console

from agnews_lora.reporting.summary import SweepSummary, print_summary

FULL = SweepSummary(
    study="embedded",
    num_complete=9,
    num_pruned=2,
    num_failed=1,
    winner="t0007",
    configuration="qv r=8 alpha=16 dropout=0.09 lr=0.001",
    accuracy=0.8912,
    mean_accuracy=0.8871,
    std_accuracy=0.0031,
    num_seeds=3,
    trainable_parameters=75_268,
    budget=100_000,
    baseline_accuracy=0.8231,
    bound=0.945,
    wall_seconds=412,
    registered="embedded version 3 (candidate)",
    next_commands=(("make ui", "see the runs"), ("make promote", "pass the gate")),
)


def printed(summary: SweepSummary, *, width: int = 100, terminal: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=terminal)
    print_summary(console, summary)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def rows(summary: SweepSummary) -> dict[str, str]:
    """What the panel says, by the name of the row."""
    lines = [line.strip("│ ") for line in printed(summary).splitlines()[1:-1]]
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines) if value}


def test_summary_says_what_was_found_and_what_to_type_next() -> None:
    assert "study embedded" in printed(FULL).splitlines()[0]
    assert rows(FULL) == {
        "winner": "t0007  qv r=8 alpha=16 dropout=0.09 lr=0.001",
        "accuracy": "89.12%",
        "confirmed": "88.71% ± 0.31  (mean of 3 seeds)",
        "baseline": "82.31%  (gain +6.81 points)",
        "best possible": "94.50%",
        "parameters": "75,268 trainable, 75.3% of the budget of 100,000",
        "trials": "9 complete, 2 pruned, 1 failed",
        "wall time": "6 min 52 s",
        "registered": "embedded version 3 (candidate)",
        "make ui": "see the runs",
        "make promote": "pass the gate",
    }


def test_summary_leaves_out_what_is_not_known() -> None:
    found = SweepSummary("agnews", 1, 0, 0, winner="t0000", accuracy=0.9, trainable_parameters=5)
    assert rows(found) == {
        "winner": "t0000",
        "accuracy": "90.00%",
        "parameters": "5 trainable",
        "trials": "1 complete, 0 pruned, 0 failed",
    }


def test_one_seed_has_no_spread() -> None:
    alone = SweepSummary("agnews", 1, 0, 0, winner="t0000", accuracy=0.9, mean_accuracy=0.9, num_seeds=1)
    assert rows(alone)["confirmed"] == "90.00%  (mean of 1 seed)"


def test_summary_without_a_winner_says_so() -> None:
    assert rows(SweepSummary("agnews", 0, 2, 1)) == {
        "winner": "none: no trial was completed",
        "trials": "0 complete, 2 pruned, 1 failed",
    }


def test_a_winner_below_the_baseline_is_not_called_better() -> None:
    worse = SweepSummary("agnews", 1, 0, 0, winner="t0000", accuracy=0.8, baseline_accuracy=0.81)
    assert rows(worse)["baseline"] == "81.00%  (gain -1.00 points)"


@pytest.mark.parametrize("width", [30, 60, 80])
@pytest.mark.parametrize("terminal", [True, False])
def test_summary_fits_the_console(width: int, terminal: bool) -> None:
    text = printed(FULL, width=width, terminal=terminal)
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert max(len(line) for line in text.splitlines()) <= width
