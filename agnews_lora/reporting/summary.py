"""The last screen of a sweep: its result, and the next commands."""

from collections.abc import Iterator, Mapping

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agnews_lora.reporting.progress import duration
from agnews_lora.search.results import SweepResult
from agnews_lora.training.interface import SCORES, Objective


def print_summary(console: Console, result: SweepResult) -> None:
    """Print the result as a panel. An unknown value has no line."""
    found, commands = _grid(), _grid()
    for name, value, style in _rows(result):
        found.add_row(Text(name, style="dim"), Text(value, style=style))
    sweep = result.facts.sweep
    variable = "" if sweep == "embedded" else f" SWEEP={sweep}"
    for command, purpose in (
        ("make ui", "browse the runs"),
        (f"make promote{variable}", "check the winner, and make it champion"),
        (f"make report{variable}", "write the result as a page and a PDF"),
    ):
        commands.add_row(Text(command, style="bold cyan"), Text(purpose))
    content = Group(found, Text("\nNext", style="bold"), commands)
    console.print(Panel(content, title=Text(f"study {result.study}"), title_align="left", expand=False))


def _rows(result: SweepResult) -> Iterator[tuple[str, str, str]]:
    """(name, value, style) of every line."""
    winner, baseline, mean, facts = result.winner, result.baseline, result.confirmation, result.facts

    def told(shown: Mapping[Objective, str], *notes: str) -> str:
        """The objective's score, then notes and the other scores in brackets."""
        others = [f"{SCORES[name]} {score}" for name, score in shown.items() if name != result.objective]
        return f"{shown[result.objective]}  ({'; '.join([*notes, *others])})"

    if winner is None:
        yield "winner", "none: no trial was completed", "bold red"
    else:
        yield "winner", f"{winner.trial}  {winner.spec or ''}".rstrip(), "bold"
        yield SCORES[result.objective], told({name: _percent(winner.score(name)) for name in SCORES}), "bold green"
    if mean is not None:
        means = {name: _percent(mean.mean(name)) for name in SCORES}
        for name in SCORES:
            means[name] += "" if (std := mean.std(name)) is None else f" ± {100 * std:.2f}"
        seeds = f"{len(mean.runs)} seed{'s' if len(mean.runs) != 1 else ''}"
        yield "confirmed", told(means, f"mean of {seeds}"), ""
    if baseline is not None:
        gain = [] if result.gain is None else [f"gain {100 * result.gain:+.2f} points"]
        yield "baseline", told({name: _percent(baseline.score(name)) for name in SCORES}, *gain), ""
    for peer in result.peers:
        yield peer.name, told({name: _percent(peer.scores[name]) for name in SCORES}, peer.note), ""
    if facts.bound is not None:
        yield "best possible", f"{facts.bound:.2%}  (accuracy)", ""
    if winner is not None and (count := winner.trainable_parameters) is not None:
        share = f"{count / facts.budget:.1%} of the budget of {facts.budget:,}"
        yield "parameters", f"{count:,} trainable, {share}", ""
    yield "trials", ", ".join(f"{count} {word}" for word, count in result.counts.items()), ""
    if result.wall_seconds is not None:
        yield "wall time", duration(result.wall_seconds), ""
    if (version := result.registration) is not None:
        aliases = ", ".join(version.aliases) or "a version"
        yield "registered", f"version {version.version} of {version.model} as {aliases}", ""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    return grid
