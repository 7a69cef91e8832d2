"""Which rule prunes best: studies replayed on the tables of `benchmarks/search_table.py`.

    python -m benchmarks.pruning

runs whole studies through the sweep's own driver, sampler and pruner, with an engine that takes each trial's scores
from a table instead of training it: for every rule, with one trial at a time and with several at once, over the same
seeds. It writes what it measured to `results/`.
"""

import argparse
import datetime
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial
from scipy import stats

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.search.pruner import McNemarPruner
from agnews_lora.search.trials import trial_name
from agnews_lora.tracking.provenance import provenance
from benchmarks import RESULTS
from benchmarks.result_files import commit_of, slug, write
from benchmarks.search_replay import Outcome, Rows, replay, shipped_sampler
from benchmarks.search_table import Table, Training, read_table

TABLES: Final = ("ag_news", "newswire")
CELLS: Final = ((14, 1), (14, 4), (30, 4))  # trials of a study, and how many at once
NONE: Final = "none"
JUDGED: Final = "known configurations judged as well"

Statistic = Callable[[Training, int], float]  # of a training at its n-th evaluation; more is better
Rule = Callable[[Training, Sequence[Training], int], bool]
Pruner = Callable[[Mapping[str, Training]], BasePruner]


@dataclass(frozen=True)
class TablePruner(BasePruner):
    """Prunes by a rule that reads the table.

    Args:
        steps: of the evaluations.
        trained: {trial: its training}.
        rule: whether to give up a training, judged beside its peers that came as far, at the n-th evaluation.
        min_peers: without as many there is no judgement.
    """

    steps: Sequence[int]
    trained: Mapping[str, Training]
    rule: Rule
    min_peers: int = 4

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        assert step is not None, "trials are judged after an evaluation"
        peers = [
            self.trained[trial_name(other)]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and step in other.intermediate_values
        ]
        stage = self.steps.index(step)
        if len(peers) < self.min_peers:
            return False
        return self.rule(self.trained[trial_name(trial)], peers, stage)


class TwiceInARow(McNemarPruner):
    """As far behind at two evaluations that follow each other."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        steps = sorted(trial.intermediate_values)[-2:]
        return len(steps) == 2 and all(self.is_behind(study, trial, step) for step in steps)


class Throughout(McNemarPruner):
    """As far behind at any step, from one on."""

    def __init__(self, standard_errors: float, start: int) -> None:
        super().__init__(standard_errors, 0)
        self._start = start

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self._total_steps = trial.last_step or 0
        return self._total_steps >= self._start and super().prune(study, trial)


def accuracy(training: Training, stage: int) -> float:
    """Of the monitor."""
    return float(list(training.right.values())[stage].mean())


def loss(training: Training, stage: int) -> float:
    """Of the monitor, with its sign turned."""
    return -training.eval_losses[stage]


def training_loss(table: Table) -> Statistic:
    """Of the training rows since the end of the warm-up, with its sign turned."""
    training = table.about["training"]
    warmup = round(training["warmup"] * table.total_steps)

    def statistic(own: Training, stage: int) -> float:
        until = table.steps[stage] // training["log_every"]
        return -float(np.mean(own.losses[min(warmup // training["log_every"], until - 1) : until]))

    return statistic


def below(share: float, statistic: Statistic, guard: float = 0.0) -> Rule:
    """Give up the trial below a quantile of its peers. guard: standard errors of an accuracy that it must be below."""

    def rule(own: Training, peers: Sequence[Training], stage: int) -> bool:
        right = list(own.right.values())[stage]
        error = guard * math.sqrt(right.mean() * (1 - right.mean()) / len(right))
        return statistic(own, stage) + error < float(np.quantile([statistic(peer, stage) for peer in peers], share))

    return rule


def at(stages: Sequence[int], rule: Rule) -> Rule:
    """Judge by a rule at some evaluations alone."""
    return lambda own, peers, stage: stage in stages and rule(own, peers, stage)


def rules(table: Table) -> dict[str, Pruner]:
    """The rules that are compared."""
    every, stages = table.steps[0], range(len(table.steps))
    half, quarter = len(stages) // 2 - 1, len(stages) // 4 - 1
    online = training_loss(table)

    def rule(given: Rule) -> Pruner:
        return lambda trained: TablePruner(table.steps, trained, given)

    def fixed(pruner: BasePruner) -> Pruner:
        return lambda trained: pruner

    return {
        NONE: fixed(NopPruner()),
        **{
            f"McNemar against the best, {z:g} standard errors at the end": fixed(McNemarPruner(z, table.total_steps))
            for z in (1, 1.25, 1.5)
        },
        **{
            f"the same, {z:g} standard errors, {JUDGED}": fixed(McNemarPruner(z, table.total_steps))
            for z in (1.25, 1.5)
        },
        "the same, 1 standard error, twice in a row": fixed(TwiceInARow(1, table.total_steps)),
        "the same, 2 standard errors throughout": fixed(Throughout(2, 0)),
        "the same, 2 standard errors throughout, from a quarter on": fixed(Throughout(2, table.steps[quarter])),
        "median of peers": rule(below(0.5, accuracy)),
        "median of peers less two standard errors": rule(below(0.5, accuracy, 2)),
        "median of peers' training loss since the warm-up": rule(below(0.5, online)),
        "rungs at a quarter and a half, upper half by loss": rule(at([quarter, half], below(0.5, loss))),
        "median of finished (Optuna)": fixed(MedianPruner(4, 0)),
        "successive halving by 2 (Optuna)": fixed(SuccessiveHalvingPruner(every, 2)),
    }


@dataclass(frozen=True)
class Measured:
    """One rule. outcomes: {cell: the studies', by seed}. backwards: of the last cell, judged so."""

    outcomes: dict[tuple[int, int], list[Outcome]]
    backwards: list[Outcome]

    def worth(self, cell: tuple[int, int]) -> NDArray[np.float64]:
        return np.array([outcome.worth for outcome in self.outcomes[cell]])

    def saved(self, cell: tuple[int, int]) -> float:
        return float(np.mean([outcome.saved for outcome in self.outcomes[cell]]))

    @property
    def depends_on_order(self) -> float:
        """Share of the studies in which other trials were pruned when each group was judged backwards."""
        pairs = zip(self.outcomes[CELLS[-1]], self.backwards, strict=True)
        return float(np.mean([forwards.pruned != backwards.pruned for forwards, backwards in pairs]))


def interval(differences: NDArray[np.float64]) -> str:
    """Mean of paired differences in points, with its 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{100 * differences.mean() + 0.0:+.2f} ± {100 * half:.2f}"


def seed_noise(table: Table) -> dict[int, float]:
    """{step: root mean square of McNemar's statistic between the two seeds of a configuration}.

    Of the better half of the configurations. It would be 1 if the choice of the rows were all that is left to chance.
    """
    runs = {(each.number, each.run): each for each in table.trainings}
    means = table.test_accuracies
    better = sorted(means, key=lambda number: (-means[number], number))[: len(means) // 2]
    found = {}
    for step in table.steps:
        pairs = [(runs[number, 0].right[step], runs[number, 1].right[step]) for number in better]
        alone = [(int((one & ~other).sum()), int((other & ~one).sum())) for one, other in pairs]
        found[step] = math.sqrt(fmean((b - c) ** 2 / max(1, b + c) for b, c in alone))
    return found


def measure(table: Table, num_studies: int) -> dict[str, Measured]:
    """Replay every rule over the same seeds."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    rows, pruners, measured = Rows(table, shape_of("embedded:minilm")), rules(table), {}

    def study(name: str, num_trials: int, num_slots: int, seed: int, backwards: bool = False) -> Outcome:
        startup = num_trials // 3
        sampler = shipped_sampler(rows.shape, seed, startup)
        judged, pruner = name.endswith(JUDGED), pruners[name]
        return replay(rows, sampler, pruner, num_trials, num_slots, seed, backwards, startup - 1, judged)

    for name in pruners:
        outcomes = {cell: [study(name, *cell, seed) for seed in range(num_studies)] for cell in CELLS}
        backwards = [study(name, *CELLS[-1], seed, backwards=True) for seed in range(num_studies)]
        measured[name] = Measured(outcomes, backwards)
        saved = {cell: f"{measured[name].saved(cell):.0%}" for cell in outcomes}
        print(table.about["data"], name, saved, flush=True)
    return measured


def lines_of(measured: dict[str, Measured]) -> str:
    """The Markdown table of one table's studies."""
    heads = [f"{num_trials} trials, K={num_slots}" for num_trials, num_slots in CELLS]
    columns = ["rule", *(f"saved, {head}" for head in heads), *(f"worth − none, {head}" for head in heads)]
    columns += ["worth − none, all", "best trial lost, all", "order matters in"]
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for name, rule in measured.items():
        gaps = [rule.worth(cell) - measured[NONE].worth(cell) for cell in CELLS]
        shown = [name, *(f"{rule.saved(cell):.0%}" for cell in CELLS), *map(interval, gaps)]
        lost = np.mean([[outcome.lost for outcome in rule.outcomes[cell]] for cell in CELLS], axis=0)
        shown += [interval(np.mean(gaps, axis=0)), interval(lost).lstrip("+"), f"{rule.depends_on_order:.0%}"]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def report(measured: dict[str, dict[str, Measured]], tables: dict[str, Table], num_studies: int) -> str:
    """The result file, of {table: {rule: what was measured}}."""
    tags = provenance()
    libraries = ", ".join(f"{name} {tags[f'version.{name}']}" for name in ("torch", "transformers", "optuna"))
    parts = []
    for name, found in measured.items():
        worth = {cell: found[NONE].worth(cell).mean() for cell in found[NONE].outcomes}
        shown = ", ".join(f"{worth[cell]:.2%} ({cell[0]} trials, K={cell[1]})" for cell in worth)
        num_configurations = len(tables[name].trainings) // 2
        noise = ", ".join(f"{size:.1f} at step {step}" for step, size in seed_noise(tables[name]).items())
        parts.append(
            f"## {name}: {num_configurations} configurations, two seeds each\n\n"
            f"Worth without pruning: {shown}.\n\n"
            f"McNemar's statistic between the two seeds of one configuration, root mean square over the better half: "
            f"{noise}. By the choice of the rows alone it would be 1.\n\n{lines_of(found)}\n"
        )
    return f"""\
# `python -m benchmarks.pruning`: rules of pruning, {tags["device"]}, {datetime.date.today()}

Commit {commit_of(tags)}, Python {tags["version.python"]}, {libraries}.

{num_studies} studies in each cell, the same seeds for all rules, by the sweep's own driver and sampler. Each begins
with the baseline and known configurations ({CELLS[0][0] // 3 - 1} of {CELLS[0][0]} trials, at most
{CELLS[-1][0] // 3 - 1} of {CELLS[-1][0]}), which are never pruned but where it says so. A trial takes its scores from
`search-table-NAME.jsonl` (`python -m benchmarks.search_table`): those of the nearest configuration of its preset (least
Euclidean distance over log learning rate, log alpha ratio, rank as a share of the largest that fits, and dropout), with
one of its two seeds. K trials advance together; a place that falls free is filled at once.

Worth of a study: test accuracy of the configuration with the best validation accuracy, with the seed that it was *not*
chosen on. Saved: share of the training steps of all its trials. Differences from no pruning are paired by seed, in
points, with the 95 % interval of their mean (t). Best trial lost: points by which the best configuration that was
pruned exceeds the best that was not, by the test accuracy over both seeds, or 0. Order matters: share of the studies
with {CELLS[-1][0]} trials and K={CELLS[-1][1]} in which other trials were pruned when each group was judged backwards.

{chr(10).join(parts)}"""


def main() -> None:
    """Replay every rule on every table, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description="Compare rules of pruning.")
    parser.add_argument("--studies", type=int, default=100)
    arguments = parser.parse_args()
    tables = {name: read_table(RESULTS / f"search-table-{name}.jsonl").paired() for name in TABLES}
    with ProcessPoolExecutor(len(tables)) as pool:  # one core each
        found = pool.map(measure, tables.values(), [arguments.studies] * len(tables))
        measured = dict(zip(tables, found, strict=True))
    text = report(measured, tables, arguments.studies)
    write(f"pruning-{slug(provenance()['device'])}", text)


if __name__ == "__main__":
    main()
