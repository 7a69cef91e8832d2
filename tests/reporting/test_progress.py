import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from agnews_lora.reporting.progress import Progress, duration
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
    return [line.rstrip() for line in output(console).splitlines()]


def trained(trial: str, step: int, loss: float) -> list[TrainPoint]:
    return [TrainPoint(trial, step, loss, 1e-4, 0)]


def scored(trial: str, step: int, accuracy: float, *, final: bool = False) -> list[EvalPoint]:
    return [EvalPoint(trial, step, accuracy, accuracy - 0.1, 0.5, 2_000, final, 0)]


def ended(trial: str, accuracy: float) -> EvalPoint:
    """Its last scores."""
    return scored(trial, 100, accuracy, final=True)[0]


def one_study(progress: Progress) -> None:
    progress.announce("study embedded: 12 trials")
    progress.trial_started("t0000", "qk r=4 (baseline)", 100)
    progress.logged(trained("t0000", 50, 0.9))
    progress.evaluated(scored("t0000", 50, 0.7))
    progress.trial_ended("t0000", "COMPLETE", ended("t0000", 0.75), None)
    progress.trial_started("t0001", "qv r=8", 100)
    progress.evaluated(scored("t0001", 50, 0.6))
    progress.trial_ended("t0001", "PRUNED", ended("t0001", 0.6), "below the median")
    progress.trial_started("t0002", "ffn r=2", 100)
    progress.trial_ended("t0002", "FAIL", None, "the loss is [not] finite")
    progress.trial_started("t0003", "qkv r=2", 100)
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
        "t0000 started: qk r=4 (baseline), 100 steps",
        "t0000 step 50/100  loss 0.900  accuracy 70.00%  macro-F1 60.00%  (2,000 rows)",
        "t0000 complete  accuracy 75.00%  macro-F1 65.00%  (2,000 rows)  best so far  [1/12]",
        "t0001 started: qv r=8, 100 steps",
        "t0001 step 50/100  accuracy 60.00%  macro-F1 50.00%  (2,000 rows)",
        "t0001 pruned  accuracy 60.00%  macro-F1 50.00%  (2,000 rows)  below the median  [2/12]",
        "t0002 started: ffn r=2, 100 steps",
        "t0002 failed  the loss is [not] finite  [3/12]",
        "t0003 started: qkv r=2, 100 steps",
        "t0003 interrupted  goes on from step 50  [3/12]",
    ]


def test_a_terminal_keeps_the_ended_trials_above_the_table_and_clears_the_table() -> None:
    console = terminal()
    with Progress(total_trials=12, console=console) as progress:
        one_study(progress)
        progress.trial_started("t0004", "qkvo r=1", 100)
        console.print("from elsewhere")
    written = output(console)
    complete = "t0000 complete  accuracy 75.00%  macro-F1 65.00%  (2,000 rows)  best so far  qk r=4 (baseline)  [1/12]"
    assert complete in written
    assert "t0001 pruned  accuracy 60.00%  macro-F1 50.00%  (2,000 rows)  qv r=8  below the median  [2/12]" in written
    assert "step 50/100" not in written
    assert re.search(r"t0004 +qkvo r=1 +0/100", written)  # the table, redrawn under what others print


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
        progress.trial_started("t0000", "qk r=4", 100)
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
    progress = Progress(8, ended=7, complete=2, confirmation=(3, 3), console=console, clock=clock)
    progress.trial_started("t0007", "qv r=8", 100)
    progress.trial_started("t0004-s2", "qv r=8", 100, confirms=True)
    assert screen(progress)[0].startswith("trials 7/8  confirmation 0/6  elapsed")
    progress.trial_ended("t0004-s2", "COMPLETE", ended("t0004-s2", 0.9), None)
    clock.now = 10
    progress.trial_ended("t0007", "PRUNED", ended("t0007", 0.7), None)
    # The search has two complete trials, so that three repetitions are left; two trials took 10 seconds.
    assert screen(progress)[0] == "trials 8/8  confirmation 1/4  elapsed 10 s  about 15 s left"
    assert output(console).splitlines() == [
        "t0007 started: qv r=8, 100 steps",
        "Confirming the best trials: each is trained again with other seeds.",
        "t0004-s2 started: qv r=8, 100 steps",
        "t0004-s2 complete  accuracy 90.00%  macro-F1 80.00%  (2,000 rows)  [confirmation 1/6]",
        "t0007 pruned  accuracy 70.00%  macro-F1 60.00%  (2,000 rows)  [8/8]",
    ]


@pytest.mark.parametrize("width", [99, 60, 31])
def test_a_terminal_made_narrower_is_cleared_of_all_that_it_wrapped(width: int) -> None:
    console = terminal()
    with Progress(total_trials=12, console=console) as progress:
        for number in range(3):
            progress.trial_started(f"t{number:04d}", "all-linear r=2 alpha=16 dropout=0.169 lr=0.00147", 100)
        progress._live.refresh()
        drawn = screen(progress)
        wrapped = sum(-(-len(line) // width) for line in drawn)
        console.size = (width, 25)
        before = len(output(console))
        progress._live.refresh()
        redrawn = output(console)[before:]
    assert redrawn.count("\x1b[1A") == wrapped - 1  # from the frame's last line up to its first
    assert all(len(line) <= width for line in re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", redrawn).splitlines())


@pytest.mark.parametrize(("height", "shown"), [(50, 40), (24, 20), (10, 6), (3, 1)])
def test_more_trials_than_lines(height: int, shown: int) -> None:
    progress = Progress(total_trials=100, console=pipe())
    for number in range(40):
        progress.trial_started(f"t{number:04d}", "qv r=8", 100)
    console = Console(file=StringIO(), width=80, height=height, color_system=None)
    console.print(progress)
    lines = output(console).splitlines()
    assert sum(line.startswith("t0") for line in lines) == shown
    assert (lines[-1].strip() == f"and {40 - shown} more") == (shown < 40)
    assert len(lines) <= max(height - 1, 4)


def test_table_shows_what_runs_and_the_best_so_far() -> None:
    clock = Clock()
    progress = Progress(total_trials=4, ended=1, best=0.81, best_trial="t0000", console=pipe(), clock=clock)
    assert screen(progress) == ["trials 1/4  best accuracy 81.00% (t0000)  elapsed 0 s"]
    progress.trial_started("t0001", "qv r=8 alpha=16", 100)
    progress.trial_started("t0002", "ffn r=2 alpha=2", 100)
    clock.now = 10
    progress.logged(trained("t0001", 10, 1.25))
    clock.now = 40
    progress.evaluated(scored("t0001", 40, 0.84))
    progress.evaluated(scored("t0001", 40, 0.83))
    header, columns, first, second = screen(progress)
    assert columns.split() == ["trial", "configuration", "step", "loss", "accuracy", "macro-F1", "best", "left"]
    # 30 steps took 30 seconds: 60 are left.
    shown = ["t0001", "qv r=8 alpha=16", "40/100", "1.250", "83.00%", "73.00%", "84.00%", "1 min 00 s"]
    assert re.split(r"  +", first) == shown
    assert re.split(r"  +", second) == ["t0002", "ffn r=2 alpha=2", "0/100", "-", "-", "-", "-", "-"]
    # 0.3 of a trial took 40 seconds: 2.6 trials are left.
    assert header == "trials 1/4  best accuracy 81.00% (t0000)  elapsed 40 s  about 5 min 47 s left"
    progress.trial_ended("t0001", "COMPLETE", ended("t0001", 0.86), None)
    progress.trial_ended("t0002", "PRUNED", ended("t0002", 0.99), "a pruned trial is never the best")
    assert screen(progress) == ["trials 3/4  best accuracy 86.00% (t0001)  elapsed 40 s  about 20 s left"]
    progress.trial_started("t0003", "qk r=1", 100)
    progress.trial_ended("t0003", "COMPLETE", ended("t0003", 0.85), None)
    assert screen(progress) == ["trials 4/4  best accuracy 86.00% (t0001)  elapsed 40 s  about 0 s left"]


@pytest.mark.parametrize("width", [44, 100])
def test_the_best_is_the_best_by_the_objective_which_is_shown_at_any_width(width: int) -> None:
    progress = Progress(total_trials=4, objective="macro_f1", console=pipe())
    for trial, accuracy, macro_f1 in (("t0000", 0.9, 0.5), ("t0001", 0.8, 0.7)):
        progress.trial_started(trial, "qv r=8", 100)
        progress.trial_ended(trial, "COMPLETE", replace(ended(trial, accuracy), macro_f1=macro_f1), None)
    progress.trial_started("t0002", "qv r=8", 100)
    header, columns, _ = screen(progress, width)
    assert header.startswith("trials 2/4  best macro-F1 70.00% (t0001)")
    assert "macro-F1" in columns and ("accuracy" in columns) == (width == 100)


def test_a_trial_taken_up_again_is_timed_by_what_it_does_now() -> None:
    clock = Clock()
    progress = Progress(total_trials=1, console=pipe(), clock=clock)
    progress.trial_started("t0000", "qv r=8", 100)
    clock.now = 20
    progress.logged(trained("t0000", 60, 1.0))  # the first point after its checkpoint
    clock.now = 30
    progress.logged(trained("t0000", 80, 1.0))
    assert screen(progress)[-1].endswith(" 10 s")


@pytest.mark.parametrize("width", [10, 20, 42, 50, 60, 65, 78, 80, 90, 120, 200])
def test_table_fits_any_terminal(width: int) -> None:
    progress = Progress(total_trials=12, ended=3, best=0.881, best_trial="t0002", console=pipe())
    for number in range(3):
        progress.trial_started(f"t000{number}", "all-linear r=2 alpha=16 dropout=0.0874 lr=0.00102 (baseline)", 10_125)
        progress.logged(trained(f"t000{number}", 9_000, 1.0))
        progress.evaluated(scored(f"t000{number}", 10_000, 0.9))
    lines = screen(progress, width)
    assert len(lines) == 5  # nothing wraps
    assert max(map(len, lines)) <= width
    assert ("10000/10125" in lines[-1]) == (width >= 42)
    assert ("all-linear" in lines[-1]) == (width >= 78)


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
