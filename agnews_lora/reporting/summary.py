"""The last screen of a sweep, and what can be done with its study next."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agnews_lora.reporting.progress import duration
from agnews_lora.search.racing import SURE
from agnews_lora.search.results import INTERRUPTED, SweepFacts, SweepResult
from agnews_lora.tracking.views import UI
from agnews_lora.training.interface import SCORES, Objective

MORE: Final = 10  # trials that a finished study may be extended by
PURPOSE_WIDTH: Final = 24  # columns beside a command, below which its purpose stands above it


@dataclass(frozen=True)
class Step:
    """Something to do now. command: to be copied. purpose: an imperative."""

    command: str
    purpose: str


def next_steps(result: SweepResult) -> list[Step]:
    """Advise what to do with a study, the most useful step first.

    It follows the state of the study and of its registered version. Screen, MLflow's page and report all show this.
    """
    facts, version = result.facts, result.registration
    if result.state == INTERRUPTED:
        target = facts.options.get("--trials")
        return [Step(facts.command("sweep", *(["--trials", target] if target else [])), "resume it")]
    browse = Step(facts.options.get("--tracking") or facts.command("ui"), "browse the runs")
    if result.winner is None:
        cure = "start another study, once the cause of the failures is removed"
        return [Step(facts.command("sweep", "--new"), cure), browse]
    write = Step(facts.command("report"), "write the result as a page and a PDF")
    own = sum(result.counts.values()) - sum(row.enqueued for row in result.trials)  # as `--trials` counts
    more = Step(facts.command("sweep", "--trials", str(own + MORE)), f"train {MORE} more trials")
    aliases = version.aliases if version else ("candidate",)
    if "champion" in aliases:
        return [*champion_steps(facts), write, browse, more]
    if "previous" in aliases:
        back = Step(facts.command("promote", "--rollback"), "make this version champion again")
        return [back, write, browse, more]
    words = ["--version", str(version.version)] if version and "candidate" not in aliases else []
    check = Step(facts.command("promote", *words), "check the winner, and make it champion")
    if version and any(not found["passed"] for found in version.checks):
        again = Step(check.command, "check it again, where the cause is removed")
        return [Step(more.command, "search for a version that passes its checks"), again, write, browse]
    return [check, write, browse, more]


def champion_steps(facts: SweepFacts) -> list[Step]:
    """Advise what to do with a champion."""
    return [
        Step(facts.command("predict", "Oil rose."), "ask the champion"),
        Step(facts.command("serve"), "answer over HTTP with it"),
        Step(facts.command("export", "--to", "exported"), "write it as a PEFT folder"),
    ]


def typed(command: str) -> str:
    """A command as the user's shell finds the program: by its path where it is not on PATH, as after `make`."""
    started = Path(sys.argv[0])
    if started.name != "agnews-lora" or shutil.which("agnews-lora"):
        return command
    return command.replace("agnews-lora", os.path.relpath(started), 1)


def print_summary(console: Console, result: SweepResult) -> None:
    """Print the result as a panel. An unknown value has no line."""
    found = _grid()
    for name, value, style in _rows(result):
        found.add_row(Text(name, style="dim"), Text(value, style=style))
    content = Group(
        found,
        Text(),
        _scores(result),
        Text("\nNext", style="bold"),
        steps_table(next_steps(result), console.width - 4),
    )
    console.print(Panel(content, title=Text(f"study {result.study}"), title_align="left", expand=False))
    print_pages(console, result)


def print_pages(console: Console, result: SweepResult) -> None:
    """Print where MLflow's UI shows the trials."""
    server = result.facts.options.get("--tracking")
    for page in ("trials", "charts") if result.links else ():
        while_up = "" if server else f"  (while {typed('agnews-lora ui')} runs)"
        url = f"{(server or UI).rstrip('/')}/{result.links[page]}"
        console.print(f"{page}: {url}{while_up}", soft_wrap=True, markup=False)


def steps_table(steps: list[Step], width: int) -> Table:
    """Show steps: purposes beside the commands, or above them where width, in columns, is too small for both."""
    commands = [Text(typed(step.command), style="bold cyan", overflow="fold") for step in steps]
    if max(map(len, commands)) + 3 + PURPOSE_WIDTH <= width:
        grid = _grid()
        for step, command in zip(steps, commands, strict=True):
            grid.add_row(command, Text(step.purpose))
    else:
        grid = Table.grid()
        for step, command in zip(steps, commands, strict=True):
            grid.add_row(Text(step.purpose, style="dim"))
            grid.add_row(command)
    return grid


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
    if sentences := certainty(result):
        yield "certainty", "\n".join(sentences), ""
    yield "trials", ", ".join(f"{count} {word}" for word, count in result.counts.items()), ""
    if result.wall_seconds is not None:
        yield "wall time", f"{duration(result.wall_seconds)} of training and evaluation, over all starts", ""
    if (version := result.registration) is not None:
        aliases = ", ".join(version.aliases) or "a version"
        yield "registered", f"version {version.version} of {version.model} as {aliases}", ""


def certainty(result: SweepResult) -> list[str]:
    """Say how sure the choice of the winner is: a sentence against the baseline, and one against the other candidates.

    Screen, MLflow's page and report all show this.
    """
    selection, winner, found = result.selection, result.winner, list[str]()
    if selection is None or winner is None:
        return found
    if winner == result.baseline:
        found.append("The winner is the baseline itself.")
    elif (sure := selection.probability_better_than_baseline) is not None:
        words = "Better than the baseline" if sure >= SURE else "Not distinguishable from the baseline: better only"
        found.append(f"{words} with a probability of {_probability(sure)}.")
    if (sure := selection.probability_better_than_runner_up) is None:
        return found
    means = {each.own.trial: each for each in result.confirmed}
    runner_up, best = result.confirmed[1].own.trial, means[selection.best_mean]
    near = [trial for trial in selection.indistinguishable if trial != winner.trial]
    if not near:
        return [*found, f"Better than the runner-up, {runner_up}, with a probability of {_probability(sure)}."]
    apart = f"Not distinguishable from {', '.join(near)} (better than {runner_up} with a probability of"
    apart += f" {_probability(sure)}): chosen"
    word, size, other = SCORES[result.objective], winner.trainable_parameters or 0, best.own.trainable_parameters or 0
    if winner == best.own:
        return [*found, f"{apart} for the best mean {word}."]
    less = (best.mean(result.objective) or 0.0) - (means[winner.trial].mean(result.objective) or 0.0)
    return [
        *found,
        f"{apart} as the smallest, with {other - size:,} ({(other - size) / other:.0%}) fewer trainable parameters "
        f"than {best.own.trial}, the best mean, for {100 * less:.2f} points less mean {word}.",
    ]


def _probability(probability: float) -> str:
    """Rounded towards 0, so that none reads as `SURE` that is not, and never certain."""
    return f"{min(int(1000 * probability), 999) / 1000:.1%}"


def _scores(result: SweepResult) -> Table:
    """The scores of the winner and of its peers, with the number of rows that they are of; the objective's first."""
    facts, winner, mean = result.facts, result.winner, result.confirmation
    names: list[Objective] = sorted(SCORES, key=lambda name: name != result.objective)
    table = Table.grid(padding=(0, 3, 0, 0))
    for justify in ("left", "right", "right"):
        table.add_column(no_wrap=True, justify=justify)
    table.add_column()

    def add(name: str, scores: Mapping[Any, float | None], note: str = "", style: str = "") -> None:
        cells = [Text(_percent(scores.get(each)), style=style) for each in names]
        table.add_row(Text(name, style="dim"), *cells, Text(note))

    of = "" if result.objective == "accuracy" else "accuracy: "

    def interval(ends: tuple[float, float] | None) -> str:
        return f"{of}95% interval {ends[0]:.2%} to {ends[1]:.2%}" if ends else ""

    rows = f"{facts.num_validation_rows:,} validation rows"
    table.add_row(Text(rows), *(Text(SCORES[name], style="dim") for name in names))
    if winner is not None:
        add(
            f"winner {winner.trial}",
            {name: winner.score(name) for name in SCORES},
            interval(result.interval(winner)),
            "bold green",
        )
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
    if result.registration and (test := result.registration.test):
        add(f"test, {test['rows']:,} rows", test, interval((test["low"], test["high"])), "bold green")
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
