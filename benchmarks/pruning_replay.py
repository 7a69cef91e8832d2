"""A study replayed: the sweep's own driver, sampler and pruner, over trials whose accuracies come from a table."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.sweep import Sweep
from agnews_lora.errors import TrainingError
from agnews_lora.search import space as search_space
from agnews_lora.search.driver import Driver, Search
from agnews_lora.search.pruner import PeerMedianPruner, peer_values
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import enqueue_baseline
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
from benchmarks.pruning_table import Row, Table

TRIALS = 30  # of a study
NONE = "none"
CHOSEN = "median of peers"
QUARTER, QUARTERS = "lowest quarter of peers", "lowest three quarters of peers"
FINISHED = "median of finished (Optuna)"
HALVING = "successive halving by 2 (Optuna)"


@dataclass(frozen=True)
class PeerShare(BasePruner):
    """The chosen rule with another line than the median: gives up whoever is below this share of its peers."""

    share: float
    startup_trials: int
    warmup_steps: int

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = max(trial.intermediate_values)
        peers = peer_values(study, trial, step)
        if step < self.warmup_steps or len(peers) < self.startup_trials:
            return False
        return trial.intermediate_values[step] < float(np.quantile(peers, self.share))


def rules(sweep: Sweep) -> dict[str, BasePruner]:
    """The rules that are compared, with the start-up and warm-up of the sweep's file where they have them."""
    startup, warmup = sweep.pruner.startup_trials, sweep.pruner.warmup_steps
    every = sweep.experiment.settings.eval_every
    return {
        NONE: NopPruner(),
        CHOSEN: PeerMedianPruner(startup, warmup),
        QUARTER: PeerShare(0.25, startup, warmup),
        QUARTERS: PeerShare(0.75, startup, warmup),
        FINISHED: MedianPruner(startup, warmup),
        HALVING: SuccessiveHalvingPruner(every, 2),
        **{f"successive halving by {by} (Optuna)": SuccessiveHalvingPruner(every, by) for by in (3, 4)},
    }


@dataclass
class TableEngine:
    """Trains nothing: `num_slots` trials advance together by a step, and score what the table says; it counts steps.

    backwards: the trials that are due together are judged last slot first.
    """

    table: Table
    num_slots: int
    backwards: bool = False
    num_steps: int = field(default=0, init=False)

    def run(self, source: TrialSource, observer: Observer) -> None:
        slots: dict[str, tuple[Row, int]] = {}
        while True:
            while len(slots) < self.num_slots and (plan := source.next()) is not None:
                slots[plan.trial] = self.table.nearest(plan.spec), 0
            if not slots:
                return
            slots = {trial: (row, step + 1) for trial, (row, step) in slots.items()}
            self.num_steps += len(slots)
            self._evaluate(slots, observer)

    def _evaluate(self, slots: dict[str, tuple[Row, int]], observer: Observer) -> None:
        """Score all trials that are due, together, and take out those that end."""
        total, scored = self.table.total_steps, self.table.rows[0].accuracies
        points = []
        for trial, (row, step) in list(slots.items()):
            if step in row.accuracies:
                loss = row.loss or math.nan
                points.append(EvalPoint(trial, step, row.accuracies[step], math.nan, loss, 0, step == total, 0))
            elif step in scored:
                del slots[trial]
                observer.failed(trial, TrainingError(f"diverged before step {step}"))
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

    accuracy: the winner's, final. saved: share of the training steps of all its trials. pruned: their numbers.
    """

    accuracy: float
    saved: float
    pruned: frozenset[int]


def replay_study(
    table: Table, pruner: BasePruner, startup_trials: int, num_slots: int, seed: int, backwards: bool = False
) -> Outcome:
    """One study of `TRIALS` trials by the sweep's own sampler and driver. startup_trials: drawn at random."""
    sweep, shape = table.sweep, table.shape
    asked, shared = (of(sweep.space, shape, sweep.budget) for of in (search_space.distributions, search_space.shared))
    sampler = TrialSeededTPE(seed, startup_trials, asked, shared)
    study = optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize")
    baseline = sweep.experiment.spec
    enqueue_baseline(study, baseline, sweep.space, shape, sweep.budget)
    search = Search(sweep.space, shape, sweep.budget, seed, baseline, sweep.experiment.seed, table.total_steps, TRIALS)
    engine, nothing = TableEngine(table, num_slots, backwards), NullTracker()
    with tempfile.TemporaryDirectory() as folder:
        Driver(study, search, nothing, nothing, Path(folder), lambda: False).run(engine)
    rows = summaries(study)
    winner = best_first(rows, "accuracy")[0]  # the baseline is never pruned
    assert winner.accuracy is not None
    saved = 1 - engine.num_steps / (TRIALS * table.total_steps)
    return Outcome(winner.accuracy, saved, frozenset(row.number for row in rows if row.state == "PRUNED"))


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
