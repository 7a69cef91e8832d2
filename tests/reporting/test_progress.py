import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting.progress import Progress, duration
from agnews_lora.search.trials import TrialSummary
from agnews_lora.training.interface import EvalPoint, TrainPoint

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(StringIO):
    """What says that it is one."""

    def isatty(self) -> bool:
        return True


def terminal(width: int = 100) -> Console:
    return Console(file=Terminal(), width=width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})


def pipe() -> Console:
    return Console(file=StringIO(), width=30, force_terminal=False, _environ={})


def output(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def screen(progress: Progress, width: int = 100) -> list[str]:
    """The lines of the live table as they stand."""
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(progress)
    blank, *lines = (line.rstrip() for line in output(console).splitlines())
    assert blank == ""
    return lines


def trained(trial: str, step: int, loss: float) -> list[TrainPoint]:
    return [TrainPoint(trial, step, loss, 1e-4, 0)]


def scored(trial: str, step: int, accuracy: float, *, final: bool = False) -> list[EvalPoint]:
    return [EvalPoint(trial, step, accuracy, accuracy - 0.1, 0.5, 2_000, final, 0)]


def ended(trial: str, accuracy: float) -> EvalPoint:
    """Its last scores."""
    return scored(trial, 100, accuracy, final=True)[0]


def spec(targets: str, rank: int) -> TrialSpec:
    return TrialSpec(targets, rank, alpha=16, dropout=0.169, learning_rate=0.00147)


SAID = "alpha=16 dropout=0.169 lr=0.00147"


def row(trial: str, accuracy: float, *, state: str = "COMPLETE", baseline: bool = False) -> TrialSummary:
    """A trial that had ended before."""
    scores = {"accuracy": accuracy, "macro_f1": accuracy, "loss": 0.5}
    return TrialSummary(trial, int(trial[1:]), state, baseline, spec("qk", 4), **scores, **UNKNOWN)  # type: ignore[arg-type]


UNKNOWN = {"trainable_parameters": None, "seed": None, "run_id": None, "reason": None, "steps": 100}


def one_study(progress: Progress) -> None:
    progress.announce("study embedded: 12 trials")
    progress.trial_started("t0000", spec("qk", 4), 100, baseline=True)
    progress.logged(trained("t0000", 50, 0.9))
    progress.evaluated(scored("t0000", 50, 0.7))
    progress.trial_ended("t0000", "COMPLETE", ended("t0000", 0.75), None)
    progress.trial_started("t0001", spec("qv", 8), 100)
    progress.evaluated(scored("t0001", 50, 0.6))
    progress.trial_ended("t0001", "PRUNED", ended("t0001", 0.6), "below the median")
    progress.trial_started("t0002", spec("ffn", 2), 100)
    progress.trial_ended("t0002", "FAIL", None, "the loss is [not] finite")
    progress.trial_started("t0003", spec("qkv", 2), 100)
    progress.trial_ended("t0003", "INTERRUPTED", None, "goes on from step 50")


def dumb_terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, _environ={"TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize("made", [pipe, dumb_terminal])
def test_a_pipe_gets_one_plain_line_an_event_however_narrow(made: Callable[[], Console]) -> None:
    console = made()
    with Progress(total_trials=12, console=console) as progress:
        one_study(progress)
    assert output(console).splitlines() == [
        "study embedded: 12 trials",
        f"t0000 started: qk r=4 {SAID} (baseline), 100 steps",
        "t0000 step 50/100  loss 0.900  accuracy 70.00%  macro-F1 60.00%  (2,000 rows)",
        "t0000 complete  accuracy 75.00%  macro-F1 65.00%  (2,000 rows)  best so far  [1/12]",
        f"t0001 started: qv r=8 {SAID}, 100 steps",
        "t0001 step 50/100  accuracy 60.00%  macro-F1 50.00%  (2,000 rows)",
        "t0001 pruned  accuracy 60.00%  macro-F1 50.00%  (2,000 rows)  below the median  [2/12]",
        f"t0002 started: ffn r=2 {SAID}, 100 steps",
        "t0002 failed  the loss is [not] finite  [3/12]",
        f"t0003 started: qkv r=2 {SAID}, 100 steps",
        "t0003 interrupted  goes on from step 50  [3/12]",
    ]


def test_a_terminal_keeps_the_ended_trials_above_the_table_and_clears_the_table() -> None:
    console = terminal(132)
    with Progress(total_trials=12, console=console) as progress:
        one_study(progress)
        progress.trial_started("t0004", spec("qkvo", 1), 100)
        console.print("from elsewhere")
    written = output(console)
    assert f"t0000    complete  accuracy 75.00%  macro-F1 65.00%  (2,000 rows)  qk r=4 {SAID} (baseline)" in written
    assert f"t0001    pruned    accuracy 60.00%  macro-F1 50.00%  (2,000 rows)  qv r=8 {SAID}" in written
    assert f"t0002    failed    ffn r=2 {SAID}\n  the loss is [not] finite" in written
    assert "step 50/100" not in written
    assert re.search(r"t0004 +qkvo +1 .* 0/100", written)  # the table, redrawn under what others print


def test_the_lines_that_stay_fit_80_columns() -> None:
    console = terminal(80)
    with Progress(total_trials=12, console=console) as progress:
        for trial in ("t0000", "t0001-s2"):
            progress.trial_started(trial, spec("all-linear", 10), 100, baseline=True)
            progress.trial_ended(trial, "PRUNED", ended(trial, 0.75), "below the median")
    kept = re.findall(r"t000\S+ +pruned.*", re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]|\r", "", output(console)))
    assert len(kept) == 2 and max(map(len, kept)) <= 80


def test_no_color_is_obeyed_on_a_terminal() -> None:
    def written(environment: dict[str, str]) -> str:
        console = Console(
            file=Terminal(),
            width=80,
            force_terminal=True,
            color_system="256",
            _environ={"TERM": "xterm", **environment},
        )
        with Progress(total_trials=12, console=console) as progress:
            one_study(progress)
        return output(console)

    green = "\x1b[32m"
    assert green in written({})
    assert green not in written({"NO_COLOR": "1"})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_cursor_comes_back_whatever_happens(error: type[BaseException]) -> None:
    console = terminal()
    with pytest.raises(error), Progress(total_trials=12, console=console) as progress:
        progress.trial_started("t0000", spec("qk", 4), 100)
        raise error
    assert output(console).rindex(SHOW_CURSOR) > output(console).rindex(HIDE_CURSOR)


@pytest.mark.parametrize("made", [terminal, pipe])
def test_quiet_says_nothing_but_warnings_on_the_standard_error(
    made: Callable[[], Console], capsys: pytest.CaptureFixture[str]
) -> None:
    console = made()
    with Progress(12, console=console, quiet=True) as progress:
        one_study(progress)
        progress.message("a worker died by SIGKILL")
    assert output(console) == ""
    assert capsys.readouterr() == ("", "agnews-lora: a worker died by SIGKILL\n")


def test_repetitions_are_counted_on_their_own_and_none_is_the_best() -> None:
    console, clock = pipe(), Clock()
    before = [row(f"t{number:04d}", 0.8, state="COMPLETE" if number < 2 else "PRUNED") for number in range(7)]
    progress = Progress(8, ended=before, num_confirmed=3, console=console, clock=clock)
    progress.trial_started("t0007", spec("qv", 8), 100)
    progress.trial_started("t0004-s2", spec("qv", 8), 100, confirms=True)
    assert screen(progress)[0] == "trials 7/8: 2 complete, 5 pruned, 0 failed  confirmation 0/3"
    progress.trial_ended("t0004-s2", "COMPLETE", ended("t0004-s2", 0.9), None)
    clock.now = 50
    progress.trial_ended("t0007", "PRUNED", ended("t0007", 0.7), None)
    # The search has two complete trials, so that one repetition is left for sure; two trials took 50 seconds.
    assert screen(progress)[:2] == [
        "trials 8/8: 2 complete, 6 pruned, 0 failed  confirmation 1/2",
        "elapsed 50 s, under 1 min left",
    ]
    progress.planned(4, confirms=True)  # another round
    assert screen(progress)[:2] == [
        "trials 8/8: 2 complete, 6 pruned, 0 failed  confirmation 1/4",
        "elapsed 50 s, about 2 min left",
    ]
    assert output(console).splitlines() == [
        f"t0007 started: qv r=8 {SAID}, 100 steps",
        "Confirming the best trials: they race over more seeds.",
        f"t0004-s2 started: qv r=8 {SAID}, 100 steps",
        "t0004-s2 complete  accuracy 90.00%  macro-F1 80.00%  (2,000 rows)  [confirmation 1/3]",
        "t0007 pruned  accuracy 70.00%  macro-F1 60.00%  (2,000 rows)  [8/8]",
    ]


@pytest.mark.parametrize("width", [99, 60, 31])
def test_a_terminal_made_narrower_is_cleared_of_all_that_it_wrapped(width: int) -> None:
    console = terminal()
    with Progress(total_trials=12, console=console) as progress:
        for number in range(3):
            progress.trial_started(f"t{number:04d}", spec("all-linear", 2), 100)
        progress._live.refresh()
        drawn = screen(progress)
        wrapped = 1 + sum(-(-len(line) // width) for line in drawn)
        console.size = (width, 25)
        before = len(output(console))
        progress._live.refresh()
        redrawn = output(console)[before:]
    assert redrawn.count("\x1b[1A") == wrapped - 1  # from the frame's last line up to its first
    assert all(len(line) <= width for line in re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", redrawn).splitlines())


@pytest.mark.parametrize(("height", "shown"), [(50, 40), (24, 18), (10, 4), (3, 1)])
def test_more_trials_than_lines(height: int, shown: int) -> None:
    progress = Progress(total_trials=100, console=pipe())
    for number in range(40):
        progress.trial_started(f"t{number:04d}", spec("qv", 8), 100)
    console = Console(file=StringIO(), width=80, height=height, color_system=None)
    console.print(progress)
    lines = output(console).splitlines()
    assert sum(line.startswith("t0") for line in lines) == shown
    assert (lines[-1].strip() == f"and {40 - shown} more") == (shown < 40)
    assert len(lines) <= max(height - 1, 6)


def test_the_table_shows_what_runs_and_the_three_best() -> None:
    before = [
        row("t0000", 0.81, baseline=True),
        row("t0001", 0.83),
        row("t0002", 0.80),
        row("t0003", 0.9, state="PRUNED"),
    ]
    progress = Progress(total_trials=8, ended=before, link="Run: http://host/run?layout=x", console=pipe())
    progress.trial_started("t0004", spec("qv", 8), 100)
    progress.trial_started("t0005", spec("ffn", 2), 100)
    progress.logged(trained("t0004", 10, 1.25))
    progress.evaluated(scored("t0004", 40, 0.84))
    counts, _, columns, first, second, heading, *best, link = (line.split() for line in screen(progress, 120))
    assert counts == ["trials", "4/8:", "3", "complete,", "1", "pruned,", "0", "failed"]
    assert columns == ["running", "targets", "rank", "alpha", "dropout", "lr", "step", "loss", "accuracy", "macro-F1"]
    assert [word for word in first if "━" not in word] == [
        *("t0004", "qv", "8", "16", "0.169", "0.00147", "40/100", "1.250", "84.00%", "74.00%")
    ]
    assert second[-4:] == ["0/100", "-", "-", "-"]
    assert heading == ["best", "so", "far"]
    assert [(line[0], line[-2]) for line in best] == [("t0001", "83.00%"), ("t0000", "81.00%"), ("t0002", "80.00%")]
    assert best[1][1] == "baseline" and link == ["Run:", "http://host/run?layout=x"]
    progress.trial_ended("t0004", "COMPLETE", ended("t0004", 0.82), None)
    progress.trial_ended("t0005", "PRUNED", ended("t0005", 0.99), "a pruned trial is never among the best")
    counts, _, _, *best, _ = (line.split() for line in screen(progress, 120))
    assert counts == ["trials", "6/8:", "4", "complete,", "2", "pruned,", "0", "failed"]
    assert [line[0] for line in best] == ["t0001", "t0004", "t0000"]


def test_a_trial_at_its_last_step_evaluates_until_it_has_its_final_scores() -> None:
    progress = Progress(total_trials=1, console=pipe())
    progress.trial_started("t0000", spec("qv", 8), 100)
    progress.evaluated(scored("t0000", 50, 0.8))
    assert "50/100" in screen(progress)[-1]
    progress.logged(trained("t0000", 100, 1.0))
    assert " evaluating " in screen(progress)[-1] and "100/100" not in screen(progress)[-1]
    progress.evaluated(scored("t0000", 100, 0.8, final=True))
    assert "100/100" in screen(progress)[-1]


def test_the_time_left_is_that_of_the_pace_and_of_the_slowest_trial() -> None:
    clock = Clock()
    progress = Progress(total_trials=4, console=pipe(), clock=clock)
    clock.now = 100  # loading counts as elapsed, and is no pace
    for number in range(2):
        progress.trial_started(f"t{number:04d}", spec("qv", 8), 100)
        progress.logged(trained(f"t{number:04d}", 0, 1.0))
    assert screen(progress)[1] == "elapsed 1 min 40 s"
    clock.now = 160
    for number in range(2):
        progress.logged(trained(f"t{number:04d}", 50, 1.0))
    # A whole trial took a minute: three are left.
    assert screen(progress)[1] == "elapsed 2 min 40 s, about 3 min left"
    for number in range(2):
        progress.trial_ended(f"t{number:04d}", "PRUNED", None, None)
    for number in range(2, 4):
        progress.trial_started(f"t{number:04d}", spec("qv", 8), 100)
        progress.logged(trained(f"t{number:04d}", 0, 1.0))
    progress.trial_ended("t0002", "FAIL", None, None)
    clock.now = 400
    progress.logged(trained("t0003", 20, 1.0))
    # The study's pace would say 4 minutes; the one trial that is left needs four times what a fifth of it took.
    assert screen(progress)[1].endswith("about 16 min left")
    clock.now = 430
    progress.logged(trained("t0003", 90, 1.0))
    assert screen(progress)[1].endswith("under 1 min left")


@pytest.mark.parametrize("width", [44, 110])
def test_the_best_is_the_best_by_the_objective_which_is_shown_at_any_width(width: int) -> None:
    progress = Progress(total_trials=4, objective="macro_f1", console=pipe())
    for trial, accuracy, macro_f1 in (("t0000", 0.9, 0.5), ("t0001", 0.8, 0.7)):
        progress.trial_started(trial, spec("qv", 8), 100)
        progress.trial_ended(trial, "COMPLETE", replace(ended(trial, accuracy), macro_f1=macro_f1), None)
    progress.trial_started("t0002", spec("qv", 8), 100)
    _, _, columns, _, _, best, _ = screen(progress, width)
    assert best.startswith("t0001") and best.endswith("70.00%")
    assert "macro-F1" in columns and ("accuracy" in columns) == (width == 110)


def test_a_trial_taken_up_again_is_timed_by_what_it_does_now() -> None:
    clock = Clock()
    progress = Progress(total_trials=1, console=pipe(), clock=clock)
    progress.trial_started("t0000", spec("qv", 8), 1000)
    clock.now = 20
    progress.logged(trained("t0000", 600, 1.0))  # the first point after its checkpoint
    clock.now = 220
    progress.logged(trained("t0000", 800, 1.0))
    assert screen(progress)[1].endswith("about 4 min left")


@pytest.mark.parametrize("width", [10, 20, 42, 50, 60, 65, 78, 80, 90, 120, 200])
def test_table_fits_any_terminal(width: int) -> None:
    progress = Progress(total_trials=12, ended=[row("t0002", 0.881, baseline=True)], console=pipe())
    for number in range(3):
        progress.trial_started(f"t000{number}-s2", spec("all-linear", 10), 10_125, baseline=number == 0)
        progress.logged(trained(f"t000{number}-s2", 9_000, 1.0))
        progress.evaluated(scored(f"t000{number}-s2", 10_000, 0.9))
    lines = screen(progress, width)
    assert len(lines) == 8  # nothing wraps
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert not any("…" in line for line in lines)
        assert all(
            word in lines[5] for word in ("t0002", "all-linear", "16", "0.169", "0.00147", "10000/10125", "90.00%")
        )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3_599.7, "1 h 00 min"),
        (7_620, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
