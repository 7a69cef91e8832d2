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
    content = Group(found, Text(), _scores(result), Text("\nNext", style="bold"), commands)
    console.print(Panel(content, title=Text(f"study {result.study}"), title_align="left", expand=False))


def _rows(result: SweepResult) -> Iterator[tuple[str, str, str]]:
    """(name, value, style) of every line but the scores."""
    winner, facts = result.winner, result.facts
    if winner is None:
        yield "winner", "none: no trial was completed", "bold red"
    else:
        yield "winner", f"{winner.trial}  {winner.spec or ''}".rstrip(), "bold"
    if winner is not None and (count := winner.trainable_parameters) is not None:
        share = f"{count / facts.budget:.1%} of the budget of {facts.budget:,}"
        yield "parameters", f"{count:,} trainable, {share}", ""
    yield "trials", ", ".join(f"{count} {word}" for word, count in result.counts.items()), ""
    if result.wall_seconds is not None:
        yield "wall time", f"{duration(result.wall_seconds)} of training, over all starts", ""
    if (version := result.registration) is not None:
        aliases = ", ".join(version.aliases) or "a version"
        yield "registered", f"version {version.version} of {version.model} as {aliases}", ""


def _scores(result: SweepResult) -> Table:
    """The scores of the winner and of its peers, with the number of rows that they are of; the objective's first."""
    facts, winner, mean = result.facts, result.winner, result.confirmation
    names: list[Objective] = sorted(SCORES, key=lambda name: name != result.objective)
    table = Table.grid(padding=(0, 3, 0, 0))
    for justify in ("left", "right", "right"):
        table.add_column(no_wrap=True, justify=justify)
    table.add_column()

    def add(name: str, scores: Mapping[Objective, float | None], note: str = "", style: str = "") -> None:
        cells = [Text(_percent(scores.get(each)), style=style) for each in names]
        table.add_row(Text(name, style="dim"), *cells, Text(note))

    def interval(ends: tuple[float, float] | None) -> str:
        return f"95% interval {ends[0]:.2%} to {ends[1]:.2%}" if ends else ""

    rows = f"{facts.num_validation_rows:,} validation rows"
    table.add_row(Text(rows), *(Text(SCORES[name], style="dim") for name in names))
    if winner is not None:
        add(f"winner {winner.trial}", {name: winner.score(name) for name in SCORES}, interval(result.interval(winner)), "bold green")
    if mean is not None:
        note = interval(mean.interval(facts.num_validation_rows))
        add(f"mean of {counted(len(mean.runs), 'seed')}", {name: mean.mean(name) for name in SCORES}, note)
    if (baseline := result.baseline) is not None:
        gain = "" if result.gain is None else f"gain {100 * result.gain:+.2f} points"
        add("baseline", {name: baseline.score(name) for name in SCORES}, gain)
    for peer in result.peers:
        add(peer.name, peer.scores, peer.note)
    if facts.bound is not None:
        add("best possible", {"accuracy": facts.bound})
    return table


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    return grid
