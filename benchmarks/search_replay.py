"""A study replayed: the sweep's own driver, sampler and pruner, over trials whose scores come from a table."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Range, Space
from agnews_lora.errors import TrainingError
from agnews_lora.search import space as search_space
from agnews_lora.search.driver import Driver, Search
from agnews_lora.search.prior import known_good
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import enqueue_baseline, enqueue_known
from agnews_lora.search.trial_log import Point
from agnews_lora.search.trials import best_first, summaries
from agnews_lora.training.interface import (
    EvalPoint,
    Observer,
    TrainPoint,
    TrialEnd,
    TrialResult,
    TrialSource,
    Verdict,
)
from agnews_lora.training.metrics import packed
from benchmarks.search_table import ALPHA_RATIOS, BASELINE, BUDGET, DROPOUT, LEARNING_RATES, Table, Training

SPACE = Space(
    alpha_ratio=ALPHA_RATIOS,
    dropout=Range(low=0.0, high=DROPOUT),
    learning_rate=Range(low=LEARNING_RATES[0], high=LEARNING_RATES[1]),
)


def shipped_sampler(shape: ModelShape, seed: int, startup_trials: int) -> TrialSeededTPE:
    """Make the sweep's own sampler, over the space of the tables."""
    searched = SPACE, shape, BUDGET
    return TrialSeededTPE(seed, startup_trials, search_space.distributions(*searched), search_space.shared(*searched))


@dataclass(frozen=True)
class Rows:
    """The trainings of a table, and which of them stands for a configuration.

    The baseline stands for itself. For any other it is that of the same preset with the least Euclidean distance over
    four numbers that each run from 0 to 1 across the space: logarithm of the learning rate, logarithm of alpha / rank,
    rank as a share of the largest that fits, dropout.
    """

    table: Table
    shape: ModelShape

    def nearest(self, spec: TrialSpec, run: int) -> Training:
        own = [each for each in self.table.trainings if each.run == run]
        baseline, *drawn = own
        if spec == baseline.spec:
            return baseline
        place = self._place(spec)
        alike = [each for each in drawn if each.spec.targets == spec.targets]
        return min(alike, key=lambda each: math.dist(place, self._place(each.spec)))

    def other(self, training: Training) -> Training:
        """The same configuration with its other seed."""
        return next(
            each for each in self.table.trainings if each.number == training.number and each.run != training.run
        )

    def _place(self, spec: TrialSpec) -> tuple[float, ...]:
        (low, high), highest = LEARNING_RATES, max_rank(spec.targets, spec.head, self.shape, BUDGET)
        return (
            math.log(spec.learning_rate / low) / math.log(high / low),
            math.log(spec.alpha / spec.rank / min(ALPHA_RATIOS)) / math.log(max(ALPHA_RATIOS) / min(ALPHA_RATIOS)),
            (spec.rank - 1) / max(1, highest - 1),
            spec.dropout / DROPOUT,
        )


@dataclass
class TableEngine:
    """Trains nothing: `num_slots` trials advance together to their next evaluation, and score what the table says.

    backwards: the trials that are due together are judged last slot first. num_steps: trained in all. trained: the
    training that stands for each trial.
    """

    rows: Rows
    num_slots: int
    backwards: bool = False
    num_steps: int = field(default=0, init=False)
    trained: dict[str, Training] = field(default_factory=dict, init=False)

    def run(self, source: TrialSource, observer: Observer) -> None:
        slots: dict[str, int] = {}  # {trial: evaluations that it has passed}
        steps = self.rows.table.steps
        while True:
            while len(slots) < self.num_slots and (plan := source.next()) is not None:
                self.trained[plan.trial] = self.rows.nearest(plan.spec, plan.seed % 2)
                slots[plan.trial] = 0
            if not slots:
                return
            self.num_steps += sum(steps[passed] - ([0, *steps])[passed] for passed in slots.values())
            self._evaluate(slots, observer)

    def _evaluate(self, slots: dict[str, int], observer: Observer) -> None:
        """Score all trials, together, and take out those that end."""
        points, total = [], self.rows.table.total_steps
        for trial, passed in list(slots.items()):
            step, training = self.rows.table.steps[passed], self.trained[trial]
            slots[trial] += 1
            if (right := training.right.get(step)) is None:
                del slots[trial]
                observer.failed(trial, TrainingError(f"diverged before step {step}"))
                continue
            loss = training.eval_losses[passed]
            points.append(
                EvalPoint(trial, step, float(right.mean()), math.nan, loss, len(right), step == total, 0, packed(right))
            )
        if self.backwards:
            points.reverse()
        for point, verdict in zip(points, observer.evaluated(points) if points else [], strict=True):
            if point.final or verdict is Verdict.PRUNE:
                del slots[point.trial]
                final = point if point.final else None
                observer.finished(TrialResult(point.trial, point.step, total, final, None, 0, 0, 0.0, 0.0, 0))


@dataclass(frozen=True)
class Outcome:
    """Of one replayed study.

    worth: test accuracy of the configuration with the best validation accuracy, over the seed that it was not chosen
    on. lost: test accuracy over both seeds by which the best configuration that was pruned exceeds the best that was
    not, or 0. saved: share of the training steps of all its trials. pruned: their numbers.
    """

    worth: float
    lost: float
    saved: float
    pruned: frozenset[int]


def replay(
    rows: Rows,
    sampler: BaseSampler,
    pruner: Callable[[Mapping[str, Training]], BasePruner],
    num_trials: int,
    num_slots: int,
    seed: int,
    backwards: bool = False,
    num_known: int = 0,
    judge_known: bool = False,
) -> Outcome:
    """Run one study by the sweep's own driver.

    pruner: made of {trial: its training}, for a rule that reads more of a table than the study has. num_known: known
    configurations that come after the baseline, at most. judge_known: they may be pruned, as those are that have no
    source.
    """
    engine, nothing = TableEngine(rows, num_slots, backwards), NullTracker()
    study = optuna.create_study(sampler=sampler, pruner=pruner(engine.trained), direction="maximize")
    enqueue_baseline(study, BASELINE, SPACE, rows.shape, BUDGET)
    known = known_good(SPACE, rows.shape, BUDGET, BASELINE, num_known)
    enqueue_known(study, dict.fromkeys(known, "") if judge_known else known, SPACE, rows.shape, BUDGET)
    total = rows.table.total_steps
    search = Search(SPACE, rows.shape, BUDGET, seed, BASELINE, seed, total, num_trials)
    with tempfile.TemporaryDirectory() as folder:
        Driver(study, search, nothing, nothing, Path(folder), lambda: False).run(engine)
    ended = summaries(study)
    winner = best_first(ended, "accuracy")[0]  # the baseline is never pruned
    worth = rows.other(engine.trained[winner.trial]).test_accuracy
    saved = 1 - engine.num_steps / (num_trials * total)
    pruned = frozenset(row.number for row in ended if row.state == "PRUNED")
    worths = rows.table.test_accuracies
    means = {row.number: worths[engine.trained[row.trial].number] for row in ended}
    lost = max(means.values()) - max(mean for number, mean in means.items() if number not in pruned)
    return Outcome(worth, lost, saved, pruned)


class NullTracker:
    """Implements the driver's `Tracker` and `Screen`; keeps nothing."""

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        return run_id or f"run-of-{trial}"

    def log_points(self, trial: str, points: Sequence[Point]) -> None: ...

    def finish_trial(self, trial: str, end: TrialEnd) -> None: ...

    def trial_started(
        self, trial: str, spec: TrialSpec | None, total_steps: int, confirms: bool, baseline: bool
    ) -> None: ...

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> None: ...

    def planned(self, total_trials: int, confirms: bool) -> None: ...

    def message(self, text: str) -> None: ...

    def trial_ended(self, trial: str, state: str, scores: EvalPoint | None, reason: str | None) -> None: ...
