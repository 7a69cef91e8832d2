"""The runner: feeds an engine from a study, and takes down what comes back.

It is the engine's `TrialSource` and its `Observer`. What a trial did goes to the study, to the tracker that it was
handed, and to the screen.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.trial import TrialState

from agnews_lora.adapters.budget import require_within_budget
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.errors import BudgetError
from agnews_lora.search import space as search_space
from agnews_lora.search import study as study_keys
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.study import ENDED, give_back, trial_name
from agnews_lora.training.contracts import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict

RunState = Literal["COMPLETE", "PRUNED", "FAILED", "INTERRUPTED"]


class Tracker(Protocol):
    """Where runs are recorded."""

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        """Open the trial's run, or open it again, and give its id."""
        ...

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None: ...

    def finish_trial(self, trial: str, state: RunState, result: TrialResult | None, reason: str | None) -> None: ...


class Screen(Protocol):
    """Where progress is shown."""

    def trial_started(self, trial: str, label: str, total_steps: int) -> None: ...

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> None: ...

    def trial_ended(self, trial: str, state: str, accuracy: float | None, reason: str | None) -> None: ...


@dataclass(frozen=True)
class Quest:
    """What is searched: the space under the budget, and how many trials are to end in all.

    total_steps: training steps of a trial that is not pruned.
    baseline_seed: the experiment's own seed, so that the baseline is the very run that `train` makes.
    """

    space: Space
    shape: ModelShape
    budget: int
    trials: int
    seed: int
    baseline: TrialSpec
    baseline_seed: int
    total_steps: int


@dataclass
class _Running:
    trial: optuna.Trial
    spec: TrialSpec
    baseline: bool
    checkpoint: tuple[int, Path] | None = None
    last: EvalPoint | None = None


@dataclass
class StudyRunner:
    """Asks the study for trials until `quest.trials` have ended, and tells it how they ended.

    folder: where each trial's work folder lies. stop: polled; once true, running trials are given back to the study.
    record_seconds: wall time spent here, in the study, the tracker and the screen.
    """

    study: optuna.Study
    quest: Quest
    tracker: Tracker
    screen: Screen
    folder: Path
    stop: Callable[[], bool]
    record_seconds: float = 0.0
    _running: dict[str, _Running] = field(default_factory=dict)

    # The engine's TrialSource

    def next(self) -> TrialPlan | None:
        """The next trial of the study; None once as many as were asked for have ended or run.

        A trial that someone enqueued beyond the budget is failed with the reason, before anything is loaded for it.
        """
        began = time.perf_counter()
        try:
            while not self.stop() and self._ended() + len(self._running) < self.quest.trials:
                if (plan := self._ask()) is not None:
                    return plan
            return None
        finally:
            self.record_seconds += time.perf_counter() - began

    def _ended(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=ENDED))

    def _ask(self) -> TrialPlan | None:
        quest, trial = self.quest, self.study.ask()
        name = trial_name(trial.number)
        baseline = bool(trial.user_attrs.get(study_keys.BASELINE))
        spec = quest.baseline if baseline else search_space.suggest(trial, quest.space, quest.shape, quest.budget)
        trial.set_user_attr(study_keys.SPEC, spec.as_dict())
        self._running[name] = _Running(trial, spec, baseline)
        seed = quest.baseline_seed if baseline else derived_seed(quest.seed, trial.number)
        facts: dict[str, Any] = {"seed": seed, "baseline": baseline, "study_trial": trial.number}
        try:
            facts[study_keys.TRAINABLE] = require_within_budget(spec, quest.shape, quest.budget)
        except BudgetError as error:
            self._open(name, facts)
            self._fail(name, str(error), str(error))
            return None
        trial.set_user_attr(study_keys.TRAINABLE, facts[study_keys.TRAINABLE])
        self._open(name, facts)
        checkpoint = trial.user_attrs.get(study_keys.CHECKPOINT)
        folder = self.folder / name
        return TrialPlan(
            trial=name,
            spec=spec,
            seed=seed,
            folder=folder,
            checkpoint=path if checkpoint and (path := folder / checkpoint).is_dir() else None,
        )

    def _open(self, name: str, facts: dict[str, Any]) -> None:
        running = self._running[name]
        attributes = running.trial.user_attrs
        run_id = self.tracker.start_trial(name, running.spec, facts, attributes.get(study_keys.RUN_ID))
        if attributes.get(study_keys.RUN_ID) != run_id:
            running.trial.set_user_attr(study_keys.RUN_ID, run_id)
        self.screen.trial_started(
            name, f"{running.spec}{' (baseline)' if running.baseline else ''}", self.quest.total_steps
        )

    # The engine's Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        began = time.perf_counter()
        for point in points:
            self.tracker.log_points(point.trial, [point])
        self.screen.logged(points)
        self.record_seconds += time.perf_counter() - began

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        """All points are reported before the first is judged: some pruners depend on the order."""
        began = time.perf_counter()
        for point in points:
            running = self._running[point.trial]
            running.last = point
            running.trial.report(point.accuracy, point.step)
            self.tracker.log_points(point.trial, [point])
        self.screen.evaluated(points)
        verdicts = [self._judge(point) for point in points]
        self.record_seconds += time.perf_counter() - began
        return verdicts

    def _judge(self, point: EvalPoint) -> Verdict:
        running = self._running[point.trial]
        if point.final or running.baseline:
            return Verdict.CONTINUE
        return Verdict.PRUNE if running.trial.should_prune() else Verdict.CONTINUE

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        self._running[trial].checkpoint = (step, path)

    def finished(self, result: TrialResult) -> None:
        began = time.perf_counter()
        name, running = result.trial, self._running[result.trial]
        if result.final is None:
            accuracy = running.last.accuracy if running.last else None
            reason = f"below the median of finished trials at step {result.steps} of {result.total_steps}"
            running.trial.set_user_attr(study_keys.REASON, reason)
            self.tracker.finish_trial(name, "PRUNED", result, reason)
            self._end(name, TrialState.PRUNED, accuracy, reason)
        else:
            final = result.final
            running.trial.set_user_attr(study_keys.LOSS, final.loss)
            running.trial.set_user_attr(study_keys.MACRO_F1, final.macro_f1)
            self.tracker.finish_trial(name, "COMPLETE", result, None)
            self._end(name, TrialState.COMPLETE, final.accuracy, None)
        self.record_seconds += time.perf_counter() - began

    def failed(self, trial: str, error: Exception) -> None:
        self._fail(trial, str(error), "".join(traceback.format_exception(error)))

    def stop_requested(self) -> bool:
        return self.stop()

    # How trials end

    def _fail(self, name: str, reason: str, report: str) -> None:
        self._running[name].trial.set_user_attr(study_keys.REASON, reason)
        self.tracker.finish_trial(name, "FAILED", None, report)
        self._end(name, TrialState.FAIL, None, reason)

    def _end(self, name: str, state: TrialState, accuracy: float | None, reason: str | None) -> None:
        trial = self._running.pop(name).trial
        self.study.tell(trial, accuracy if state is TrialState.COMPLETE else None, state=state)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # what is kept of an ended trial is in its run
        self.screen.trial_ended(name, state.name, accuracy, reason)

    def close(self) -> None:
        """Give back to the study what did not end, with its checkpoint, and close its runs."""
        for name, running in list(self._running.items()):
            at = "no step"
            if running.checkpoint is not None:
                step, path = running.checkpoint
                running.trial.set_user_attr(study_keys.CHECKPOINT, path.name)
                at = f"step {step}"
            self.tracker.finish_trial(name, "INTERRUPTED", None, f"stopped; goes on from {at} at the next start")
            give_back(self.study, running.trial._trial_id)
            self.screen.trial_ended(name, "INTERRUPTED", None, f"goes on from {at} at the next start")
            del self._running[name]
