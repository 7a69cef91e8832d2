"""The last screen of a sweep: what was found, and what to type next."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agnews_lora.reporting.progress import duration


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep found. What is None is unknown and not shown.

    winner: id of the best trial; configuration: its adapter. mean_accuracy, std_accuracy: of its runs with `num_seeds`
    seeds, the sweep's own (`accuracy`) among them. accuracy, baseline_accuracy, bound: shares of the
    validation split, the bound being the best that is possible by construction of the data. trainable_parameters,
    budget: counts, head included. wall_seconds: of this start of the sweep. registered: model and version.
    next_commands: (what to type, what it does).
    """

    study: str
    num_complete: int
    num_pruned: int
    num_failed: int
    winner: str | None = None
    configuration: str | None = None
    accuracy: float | None = None
    mean_accuracy: float | None = None
    std_accuracy: float | None = None
    num_seeds: int | None = None
    trainable_parameters: int | None = None
    budget: int | None = None
    baseline_accuracy: float | None = None
    bound: float | None = None
    wall_seconds: float | None = None
    registered: str | None = None
    next_commands: tuple[tuple[str, str], ...] = ()


def print_summary(console: Console, summary: SweepSummary) -> None:
    """Print the summary as a panel."""
    found = _grid()
    for name, value in _rows(summary):
        found.add_row(name, value)
    parts: list[RenderableType] = [found]
    if summary.next_commands:
        commands = _grid()
        for command, purpose in summary.next_commands:
            commands.add_row(Text(command, style="bold cyan"), Text(purpose))
        parts += [Text("\nNext", style="bold"), commands]
    console.print(Panel(Group(*parts), title=Text(f"study {summary.study}"), title_align="left", expand=False))


def _rows(summary: SweepSummary) -> Iterator[tuple[Text, Text]]:
    def row(name: str, value: str, style: str = "") -> tuple[Text, Text]:
        return Text(name, style="dim"), Text(value, style=style)

    if summary.winner is None:
        yield row("winner", "none: no trial was completed", "bold red")
    else:
        yield row("winner", f"{summary.winner}  {summary.configuration or ''}".rstrip(), "bold")
    if summary.accuracy is not None:
        yield row("accuracy", f"{summary.accuracy:.2%}", "bold green")
    if summary.mean_accuracy is not None:
        yield row("confirmed", _confirmation(summary))
    if summary.baseline_accuracy is not None:
        yield row("baseline", f"{summary.baseline_accuracy:.2%}{_gain(summary)}")
    if summary.bound is not None:
        yield row("best possible", f"{summary.bound:.2%}")
    if summary.trainable_parameters is not None:
        yield row("parameters", f"{summary.trainable_parameters:,} trainable{_share_of_budget(summary)}")
    counts = f"{summary.num_complete} complete, {summary.num_pruned} pruned, {summary.num_failed} failed"
    yield row("trials", counts)
    if summary.wall_seconds is not None:
        yield row("wall time", duration(summary.wall_seconds))
    if summary.registered is not None:
        yield row("registered", summary.registered)


def _confirmation(summary: SweepSummary) -> str:
    spread = "" if summary.std_accuracy is None else f" ± {100 * summary.std_accuracy:.2f}"
    seeds = f"{summary.num_seeds} seeds" if summary.num_seeds != 1 else "1 seed"
    return f"{summary.mean_accuracy:.2%}{spread}  (mean of {seeds})"


def _gain(summary: SweepSummary) -> str:
    """In percentage points."""
    if summary.accuracy is None or summary.baseline_accuracy is None:
        return ""
    return f"  (gain {100 * (summary.accuracy - summary.baseline_accuracy):+.2f} points)"


def _share_of_budget(summary: SweepSummary) -> str:
    if summary.trainable_parameters is None or summary.budget is None:
        return ""
    return f", {summary.trainable_parameters / summary.budget:.1%} of the budget of {summary.budget:,}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    return grid
