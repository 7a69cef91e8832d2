"""What a person sees while trials train: a live table on a terminal, plain lines everywhere else.

Lines stay where they are (what started, what ended); the table below them shows what runs now. Nothing here decides
anything: it is told of events and keeps just enough to show them.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from agnews_lora.training.interface import EvalPoint, TrainPoint

REFRESHES_PER_SECOND: Final = 2
# The table's columns, and how wide a terminal must be to show each.
COLUMNS: Final = {"trial": 0, "configuration": 78, "step": 0, "loss": 50, "accuracy": 0, "best": 42, "left": 65}
COLUMN_SIDES: Final[dict[str, Literal["left"]]] = {"trial": "left", "configuration": "left"}
LINES_BESIDE: Final = 4  # of a terminal's height: the two headers, how many more there are, and the cursor
GAP: Final = 2
SURE_SHARE: Final = 0.05  # of the work: before that, an estimate of the time left would jump about
END_WORDS: Final = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "FAILED": "failed"}
END_STYLES: Final = {"complete": "green", "pruned": "yellow", "failed": "red", "interrupted": "magenta"}

Mode = Literal["live", "lines", "quiet"]


@dataclass
class _Running:
    """A trial in training. began, first_step: where this process took it up, for the estimate of its time left."""

    label: str
    total_steps: int
    began: float
    first_step: int | None = None
    step: int = 0
    loss: float | None = None
    accuracy: float | None = None
    best: float | None = None

    def reached(self, step: int, began: float) -> None:
        if self.first_step is None:
            self.first_step, self.began = step, began
        self.step = max(self.step, step)

    def seconds_left(self, now: float) -> float | None:
        done = self.step - (self.first_step or 0)
        if done <= 0:
            return None
        return max(0.0, (self.total_steps - self.step) * (now - self.began) / done)


class _LiveTable(Live):
    """A live display that stays in place when the terminal is made narrower.

    What is on it then is wrapped by the terminal and takes more lines than rich has drawn, and would clear.
    """

    _width = 0
    _line_widths: tuple[int, ...] = ()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        with self._lock:
            width = self.console.width
            if self._live_render._shape is not None and width < self._width:
                height = sum(max(1, -(-line // width)) for line in self._line_widths)
                self._live_render._shape = (width, height)
            lines = self.console.render_lines(self.get_renderable(), pad=False)
            self._width, self._line_widths = width, tuple(map(Segment.get_line_length, lines))
        return super().process_renderables(renderables)


class Progress:
    """The screen of a study (or of one training) while it runs. Use it as a context manager.

    total_trials: how many are to end in all; None for a worker, which does not know the others' trials. ended: those
    that had before. best, best_trial: the best complete one so far. confirms: whether they are repetitions, among
    which no best is looked for. console: the standard output unless given. clock:
    seconds.
    """

    def __init__(
        self,
        *,
        total_trials: int | None = None,
        ended: int = 0,
        best: float | None = None,
        best_trial: str | None = None,
        confirms: bool = False,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self.mode: Mode = "quiet" if quiet else "live" if animated else "lines"
        self._total_trials = total_trials
        self._ended_before = ended
        self._ended = ended
        self._best = best
        self._best_trial = best_trial
        self._confirms = confirms
        self._clock = clock
        self._began = clock()
        self._running: dict[str, _Running] = {}
        # Its thread redraws a few lines twice a second, so that times go on while nothing happens.
        self._live = _LiveTable(self, console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        if self.mode == "live":
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()  # also gives the cursor back

    # What the runner tells -------------------------------------------------------------------------------------

    def trial_started(self, trial: str, label: str, total_steps: int) -> None:
        """A trial began, or goes on. label: its configuration. total_steps: training steps, if nothing prunes it."""
        self._running[trial] = _Running(label, total_steps, self._clock())
        if self.mode == "lines":
            self._line(f"{trial} started: {label}, {total_steps} steps")

    def logged(self, points: Sequence[TrainPoint]) -> None:
        """Training losses."""
        for point in points:
            running = self._running[point.trial]
            running.reached(point.step, self._clock())
            running.loss = point.loss

    def evaluated(self, points: Sequence[EvalPoint]) -> None:
        """Validation scores."""
        for point in points:
            running = self._running[point.trial]
            running.reached(point.step, self._clock())
            running.accuracy = point.accuracy
            running.best = max(point.accuracy, running.best or 0.0)
            if self.mode == "lines":
                step = f"{point.trial} step {point.step}/{running.total_steps}"
                loss = "" if running.loss is None else f"  loss {running.loss:.3f}"
                self._line(f"{step}{loss}  accuracy {point.accuracy:.2%}")

    def trial_ended(self, trial: str, state: str, accuracy: float | None, reason: str | None) -> None:
        """A trial ended. state: Optuna's, or `INTERRUPTED`. accuracy: final, or the last one of a pruned trial."""
        label = self._running.pop(trial).label
        if state != "INTERRUPTED":
            self._ended += 1
        better = accuracy is not None and (self._best is None or accuracy > self._best)
        best = state == "COMPLETE" and better and not self._confirms
        if best:
            self._best, self._best_trial = accuracy, trial
        word = END_WORDS.get(state, state.lower())
        line = Text(f"{trial} ")
        line.append(word, style=END_STYLES.get(word, ""))
        if accuracy is not None:
            line.append(f"  accuracy {accuracy:.2%}{'  best so far' if best and self._total_trials else ''}")
        line.append(f"  {label}" if self.mode == "live" else "")
        line.append(f"  {reason}" if reason else "")
        if self._total_trials is not None:
            line.append(f"  [{self._ended}/{self._total_trials}]")
        self._line(line)

    def announce(self, text: str) -> None:
        """A line that says what comes next."""
        self._line(text)

    def message(self, text: str) -> None:
        """A warning: what did not go as it should. A quiet screen passes it on to the standard error."""
        if self.mode == "quiet":
            print(f"agnews-lora: {text}", file=sys.stderr, flush=True)
        else:
            self._line(text)

    def _line(self, line: str | Text) -> None:
        if self.mode != "quiet":
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    # The live table ----------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = self._clock()
        running = list(self._running.items())  # the drawing thread is another one
        yield self._header(now, [trial for _, trial in running])
        shown = running[: max(1, options.size.height - LINES_BESIDE)]
        if running:
            yield self._table(shown, options.max_width, now)
        if hidden := len(running) - len(shown):
            yield Text(f"and {hidden} more", style="dim")

    def _header(self, now: float, running: Sequence[_Running]) -> RenderableType:
        of_all = "" if self._total_trials is None else f"/{self._total_trials}"
        parts = [f"{'confirmation' if self._confirms else 'trials'} {self._ended}{of_all}"]
        if self._best is not None:
            parts.append(f"best {self._best:.2%}" + (f" ({self._best_trial})" if self._best_trial else ""))
        parts.append(f"elapsed {duration(now - self._began)}")
        left = self._seconds_left(now, running)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return Text("  ".join(parts), style="bold", overflow="ellipsis", no_wrap=True)

    def _seconds_left(self, now: float, running: Sequence[_Running]) -> float | None:
        """From the pace of this process: trials that ended in it, and the shares of those that run."""
        done_here = sum((trial.step - (trial.first_step or 0)) / trial.total_steps for trial in running)
        done_here += self._ended - self._ended_before
        if done_here < SURE_SHARE or self._total_trials is None:
            return None
        shares = sum(trial.step / trial.total_steps for trial in running)
        remaining = max(0.0, self._total_trials - self._ended - shares)
        return remaining * (now - self._began) / done_here

    def _table(self, running: Sequence[tuple[str, _Running]], width: int, now: float) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        shown = [column for column, least_width in COLUMNS.items() if width >= least_width]
        rows = [_cells(name, trial, now) for name, trial in running]
        taken = {column: max(len(column), *(len(row[column]) for row in rows)) + GAP for column in shown}
        for column in shown:
            room = width - sum(taken.values()) + taken[column] if column == "configuration" else None
            table.add_column(column, justify=COLUMN_SIDES.get(column, "right"), no_wrap=True, max_width=room)
        for row in rows:
            table.add_row(*(Text(row[column], overflow="ellipsis") for column in shown))
        return table


def _cells(name: str, trial: _Running, now: float) -> dict[str, str]:
    left = trial.seconds_left(now)
    return {
        "trial": name,
        "configuration": trial.label,
        "step": f"{trial.step}/{trial.total_steps}",
        "loss": _or_dash(trial.loss, ".3f"),
        "accuracy": _or_dash(trial.accuracy, ".2%"),
        "best": _or_dash(trial.best, ".2%"),
        "left": "-" if left is None else duration(left),
    }


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
