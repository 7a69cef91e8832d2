"""The screen of trials in training: a live table on a terminal, plain lines everywhere else.

Trials that started or ended are lines, and stay; the table below them shows the trials that run now.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from agnews_lora.training.interface import SCORES, EvalPoint, Objective, TrainPoint

REFRESHES_PER_SECOND: Final = 2
# The table's columns, and how wide a terminal must be to show each. The objective has one at any width.
COLUMNS: Final = {
    "trial": 0,
    "configuration": 78,
    "step": 0,
    "loss": 50,
    "accuracy": 60,
    "macro-F1": 60,
    "best": 90,
    "left": 65,
}
LINES_BESIDE: Final = 4  # of a terminal's height: the two headers, how many more there are, and the cursor
LEAST_SHARE: Final = 0.05  # of the work: before that, an estimate of the time left would jump about
# What the end of a trial is called, and its style, by state.
ENDS: Final = {
    "COMPLETE": ("complete", "green"),
    "PRUNED": ("pruned", "yellow"),
    "FAIL": ("failed", "red"),
    "INTERRUPTED": ("interrupted", "magenta"),
}


@dataclass
class _Running:
    """A trial in training. began, first_step: of this process, for the estimate of its time left."""

    label: str
    total_steps: int
    confirms: bool
    began: float
    first_step: int | None = None
    step: int = 0
    loss: float | None = None
    scores: EvalPoint | None = None
    best: float | None = None

    def reached(self, step: int, now: float) -> None:
        if self.first_step is None:
            self.first_step, self.began = step, now
        self.step = max(self.step, step)

    @property
    def steps_here(self) -> int:
        return self.step - (self.first_step or 0)

    def cells(self, name: str, now: float) -> dict[str, str]:
        """Texts by column."""
        left = (self.total_steps - self.step) * (now - self.began) / self.steps_here if self.steps_here else None
        return {
            "trial": name,
            "configuration": self.label,
            "step": f"{self.step}/{self.total_steps}",
            "loss": "-" if self.loss is None else f"{self.loss:.3f}",
            **{word: f"{self.scores.score(name):.2%}" if self.scores else "-" for name, word in SCORES.items()},
            "best": "-" if self.best is None else f"{self.best:.2%}",
            "left": "-" if left is None else duration(left),
        }


class _Live(Live):
    """A live display that stays in place when the terminal is made narrower.

    The terminal wraps the lines that are on it then, so that they take more lines than rich would clear.
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
    """The screen of a study, or of one training, while it runs. Use it as a context manager.

    Args:
        total_trials: how many are to end in all.
        objective: the score by which one is the best.
        ended, complete: how many had ended before, and how many of those were complete.
        best, best_trial: the best complete one so far.
        confirmation: how many of the best are repeated, and the runs of each. Among repetitions there is no best.
        repeated: how many repetitions had ended before.
        console: the standard output unless given.
        clock: seconds.
    """

    def __init__(
        self,
        total_trials: int,
        *,
        objective: Objective = "accuracy",
        ended: int = 0,
        complete: int = 0,
        best: float | None = None,
        best_trial: str | None = None,
        confirmation: tuple[int, int] | None = None,
        repeated: int = 0,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        # Asked of the file itself: to rich, FORCE_COLOR makes a terminal of a log.
        animated = self._console.file.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal
        self.mode: Literal["live", "lines", "quiet"] = "quiet" if quiet else "live" if animated else "lines"
        self._total_trials, self._objective, self._confirmation = total_trials, objective, confirmation
        self._ended, self._complete, self._repeated = ended, complete, repeated
        self._ended_before = ended + repeated
        self._confirms = repeated > 0
        self._best, self._best_trial = best, best_trial
        self._clock, self._began = clock, clock()
        self._running: dict[str, _Running] = {}
        # Its thread redraws a few lines twice a second, so that times go on while nothing happens.
        self._live = _Live(self, console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        if self.mode == "live":
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()  # also gives the cursor back

    def trial_started(self, trial: str, label: str, total_steps: int, confirms: bool = False) -> None:
        """Show a trial that started or was resumed. label: its configuration. confirms: it is a repetition."""
        if confirms and not self._confirms:
            self._confirms = True
            self.announce("Confirming the best trials: each is trained again with other seeds.")
        self._running[trial] = _Running(label, total_steps, confirms, self._clock())
        if self.mode == "lines":
            self.announce(f"{trial} started: {label}, {total_steps} steps")

    def logged(self, points: Sequence[TrainPoint]) -> None:
        """Show training losses."""
        for point in points:
            running = self._running[point.trial]
            running.reached(point.step, self._clock())
            running.loss = point.loss

    def evaluated(self, points: Sequence[EvalPoint]) -> None:
        """Show validation scores."""
        for point in points:
            running = self._running[point.trial]
            running.reached(point.step, self._clock())
            running.scores, running.best = point, max(point.score(self._objective), running.best or 0.0)
            if self.mode == "lines":
                loss = "" if running.loss is None else f"  loss {running.loss:.3f}"
                step = f"{point.trial} step {point.step}/{running.total_steps}"
                self.announce(f"{step}{loss}{_said(point)}")

    def trial_ended(self, trial: str, state: str, scores: EvalPoint | None, reason: str | None) -> None:
        """Show the end of a trial.

        Args:
            state: Optuna's, or `INTERRUPTED`.
            scores: final, or the last ones of a pruned trial.
        """
        running = self._running.pop(trial)
        label = running.label
        if running.confirms:
            self._repeated += state != "INTERRUPTED"
        else:
            self._ended += state != "INTERRUPTED"
            self._complete += state == "COMPLETE"
        score = scores.score(self._objective) if scores else -1.0
        better = score > (-1.0 if self._best is None else self._best)
        if best := state == "COMPLETE" and better and not running.confirms:
            self._best, self._best_trial = score, trial
        word, style = ENDS[state]
        line = Text(f"{trial} ").append(word, style=style)
        if scores is not None:
            line.append(f"{_said(scores)}{'  best so far' if best else ''}")
        line.append(f"  {label}" if self.mode == "live" else "").append(f"  {reason}" if reason else "")
        if running.confirms:
            line.append(f"  [confirmation {self._repeated}/{self._repetitions}]")
        else:
            line.append(f"  [{self._ended}/{self._total_trials}]")
        self.announce(line)

    def announce(self, text: str | Text) -> None:
        """Print a line that stays."""
        if self.mode != "quiet":
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def planned(self, total_trials: int) -> None:
        """Count to another total: a person enqueued trials on top."""
        self._total_trials = total_trials

    def message(self, text: str) -> None:
        """Print a warning; a quiet screen passes it on to the standard error."""
        if self.mode == "quiet":
            print(f"agnews-lora: {text}", file=sys.stderr, flush=True)
        else:
            self.announce(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now, running = self._clock(), dict(self._running)  # the drawing thread is another one
        yield self._header(now, list(running.values()))
        rows = [trial.cells(name, now) for name, trial in running.items()]
        shown = rows[: max(1, options.size.height - LINES_BESIDE)]
        if shown:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            least_widths = COLUMNS | {SCORES[self._objective]: 0}
            columns = [column for column, least_width in least_widths.items() if options.max_width >= least_width]
            for column in columns:
                text = column in ("trial", "configuration")
                # Only a column that may wrap is narrowed by rich; its texts do not wrap, but end in an ellipsis.
                table.add_column(column, justify="left" if text else "right", no_wrap=column != "configuration")
            for row in shown:
                table.add_row(*(Text(row[column], overflow="ellipsis", no_wrap=True) for column in columns))
            yield table
        if len(rows) > len(shown):
            yield Text(f"and {len(rows) - len(shown)} more", style="dim")

    def _header(self, now: float, running: Sequence[_Running]) -> Text:
        parts = [f"trials {self._ended}/{self._total_trials}"]
        if self._confirms:
            parts.append(f"confirmation {self._repeated}/{self._repetitions}")
        if self._best is not None:
            parts.append(
                f"best {SCORES[self._objective]} {self._best:.2%}"
                + (f" ({self._best_trial})" if self._best_trial else "")
            )
        parts.append(f"elapsed {duration(now - self._began)}")
        # The pace of this process: trials that ended in it, and what it did of those that run.
        ended, total = self._ended + self._repeated, self._total_trials + self._repetitions
        done = ended - self._ended_before + sum(trial.steps_here / trial.total_steps for trial in running)
        if done >= LEAST_SHARE:
            left = total - ended - sum(trial.step / trial.total_steps for trial in running)
            parts.append(f"about {duration(max(0.0, left) * (now - self._began) / done)} left")
        return Text("  ".join(parts), style="bold", overflow="ellipsis", no_wrap=True)

    @property
    def _repetitions(self) -> int:
        """How many there will be in all, if the trials that are left complete."""
        if self._confirmation is None:
            return self._repeated
        best, seeds = self._confirmation
        complete = self._complete + max(0, self._total_trials - self._ended)
        return max(self._repeated, min(best, complete) * (seeds - 1))


def _said(scores: EvalPoint) -> str:
    return "".join(f"  {word} {scores.score(name):.2%}" for name, word in SCORES.items()) + f"  ({scores.rows:,} rows)"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
