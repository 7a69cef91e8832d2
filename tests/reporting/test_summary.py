import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from agnews_lora.reporting.summary import certainty, next_steps, print_summary
from agnews_lora.search.racing import Confirmed, Selection
from agnews_lora.search.results import Registration, SweepResult
from tests.reporting.results import TRIALS, bare, facts, result


def printed(shown: SweepResult, *, width: int = 100, terminal: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=terminal)
    print_summary(console, shown)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def rows(shown: SweepResult) -> dict[str, str]:
    """What the panel says, by the name of the row, without the next commands."""
    lines = [line.strip("│ ") for line in printed(shown).splitlines()[1:-1]]
    found = {
        name.strip(): re.sub(" {2,}", " ", value.strip())
        for name, _, value in (line.partition("  ") for line in lines)
        if value
    }
    return {name: value for name, value in found.items() if not name.startswith("agnews-lora ")}


def test_summary_holds_the_result_and_the_next_commands() -> None:
    candidate = result(registration=Registration("small", 3, ("candidate",)))
    assert "study small-2" in printed(candidate).splitlines()[0]
    assert rows(candidate) == {
        "winner": "t0001 qv r=10 alpha=20 dropout=0.05 lr=0.003",
        "parameters": "93,700 trainable, 93.7% of the budget of 100,000",
        "certainty": "Better than the baseline with a probability of 99.9%.",
        "trials": "5 complete, 2 pruned, 1 failed",
        "wall time": "7 min 30 s of training and evaluation, over all starts",
        "registered": "version 3 of small as candidate",
        "250 validation rows": "accuracy macro-F1",
        "winner t0001": "90.00% 89.00% 95% interval 85.65% to 93.13%",
        "mean of 3 seeds": "89.33% 89.00% 95% interval 84.81% to 92.63%",
        "baseline": "55.20% 54.20% gain +34.80 points",
        "TF-IDF": "81.25% 80.00% with logistic regression",
        "majority class": "25.60% 10.19% always the most common label",
        "best possible": "94.00% –",
    }
    for step in next_steps(candidate):
        assert step.command in printed(candidate)
    promoted = rows(result())
    assert promoted["registered"] == "version 3 of small as champion"
    assert promoted["test, 400 rows"] == "88.75% 88.70% 95% interval 85.28% to 91.49%"


FAILED = ({"rule": "the data must be the champion's", "found": "digest 1", "passed": False},)
PLACES = {"--storage": "sqlite:///a b.db", "--tracking": "http://host:5000", "--workers": "2"}
STATES: dict[str, tuple[SweepResult, list[str]]] = {
    "unfinished": (bare(state="INTERRUPTED"), ["sweep small"]),
    "unfinished, of another size": (
        bare(state="INTERRUPTED", facts=facts(options={"--trials": "4"})),
        ["sweep small --trials 4"],
    ),
    "unfinished, elsewhere": (
        bare(state="INTERRUPTED", facts=facts(file="my sweeps/small.yaml", options=PLACES)),
        ["sweep 'my sweeps/small.yaml' --storage 'sqlite:///a b.db' --tracking http://host:5000 --workers 2"],
    ),
    "without a winner": (bare(trials=TRIALS[2:4]), ["sweep small --new", "ui"]),
    "a candidate": (
        result(registration=Registration("small", 3, ("candidate",))),
        ["promote small", "report small", "ui", "sweep small --trials 18"],
    ),
    "a candidate that was replaced by another": (
        result(registration=Registration("small", 3, ())),
        ["promote small --version 3", "report small", "ui", "sweep small --trials 18"],
    ),
    "a candidate that failed": (
        result(registration=Registration("small", 3, ("candidate",), FAILED)),
        ["sweep small --trials 18", "promote small", "report small", "ui"],
    ),
    "a champion": (
        result(),
        [
            "predict --sweep small 'Oil rose.'",
            "serve small",
            "export small --to exported",
            *("report small", "ui", "sweep small --trials 18"),
        ],
    ),
    "the champion before": (
        result(registration=Registration("small", 3, ("previous",))),
        ["promote small --rollback", "report small", "ui", "sweep small --trials 18"],
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_the_next_steps_follow_the_state_of_the_study(state: str) -> None:
    shown, commands = STATES[state]
    assert [step.command for step in next_steps(shown)] == [f"agnews-lora {command}" for command in commands]


def test_of_a_tracking_server_the_steps_name_it() -> None:
    commands = [step.command for step in next_steps(result(facts=facts(options=PLACES)))]
    assert commands[4] == "http://host:5000"
    assert all("--tracking http://host:5000" in command for command in commands[:4])


def test_summary_leaves_out_what_is_not_known() -> None:
    found = bare(trials=TRIALS[1:3], wall_seconds=None, facts=facts(bound=None, majority_accuracy=None))
    assert list(rows(found)) == ["winner", "parameters", "trials", "250 validation rows", "winner t0001"]


def test_the_interval_of_one_seed_is_that_of_the_rows() -> None:
    found = rows(result(confirmed=(Confirmed(TRIALS[1], ()),)))
    assert found["mean of 1 seed"] == found["winner t0001"] == "90.00% 89.00% 95% interval 85.65% to 93.13%"


def test_it_says_how_sure_the_choice_is() -> None:
    told = certainty(result())
    assert told == [
        "Better than the baseline with a probability of 99.9%.",
        "Better than the runner-up, t0007, with a probability of 92.4%.",
    ]
    shown = " ".join(printed(result(), width=140).split())
    assert f"certainty {' '.join(told)}" in shown.replace(" │ │ ", " ")


def test_where_nothing_separates_trials_it_says_so_and_what_the_smallest_saves() -> None:
    near = Selection("t0007", ("t0007", "t0001"), 0.9499, 0.41)
    smaller = replace(TRIALS[1], trainable_parameters=40_000)
    best = replace(TRIALS[7], trainable_parameters=50_000)
    runs = (Confirmed(smaller, (replace(smaller, accuracy=0.88),)), Confirmed(best, (replace(best, accuracy=0.9),)))
    told = certainty(result(confirmed=runs, selection=near))
    assert told == [
        "Not distinguishable from the baseline: better only with a probability of 94.9%.",
        "Not distinguishable from t0007 (better than t0007 with a probability of 41.0%): chosen as the smallest, with "
        "10,000 (20%) fewer trainable parameters than t0007, the best mean, for 0.20 points less mean accuracy.",
    ]
    mean = replace(near, best_mean="t0001", probability_better_than_runner_up=0.6)
    assert certainty(result(confirmed=runs, selection=mean))[1].endswith("60.0%): chosen for the best mean accuracy.")
    assert certainty(result(selection=None)) == []
    own = Confirmed(TRIALS[0], (TRIALS[0],))
    assert certainty(result(confirmed=(own,), selection=Selection("t0000", ("t0000",), None, None))) == [
        "The winner is the baseline itself."
    ]


def test_with_macro_f1_as_the_objective_it_comes_first_and_the_gain_is_its() -> None:
    found = rows(result(facts=facts(objective="macro_f1")))
    assert found["250 validation rows"] == "macro-F1 accuracy" and found["winner t0001"].startswith("89.00% 90.00% ")
    assert found["mean of 3 seeds"].startswith("89.00% 89.33% ") and found["best possible"] == "– 94.00%"
    assert found["majority class"] == "10.19% 25.60% always the most common label"


def test_summary_without_a_winner_says_so() -> None:
    found = rows(bare(trials=TRIALS[2:4]))
    assert found["winner"] == "none: no trial was completed" and "winner t0001" not in found


def test_a_winner_below_the_baseline_is_not_called_better() -> None:
    worse = bare(trials=(TRIALS[0], replace(TRIALS[1], accuracy=0.542)), confirmed=(Confirmed(TRIALS[1], ()),))
    worse = replace(worse, confirmed=(Confirmed(worse.trials[1], ()),))
    assert rows(worse)["baseline"] == "55.20% 54.20% gain -1.00 points"


@pytest.mark.parametrize("width", [30, 60, 80])
@pytest.mark.parametrize("terminal", [True, False])
def test_summary_fits_the_console(width: int, terminal: bool) -> None:
    text = printed(result(), width=width, terminal=terminal)
    assert ("\x1b" in text) == terminal
    if not terminal:
        assert max(len(line) for line in text.splitlines()) <= width
