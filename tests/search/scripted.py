"""An engine that trains nothing: it follows the contracts over curves made up from each trial's configuration.

With it goes what a sweep's command puts together: a study opened from storage, its baseline, the driver, a tracker.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner

from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.sweep import Range, Space
from agnews_lora.errors import TrainingError
from agnews_lora.search import space as search_space
from agnews_lora.search.confirmation import open_confirmation
from agnews_lora.search.driver import Driver, Search
from agnews_lora.search.pruner import McNemarPruner
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import enqueue_baseline, open_storage, open_study
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import (
    EvalPoint,
    Objective,
    Observer,
    RunState,
    TrainPoint,
    TrialEnd,
    TrialPlan,
    TrialResult,
    TrialSource,
    Verdict,
)
from agnews_lora.training.metrics import packed
from tests.tiny import tiny_shape

SHAPE = tiny_shape("roberta")
BUDGET = 6_000  # rank 18 on qk and qv, 12 on ffn, beside the full head
SPACE = Space(targets=("qk", "qv", "ffn"), dropout=Range(low=0.0, high=0.2), learning_rate=Range(low=1e-4, high=1e-2))
BOTH_HEADS = SPACE.model_copy(update={"heads": ("full", "out_proj")})
OUTSIDE = TrialSpec("qk", rank=4, alpha=8.0, dropout=0.1, learning_rate=2e-5)
INSIDE = replace(OUTSIDE, learning_rate=2e-4)
TOTAL_STEPS, EVAL_EVERY, LOG_EVERY = 30, 10, 5
STARTUP_TRIALS = 4


def accuracy(spec: TrialSpec, step: int) -> float:
    """The made-up curve: it rises with the steps, to a level that the configuration decides."""
    level = 0.9 - 0.15 * abs(math.log10(spec.learning_rate) + 2.7) - 0.2 * abs(spec.dropout - 0.05)
    level += {"qk": -0.1, "qv": 0.0, "ffn": -0.03}[spec.targets] + 0.005 * spec.rank - 0.002 * spec.alpha / spec.rank
    level += 0.01 if spec.head == "full" else 0.0
    return 0.25 + (level - 0.25) * (1 - math.exp(-step / 12))


def macro_f1(spec: TrialSpec, step: int) -> float:
    """Made up as well: the better a trial's accuracy, the worse it is."""
    return 1.2 - accuracy(spec, step)


def eval_point(plan: TrialPlan, step: int) -> EvalPoint:
    final, spec = step == TOTAL_STEPS, plan.spec
    scored, rows = accuracy(spec, step), 200 if final else 50
    right = packed(np.random.default_rng([plan.seed, step]).random(rows) < scored)
    return EvalPoint(plan.trial, step, scored, macro_f1(spec, step), 1 - scored, rows, final, 1_000 + step, right)


def train_point(plan: TrialPlan, step: int) -> TrainPoint:
    return TrainPoint(plan.trial, step, 2 - accuracy(plan.spec, step), plan.spec.learning_rate, 1_000 + step)


class ScriptedEngine:
    """Implements `Engine` with `num_slots` trials at once, all of which advance by one step at a time.

    script: {(trial, step): what happens there, before the step is evaluated}. A TrainingError raised there is the
    trial's fault, anything else the engine's. each_step: called after each step of all slots.
    """

    def __init__(
        self,
        num_slots: int = 1,
        script: Mapping[tuple[str, int], Callable[[], None]] | None = None,
        each_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_slots = num_slots
        self.script = dict(script or {})
        self.each_step = each_step
        self.plans: list[TrialPlan] = []
        self.num_steps = self.num_idle = 0  # of all slots together, and of those a slot stood empty
        self._slots: dict[str, tuple[TrialPlan, int]] = {}

    def run(self, source: TrialSource, observer: Observer) -> None:
        while not observer.stop_requested():
            while resumed := self._fill(source):
                self._evaluate(observer, resumed)
            if not self._slots:
                return
            self._advance(observer)
            if not observer.stop_requested():
                self._evaluate(observer, self._slots)
            self.each_step()
        for plan, step in self._slots.values():
            checkpoint(plan, step, observer)
        self._slots.clear()

    def _fill(self, source: TrialSource) -> list[str]:
        """The trials that go on from a checkpoint: its evaluation was broken off by the stop."""
        resumed = []
        while len(self._slots) < self.num_slots and (plan := source.next()) is not None:
            self.plans.append(plan)
            plan.folder.mkdir(parents=True, exist_ok=True)
            step = checkpoints.step_of(plan.checkpoint) if plan.checkpoint else 0
            self._slots[plan.trial] = plan, step
            if step:
                resumed.append(plan.trial)
        return resumed

    def _advance(self, observer: Observer) -> None:
        self.num_steps += self.num_slots
        self.num_idle += self.num_slots - len(self._slots)
        for trial, (plan, before) in list(self._slots.items()):
            step = before + 1
            self._slots[trial] = plan, step
            try:
                self.script.get((trial, step), lambda: None)()
            except Exception as error:
                del self._slots[trial]
                observer.failed(trial, error)
                if not isinstance(error, TrainingError):
                    raise
                continue
            if step % LOG_EVERY == 0:
                observer.logged([train_point(plan, step)])

    def _evaluate(self, observer: Observer, trials: Iterable[str]) -> None:
        slots = [self._slots[trial] for trial in trials]
        due = [(plan, step) for plan, step in slots if step % EVAL_EVERY == 0]
        for plan, step in due:
            checkpoint(plan, step, observer)
        points = [eval_point(plan, step) for plan, step in due]
        verdicts = observer.evaluated(points) if points else []
        for (plan, step), point, verdict in zip(due, points, verdicts, strict=True):
            if point.final or verdict is Verdict.PRUNE:
                del self._slots[plan.trial]
                observer.finished(result(plan, step, point if point.final else None))


def checkpoint(plan: TrialPlan, step: int, observer: Observer) -> None:
    """Write a checkpoint that holds the trial's name, and report it."""
    with checkpoints.written(plan.trial, plan.folder, step) as folder:
        (folder / "state").write_text(plan.trial)
    observer.checkpointed(plan.trial, step, checkpoints.folder_of(plan.folder, step))


def result(plan: TrialPlan, step: int, final: EvalPoint | None) -> TrialResult:
    adapter = plan.folder / "adapter" if final else None
    if adapter is not None:
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(plan.trial.encode())
    return TrialResult(
        trial=plan.trial,
        steps=step,
        total_steps=TOTAL_STEPS,
        final=final,
        adapter=adapter,
        trainable_parameters=trainable_parameters(plan.spec, SHAPE),
        rows_seen=16 * step,
        train_seconds=1.0,
        eval_seconds=0.5,
        peak_memory_bytes=1_000,
    )


@dataclass
class Recorded:
    """What a tracker was told of one trial."""

    spec: TrialSpec
    facts: dict[str, Any]
    run_id: str
    points: list[TrainPoint | EvalPoint] = field(default_factory=list)
    ends: list[tuple[RunState, TrialResult | None, str | None]] = field(default_factory=list)


class RecordingTracker:
    """Implements `Tracker`: keeps what it is told, in the order of the trials' starts."""

    def __init__(self) -> None:
        self.trials: dict[str, Recorded] = {}

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        self.trials[trial] = Recorded(spec, facts, run_id or f"run-of-{trial}")
        return self.trials[trial].run_id

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        self.trials[trial].points += points

    def finish_trial(self, trial: str, end: TrialEnd) -> None:
        self.trials[trial].ends.append((end.state, end.result, end.report or end.reason))


class RecordingScreen:
    """Implements `Screen`: the lines it would show, and the trials that are on it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.running: set[str] = set()
        self.total_trials = 0

    def trial_started(
        self, trial: str, spec: TrialSpec | None, total_steps: int, confirms: bool, baseline: bool
    ) -> None:
        self.running.add(trial)
        self.lines.append(f"{trial} started: {spec}, {total_steps} steps")

    def logged(self, points: Sequence[TrainPoint]) -> None:
        assert {point.trial for point in points} <= self.running

    def evaluated(self, points: Sequence[EvalPoint]) -> None:
        assert {point.trial for point in points} <= self.running

    def planned(self, total_trials: int, confirms: bool) -> None:
        self.total_trials = total_trials

    def message(self, text: str) -> None:
        self.lines.append(text)

    def trial_ended(self, trial: str, state: str, scores: EvalPoint | None, reason: str | None) -> None:
        self.running.remove(trial)
        self.lines.append(f"{trial} {state}: {reason}")


@dataclass
class Session:
    """One start of a sweep whose stores lie below `root`: everything is opened anew.

    confirmation: how many of the best trials are repeated, and the runs of each; None: the search alone.
    """

    root: Path
    trials: int
    baseline: TrialSpec = OUTSIDE
    space: Space = SPACE
    pruner: BasePruner = field(default_factory=lambda: McNemarPruner(0.5, TOTAL_STEPS))
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    tracker: Any = field(default_factory=RecordingTracker)
    patience: float = 300.0
    stopped: bool = False
    objective: Objective = "accuracy"
    confirmation: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        asked, shared = (of(self.space, SHAPE, BUDGET) for of in (search_space.distributions, search_space.shared))
        sampler = TrialSeededTPE(7, STARTUP_TRIALS, asked, shared)
        described = search_space.describe(self.space, SHAPE, BUDGET)
        fingerprint = {"objective": self.objective, "budget": BUDGET, "space": described}
        self.study = open_study(open_storage(self.root), "scripted", fingerprint, sampler, self.pruner, new=False)
        enqueue_baseline(self.study, self.baseline, self.space, SHAPE, BUDGET)
        self.screen = RecordingScreen()
        self.driver = self.drive(self.study, self.trials, self.confirm)

    def confirm(self, left: int) -> optuna.Study | None:
        """The study of the repetitions that are sure with so many trials left."""
        return open_confirmation(self.study, *self.confirmation, 7, left) if self.confirmation else None

    def drive(
        self,
        study: optuna.Study,
        num_trials: int,
        confirm: Callable[[int], optuna.Study | None] = lambda left: None,
    ) -> Driver:
        """A driver of the study, or of its confirmation alone."""
        search = Search(
            space=self.space,
            shape=SHAPE,
            budget=BUDGET,
            seed=7,
            baseline=self.baseline,
            baseline_seed=42,
            total_steps=TOTAL_STEPS,
            num_trials=num_trials,
            objective=self.objective,
        )
        folder = self.root / "work"
        return Driver(study, search, self.tracker, self.screen, folder, lambda: self.stopped, self.patience, confirm)

    def stop(self) -> None:
        self.stopped = True

    def run(self) -> optuna.Study:
        self.driver.run(self.engine)
        return self.study
