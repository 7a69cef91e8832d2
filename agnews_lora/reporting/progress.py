"""The screen of trials in training: a live table on a terminal, plain lines everywhere else.

Trials that started or ended are lines, and stay; the table below them shows the trials that run now, and the best.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search.trials import ENDED_STATES, TrialSummary, best_first
from agnews_lora.training.interface import SCORES, EvalPoint, Objective, TrainPoint

REFRESHES_PER_SECOND: Final = 2
NUM_BEST: Final = 3
# The table's columns, and how wide a terminal must be to show each. The objective has one at any width.
COLUMNS: Final = {
    "trial": 0,
    "targets": 48,
    "rank": 56,
    "alpha": 64,
    "dropout": 78,
    "lr": 78,
    "head": 78,
    "bar": 40,
    "step": 20,
    "loss": 96,
    "accuracy": 106,
    "macro-F1": 106,
}
# Columns of a terminal: room to set those of the table apart, and to name the score. With 16 and 32 more there is room
# for the other score and its rows.
WIDE: Final = 100
LINES_BESIDE: Final = 6  # of a terminal's height: a blank one, three headers, how many more there are, the cursor
LEAST_SHARE: Final = 0.05  # of the work: before that, an estimate of the time left would jump about
# What the end of a trial is called, and its style, by state.
ENDS: Final = {
    "COMPLETE": ("complete", "green"),
    "PRUNED": ("pruned", "yellow"),
    "FAIL": ("failed", "red"),
    "INTERRUPTED": ("interrupted", "magenta"),
}


@dataclass
class _Trial:
    """A trial in training, or one of the best. began, first_step: of this process, for an estimate of its time left."""

    name: str
    spec: TrialSpec | None
    baseline: bool
    total_steps: int = 0
    confirms: bool = False
    began: float = 0.0
    first_step: int | None = None
    step: int = 0
    loss: float | None = None
    scores: EvalPoint | TrialSummary | None = None

    @property
    def label(self) -> str:
        """Its configuration."""
        return f"{self.spec or 'enqueued by hand'}{' (baseline)' if self.baseline else ''}"

    def reached(self, step: int, now: float) -> None:
        if self.first_step is None:
            self.first_step, self.began = step, now
        self.step = max(self.step, step)

    @property
    def steps_here(self) -> int:
        return self.step - (self.first_step or 0)

    def seconds_left(self, now: float) -> float:
        """By its own pace; 0 before that is known."""
        return (self.total_steps - self.step) * (now - self.began) / self.steps_here if self.steps_here else 0.0

    def cells(self, runs: bool) -> dict[str, RenderableType]:
        """Contents by column. runs: it is in training."""
        found: dict[str, RenderableType] = {"trial": f"{self.name}{' baseline' if self.baseline else ''}"}
        if (spec := self.spec) is not None:
            found |= {"targets": spec.targets, "rank": f"{spec.rank}", "alpha": f"{spec.alpha:g}", "head": spec.head}
            found |= {"dropout": f"{spec.dropout:.3g}", "lr": f"{spec.learning_rate:.3g}"}
        if runs:
            # Its last step is a training step; then the whole validation split is scored.
            evaluates = self.step == self.total_steps and not (isinstance(self.scores, EvalPoint) and self.scores.final)
            found["bar"] = ProgressBar(self.total_steps, self.step, complete_style="cyan", finished_style="green")
            found["step"] = "evaluating" if evaluates else f"{self.step}/{self.total_steps}"
            found["loss"] = "-" if self.loss is None else f"{self.loss:.3f}"
        scores = self.scores
        return found | {word: _percent(scores.score(name) if scores else None) for name, word in SCORES.items()}


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
        ended: the trials that had ended before.
        num_confirmed: how many of the best are repeated. Among repetitions there is no best.
        repeated: how many repetitions had ended before.
        link: where the run is shown: words, then a URL. On a narrow terminal its query is left out.
        console: the standard output unless given.
        clock: seconds.
    """

    def __init__(
        self,
        total_trials: int,
        *,
        objective: Objective = "accuracy",
        ended: Sequence[TrialSummary] = (),
        num_confirmed: int = 0,
        repeated: int = 0,
        link: str | None = None,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        # Asked of the file itself: to rich, FORCE_COLOR makes a terminal of a log.
        animated = self._console.file.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal
        self.mode: Literal["live", "lines", "quiet"] = "quiet" if quiet else "live" if animated else "lines"
        self._total_trials, self._objective, self._num_confirmed = total_trials, objective, num_confirmed
        self._counts = {state: sum(row.state == state for row in ended) for state in ENDED_STATES.values()}
        self._repeated = self._total_repetitions = repeated
        self._link = link
        self._ended_before = self._ended + repeated
        self._confirms = repeated > 0
        best = best_first(ended, objective)[:NUM_BEST]
        self._best = [_Trial(row.trial, row.spec, row.baseline, scores=row) for row in best]
        self._clock, self._began = clock, clock()
        self._trained_since: float | None = None
        self._running: dict[str, _Trial] = {}
        # Its thread redraws a few lines twice a second, so that times go on while nothing happens.
        self._live = _Live(self, console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        if self.mode == "live":
            self._live.start()
        elif self._link is not None:
            self.announce(self._link)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()  # also gives the cursor back

    def trial_started(
        self, trial: str, spec: TrialSpec | None, total_steps: int, confirms: bool = False, baseline: bool = False
    ) -> None:
        """Show a trial that started or was resumed. spec: None where it cannot train. confirms: it is a repetition."""
        if confirms and not self._confirms:
            self._confirms = True
            self.announce("Confirming the best trials: they race over more seeds.")
        now = self._clock()
        self._trained_since = self._trained_since or now
        self._running[trial] = started = _Trial(trial, spec, baseline, total_steps, confirms, now)
        if self.mode == "lines":
            self.announce(f"{trial} started: {started.label}, {total_steps} steps")

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
            running.scores = point
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
        ended = self._running.pop(trial)
        if ended.confirms:
            self._repeated += state != "INTERRUPTED"
        elif state in self._counts:
            self._counts[state] += 1
        if state == "COMPLETE" and scores is not None and not ended.confirms:
            ended.scores = scores
            self._best = sorted([*self._best, ended], key=self._rank)[:NUM_BEST]
        word, style = ENDS[state]
        if self.mode == "live":  # the table says the rest
            line = Text(f"{trial:<{len('t0000-s2')}} ").append(f"{word:<{len('complete')}}", style=style)
            width, said = self._console.width, ""
            if scores is not None and width >= WIDE + 16:
                said = _said(scores, rows=width >= WIDE + 32)
            elif scores is not None:
                word = f"  {SCORES[self._objective]}" if width >= WIDE else " "
                said = f"{word} {scores.score(self._objective):.2%}"
            text = f"{said}  {ended.label}"
            if len(line) + len(text) > width:
                text = f"{said}  {ended.spec or ended.label}"
            line.append(text).append("" if state == "PRUNED" or not reason else f"\n  {reason}")
        else:
            line = Text(f"{trial} ").append(word, style=style)
            if scores is not None:
                line.append(f"{_said(scores)}{'  best so far' if self._best[:1] == [ended] else ''}")
            line.append(f"  {reason}" if reason else "")
            if ended.confirms:
                line.append(f"  [confirmation {self._repeated}/{self._repetitions}]")
            else:
                line.append(f"  [{self._ended}/{self._total_trials}]")
        self.announce(line)

    def _rank(self, trial: _Trial) -> tuple[float, float]:
        """As `best_first` ranks: trials with the same scores keep their order."""
        assert trial.scores is not None
        return -(trial.scores.score(self._objective) or 0.0), trial.scores.loss or math.inf

    def announce(self, text: str | Text) -> None:
        """Print a line that stays."""
        if self.mode != "quiet":
            self._console.print(text, markup=False, highlight=False, soft_wrap=self.mode != "live")

    def planned(self, total_trials: int, confirms: bool = False) -> None:
        """Count to another total: a person enqueued trials on top, or (confirms) a round of repetitions begins."""
        if confirms:
            self._total_repetitions = total_trials
        else:
            self._total_trials = total_trials

    def message(self, text: str) -> None:
        """Print a warning; a quiet screen passes it on to the standard error."""
        if self.mode == "quiet":
            print(f"agnews-lora: {text}", file=sys.stderr, flush=True)
        else:
            self.announce(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now, running = self._clock(), list(self._running.values())  # the drawing thread is another one
        yield Text()
        yield from self._header(now, running, options.max_width)
        room = max(1, options.size.height - LINES_BESIDE)
        num_extra = (1 + len(self._best) if self._best else 0) + (2 if self._link else 0)
        extra = room > 2 * num_extra or room >= num_extra + len(running)
        shown = running[: room - num_extra if extra else room]
        best = self._best if extra else []
        if shown or best:
            yield self._table(options.max_width, shown, best)
        if len(running) > len(shown):
            yield Text(f"and {len(running) - len(shown)} more", style="dim")
        if self._link and extra:
            whole = len(self._link.rpartition(" ")[2]) <= options.max_width
            yield Text(self._link if whole else self._link.partition("?")[0], style="dim", overflow="fold")

    def _table(self, width: int, running: Sequence[_Trial], best: Sequence[_Trial]) -> Table:
        """The trials in training, above the best ones."""
        least_widths = COLUMNS | {SCORES[self._objective]: 0}
        heads = {trial.spec.head for trial in (*running, *best) if trial.spec is not None}
        columns = [column for column, least_width in least_widths.items() if width >= least_width]
        columns = [column for column in columns if column != "head" or heads - {"full"}]
        gap = 2 if width >= WIDE else 1
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim", expand=True)
        for column in columns:
            text = column in ("trial", "targets", "head", "bar")
            table.add_column(
                {"trial": "running" if running else "best so far", "bar": ""}.get(column, column),
                justify="left" if text else "right",
                ratio=1 if column == "bar" else None,
                no_wrap=True,
                overflow="ellipsis",
            )
        for trial in running:
            cells = trial.cells(runs=True)
            table.add_row(*(cells.get(column, "") for column in columns))
        if running and best:
            table.add_row("best so far", style="dim")
        for place, trial in enumerate(best):
            cells = trial.cells(runs=False)
            table.add_row(*(cells.get(column, "") for column in columns), style="" if place else "bold green")
        return table

    def _header(self, now: float, running: Sequence[_Trial], width: int) -> Sequence[Text]:
        trials = Text(f"trials {self._ended}/{self._total_trials}: ")
        counts = [
            Text(f"{count} {ENDS[state][0]}", ENDS[state][1] if count else "") for state, count in self._counts.items()
        ]
        trials.append(Text(", ").join(counts))
        if self._confirms:
            trials.append(f"  confirmation {self._repeated}/{self._repetitions}")
        times = f"elapsed {duration(now - self._began)}"
        # The pace of this process: trials that ended in it, and what it did of those that run. None ends sooner than
        # by its own pace: at the end of a study slots idle.
        ended, total = self._ended + self._repeated, self._total_trials + self._repetitions
        done = ended - self._ended_before + sum(trial.steps_here / trial.total_steps for trial in running)
        if done >= LEAST_SHARE and self._trained_since is not None:
            left = max(0.0, total - ended - sum(trial.step / trial.total_steps for trial in running))
            seconds = max(left * (now - self._trained_since) / done, *(each.seconds_left(now) for each in running), 0.0)
            times += f", {_left(seconds)}"
        lines = [trials, Text(times)]
        for line in lines:
            line.stylize("bold")
            line.truncate(width, overflow="ellipsis")
        return lines

    @property
    def _ended(self) -> int:
        return sum(self._counts.values())

    @property
    def _repetitions(self) -> int:
        """How many there will be at least, if the trials that are left complete: later rounds may not be needed."""
        complete = self._counts["COMPLETE"] + max(0, self._total_trials - self._ended)
        return max(self._total_repetitions, min(self._num_confirmed, complete))


def _said(scores: EvalPoint, rows: bool = True) -> str:
    said = "".join(f"  {word} {scores.score(name):.2%}" for name, word in SCORES.items())
    return f"{said}  ({scores.rows:,} rows)" if rows else said


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _left(seconds: float) -> str:
    """In whole minutes: an estimate is not better than that."""
    if seconds < 60:
        return "under 1 min left"
    return f"about {f'{math.ceil(seconds / 60)} min' if seconds < 3_600 else duration(seconds)} left"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
