"""The runner: feeds an engine from a study, and takes down what comes back.

It is the engine's `TrialSource` and its `Observer`. What a trial did goes to the study, to the tracker that it was
handed, and to the screen.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.trial import TrialState

from agnews_lora.adapters.budget import require_within_budget, trainable_parameters
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
    """A trial that was asked for and has not ended. opened: it has its run, and the screen shows it."""

    trial: optuna.Trial
    baseline: bool
    opened: bool = False
    last: EvalPoint | None = None


@dataclass
class StudyRunner:
    """Asks the study for trials until `quest.trials` have ended, and tells it how they ended.

    folder: where each trial's work folder lies. stop: polled; once true, nothing is started any more.
    record_seconds: wall time spent here, in the study, the tracker and the screen.
    """

    study: optuna.Study
    quest: Quest
    tracker: Tracker
    screen: Screen
    folder: Path
    stop: Callable[[], bool]
    record_seconds: float = field(default=0.0, init=False)
    _running: dict[str, _Running] = field(default_factory=dict, init=False)

    # The engine's TrialSource

    def next(self) -> TrialPlan | None:
        """The next trial of the study; None once as many as were asked for have ended or run.

        A trial that someone enqueued beyond the budget is failed with the reason, before anything is loaded for it.
        """
        with self._recorded():
            while not self.stop() and self._num_ended() + len(self._running) < self.quest.trials:
                if (plan := self._ask()) is not None:
                    return plan
        return None

    def _num_ended(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=ENDED))

    def _ask(self) -> TrialPlan | None:
        """Ask the study for a trial; None where the trial had to be failed at once."""
        quest, trial = self.quest, self.study.ask()
        name, baseline = trial_name(trial.number), bool(trial.user_attrs.get(study_keys.BASELINE))
        self._running[name] = _Running(trial, baseline)
        try:
            spec = self._configuration(trial, baseline)
        except ValueError as error:  # Optuna's, of a value that someone enqueued
            self.screen.trial_started(name, "enqueued by hand", quest.total_steps)
            self._fail(name, f"enqueued with a value that no trial can have: {error}", str(error))
            return None
        seed = quest.baseline_seed if baseline else derived_seed(quest.seed, trial.number)
        num_trainable = trainable_parameters(spec, quest.shape)
        trial.set_user_attr(study_keys.SPEC, spec.as_dict())
        trial.set_user_attr(study_keys.TRAINABLE, num_trainable)
        facts = {"seed": seed, "baseline": baseline, "study_trial": trial.number, "trainable_parameters": num_trainable}
        self._open(name, spec, facts)
        try:
            require_within_budget(spec, quest.shape, quest.budget)
        except BudgetError as error:
            self._fail(name, str(error), str(error))
            return None
        return TrialPlan(name, spec, seed, self.folder / name, self._checkpoint(name))

    def _configuration(self, trial: optuna.Trial, baseline: bool) -> TrialSpec:
        """What the trial is to train; a baseline from outside the space is not asked from it."""
        quest = self.quest
        if baseline and search_space.outside(quest.baseline, quest.space, quest.shape, quest.budget):
            return quest.baseline
        return search_space.suggest(trial, quest.space, quest.shape, quest.budget)

    def _open(self, name: str, spec: TrialSpec, facts: dict[str, Any]) -> None:
        running = self._running[name]
        known = running.trial.user_attrs.get(study_keys.RUN_ID)
        run_id = self.tracker.start_trial(name, spec, facts, known)
        self.screen.trial_started(name, f"{spec}{' (baseline)' if running.baseline else ''}", self.quest.total_steps)
        running.opened = True
        if run_id != known:
            running.trial.set_user_attr(study_keys.RUN_ID, run_id)

    def _checkpoint(self, name: str) -> Path | None:
        """The last checkpoint of the trial, where its folder is still there."""
        stored = self._running[name].trial.user_attrs.get(study_keys.CHECKPOINT)
        return path if stored and (path := self.folder / name / stored).is_dir() else None

    # The engine's Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        with self._recorded():
            for point in points:
                self.tracker.log_points(point.trial, [point])
            self.screen.logged(points)

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        """All points are reported before the first is judged: some pruners depend on the order."""
        with self._recorded():
            for point in points:
                running = self._running[point.trial]
                running.last = point
                running.trial.report(point.accuracy, point.step)
                self.tracker.log_points(point.trial, [point])
            self.screen.evaluated(points)
            return [self._judge(point) for point in points]

    def _judge(self, point: EvalPoint) -> Verdict:
        running = self._running[point.trial]
        if point.final or running.baseline:
            return Verdict.CONTINUE
        return Verdict.PRUNE if running.trial.should_prune() else Verdict.CONTINUE

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        with self._recorded():
            self._running[trial].trial.set_user_attr(study_keys.CHECKPOINT, path.name)

    def finished(self, result: TrialResult) -> None:
        with self._recorded():
            name, running = result.trial, self._running[result.trial]
            if result.final is None:
                accuracy = running.last.accuracy if running.last else None
                reason = f"below the median of all other trials at step {result.steps} of {result.total_steps}"
                self.tracker.finish_trial(name, "PRUNED", result, reason)
                self._end(name, TrialState.PRUNED, accuracy, reason)
            else:
                running.trial.set_user_attr(study_keys.LOSS, result.final.loss)
                running.trial.set_user_attr(study_keys.MACRO_F1, result.final.macro_f1)
                self.tracker.finish_trial(name, "COMPLETE", result, None)
                self._end(name, TrialState.COMPLETE, result.final.accuracy, None)

    def failed(self, trial: str, error: Exception) -> None:
        with self._recorded():
            self._fail(trial, str(error) or type(error).__name__, "".join(traceback.format_exception(error)))

    def stop_requested(self) -> bool:
        return self.stop()

    # How trials end

    def _fail(self, name: str, reason: str, report: str) -> None:
        if self._running[name].opened:
            self.tracker.finish_trial(name, "FAILED", None, report)
        self._end(name, TrialState.FAIL, None, reason)

    def _end(self, name: str, state: TrialState, accuracy: float | None, reason: str | None) -> None:
        trial = self._running[name].trial
        if reason is not None:
            trial.set_user_attr(study_keys.REASON, reason)
        self.study.tell(trial, accuracy if state is TrialState.COMPLETE else None, state=state)
        del self._running[name]
        shutil.rmtree(self.folder / name, ignore_errors=True)  # what is kept of an ended trial is in its run
        self.screen.trial_ended(name, state.name, accuracy, reason)

    def close(self) -> None:
        """Give back to the study what did not end, to go on from its checkpoint, and close its runs."""
        stopped = list(self._running.items())
        for _, running in stopped:
            give_back(self.study, running.trial._trial_id)
        for name, running in stopped:
            if running.opened:
                checkpoint = self._checkpoint(name)
                reason = f"goes on from {checkpoint.name if checkpoint else 'its first step'} at the next start"
                self.tracker.finish_trial(name, "INTERRUPTED", None, f"stopped; {reason}")
                self.screen.trial_ended(name, "INTERRUPTED", None, reason)
            del self._running[name]

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Count the wall time inside as time of recording."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.record_seconds += time.perf_counter() - began
