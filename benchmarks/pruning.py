"""Which rule gives up trials, with many at once: studies replayed on a table of trained configurations.

`python -m benchmarks.pruning table` trains configurations drawn from the shipped sweep's space, each once and without
pruning, and writes `results/pruning-table.csv`. It can be stopped, and goes on where it was.

`python -m benchmarks.pruning replay` runs whole studies through the sweep's own driver, sampler and pruner, with an
engine that takes each trial's accuracies from the table instead of training it: for every rule, with one trial at a
time and with eight at once, over the same seeds. It writes what it measured to `results/`.
"""

import argparse
import datetime
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy import stats

from agnews_lora.tracking.provenance import provenance
from benchmarks.pruning_replay import (
    CHOSEN,
    FINISHED,
    HALVING,
    NONE,
    QUARTER,
    QUARTERS,
    TRIALS,
    Outcome,
    replay_study,
    rules,
)
from benchmarks.pruning_table import RESULTS, SWEEP, TABLE, Table, fill_table, read_table, shipped_sweep

SLOTS = (1, 8)


@dataclass(frozen=True)
class Measured:
    """One rule under one sampler. outcomes: {slots: the studies', by seed}. backwards: with most slots, judged so."""

    outcomes: dict[int, list[Outcome]]
    backwards: list[Outcome]

    def accuracies(self, num_slots: int) -> NDArray[np.float64]:
        return np.array([outcome.accuracy for outcome in self.outcomes[num_slots]])

    def mean(self, name: Literal["accuracy", "saved"], num_slots: int) -> float:
        return float(np.mean([getattr(outcome, name) for outcome in self.outcomes[num_slots]]))

    def num_pruned(self, num_slots: int) -> float:
        return float(np.mean([len(outcome.pruned) for outcome in self.outcomes[num_slots]]))

    @property
    def depends_on_order(self) -> float:
        """Share of the studies in which other trials were pruned when each group was judged backwards."""
        pairs = zip(self.outcomes[SLOTS[-1]], self.backwards, strict=True)
        return float(np.mean([forwards.pruned != backwards.pruned for forwards, backwards in pairs]))


def measure(table: Table, startup_trials: int, num_seeds: int) -> dict[str, Measured]:
    """Every rule, over the same seeds. startup_trials: of the sampler."""
    measured = {}
    for name, pruner in rules(table.sweep).items():
        outcomes = {
            num_slots: [replay_study(table, pruner, startup_trials, num_slots, seed) for seed in range(num_seeds)]
            for num_slots in SLOTS
        }
        backwards = [replay_study(table, pruner, startup_trials, SLOTS[-1], seed, True) for seed in range(num_seeds)]
        measured[name] = Measured(outcomes, backwards)
        print(name, *(f"K={slots} {measured[name].mean('accuracy', slots):.4f}" for slots in SLOTS), flush=True)
    return measured


def interval(differences: NDArray[np.float64]) -> str:
    """Mean of paired differences in points, with its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{100 * differences.mean() + 0.0:+.2f} ± {100 * half:.2f}"


def lines_of(measured: dict[str, Measured], best: float) -> str:
    """The Markdown table of one sampler."""
    one, many = SLOTS
    columns = [
        "rule",
        *(f"winner, K={slots}" for slots in SLOTS),
        f"K={many} − K={one}",
        *(f"rule − none, K={slots}" for slots in SLOTS),
        *(f"steps saved, K={slots}" for slots in SLOTS),
        *(f"pruned, K={slots}" for slots in SLOTS),
        *(f"regret, K={slots}" for slots in SLOTS),
    ]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for name, rule in measured.items():
        cells = [
            f"**{name}**" if name == CHOSEN else name,
            *(f"{rule.mean('accuracy', slots):.2%}" for slots in SLOTS),
            interval(rule.accuracies(many) - rule.accuracies(one)),
            *(interval(rule.accuracies(slots) - measured[NONE].accuracies(slots)) for slots in SLOTS),
            *(f"{rule.mean('saved', slots):.1%}" for slots in SLOTS),
            *(f"{rule.num_pruned(slots):.1f}" for slots in SLOTS),
            *(f"{100 * (best - rule.mean('accuracy', slots)):.2f}" for slots in SLOTS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice(learning: dict[str, Measured], random: dict[str, Measured], best: float, num_validation: int) -> str:
    """What speaks for the chosen rule, and how much of it is noise. num_validation: rows of the validation split."""
    one, many = SLOTS
    chosen, finished, halving = learning[CHOSEN], learning[FINISHED], learning[HALVING]
    error = 100 * math.sqrt(best * (1 - best) / num_validation)

    def apart(rule: Measured) -> str:
        return interval(rule.accuracies(many) - rule.accuracies(one))

    def cost(rule: Measured, slots: int) -> str:
        return interval(rule.accuracies(slots) - learning[NONE].accuracies(slots))

    def saved(rule: Measured) -> str:
        return " and ".join(f"{rule.mean('saved', slots):.0%}" for slots in SLOTS)

    return f"""\
**{CHOSEN.capitalize()}.** With it, the winner of K={many} is {apart(chosen)} points from that of K={one} under TPE, and
{apart(random[CHOSEN])} with random draws; without any pruning TPE alone makes {apart(learning[NONE])}. It saves
{saved(chosen)} of the steps (K={one} and K={many}) and moves the winner by {cost(chosen, one)} and
{cost(chosen, many)} points against no pruning. It needs neither finished trials nor an order: judged backwards, a group
gets the verdicts that it gets forwards (other trials pruned in {random[CHOSEN].depends_on_order:.0%} of the studies).

- {FINISHED} saves {saved(finished)}: the first {many} of K={many} all run to their end before it has anything to
  compare with. Its winner moves by {cost(finished, one)} and {cost(finished, many)} points.
- {HALVING} saves {saved(halving)} and moves the winner by {cost(halving, one)} and {cost(halving, many)} points. What
  sets it aside is that each trial is compared only with those judged before it: judged backwards, the same groups lose
  other trials in {random[HALVING].depends_on_order:.0%} of the studies.
- Another line than the median: {QUARTER} saves {saved(learning[QUARTER])} and moves the winner by
  {cost(learning[QUARTER], one)} and {cost(learning[QUARTER], many)} points, {QUARTERS} saves
  {saved(learning[QUARTERS])} and moves it by {cost(learning[QUARTERS], one)} and {cost(learning[QUARTERS], many)}.

The standard error of one final accuracy is {error:.2f} points ({num_validation:,} validation rows, at {best:.2%}):
smaller differences between winners are within what another validation split would change. The intervals are over the
studies' seeds; all studies share the table, one training a row."""


def report(table: Table, num_validation: int, learning: dict[str, Measured], random: dict[str, Measured]) -> str:
    """The result file. learning, random: under the sweep's sampler, and with random draws alone."""
    tags, pruner = provenance(), table.sweep.pruner
    num_seeds = len(random[NONE].outcomes[SLOTS[0]])
    dirty = " (dirty)" if tags.get("git.dirty") == "true" else ""
    libraries = ", ".join(f"{name} {tags[f'version.{name}']}" for name in ("torch", "transformers", "optuna"))
    return f"""\
# `python -m benchmarks.pruning replay --seeds {num_seeds}`: rules of pruning, {tags["device"]}, {datetime.date.today()}

Commit {tags.get("mlflow.source.git.commit", "unknown")[:12]}{dirty}, Python {tags["version.python"]}, {libraries}.

{num_seeds} studies of {TRIALS} trials in each cell, the same seeds in all; start-up {pruner.startup_trials} and warm-up
{pruner.warmup_steps} as in sweep {SWEEP}. A trial takes its accuracies from `{TABLE.name}`: the baseline and
{len(table.rows) - 1} configurations drawn at random from the sweep's space, each trained once for {table.total_steps}
steps by the multi-LoRA engine (`python -m benchmarks.pruning table`). The row of a configuration is the nearest of its
preset: least Euclidean distance over log learning rate, log alpha ratio, rank as a share of the largest that fits, and
dropout, each from 0 to 1 across the space. K trials advance together; a place that falls free is filled at once.

Winner: final accuracy of the study's winner, mean over the studies. Regret: its distance from the best row,
{table.best:.2%}. Saved: share of the training steps of {TRIALS} whole trials. Differences are paired by seed, in
points, with the 95 % interval of their mean (t).

## The sweep's sampler: TPE, {TRIALS // 3} random trials first

{lines_of(learning, table.best)}

## Random sampler: the pruner alone, since a seed asks the same configurations in every cell

{lines_of(random, table.best)}

## Choice

{choice(learning, random, table.best, num_validation)}
"""


def replay(num_seeds: int) -> None:
    """Replay every rule under both samplers and write the result file."""
    with shipped_sweep() as (sweep, stage):
        table = Table(read_table(TABLE), sweep, stage.base.shape)
        num_validation = len(stage.corpus.validation)
    learning, random = (measure(table, startup, num_seeds) for startup in (TRIALS // 3, TRIALS))
    text = report(table, num_validation, learning, random)
    device = provenance()["device"].lower().replace(",", "").replace("(r)", "")
    name = f"pruning-replay-{'-'.join(device.split())}-{datetime.date.today()}.md"
    (RESULTS / name).write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """The two commands."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description="Compare rules of pruning.")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("table", help="train what the table lacks").add_argument("--rows", type=int, default=65)
    commands.add_parser("replay", help="replay studies on the table").add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.command == "table":
        fill_table(arguments.rows)
    else:
        replay(arguments.seeds)


if __name__ == "__main__":
    main()
