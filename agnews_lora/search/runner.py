"""The runner: feeds an engine from a study, and takes down what comes back.

It is the engine's `TrialSource` and its `Observer`. What a trial did goes to its journal on disk first, then to the
study and to the tracker that the runner was handed. Either may go away for a while: training goes on, and what was not
delivered is delivered later, in order. Several runners may work on one study, wherever they are (`claims`, `leases`).
"""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from agnews_lora.adapters.budget import require_within_budget, trainable_parameters
from agnews_lora.errors import BudgetError
from agnews_lora.search import study as study_keys
from agnews_lora.search.claims import MAX_ATTEMPTS, claim, is_done
from agnews_lora.search.delivery import Deliveries
from agnews_lora.search.held import Held, Screen, Tracker
from agnews_lora.search.leases import Leases
from agnews_lora.search.lines import PATIENCE_SECONDS, Line
from agnews_lora.search.quest import Quest, is_baseline
from agnews_lora.search.standings import name_of
from agnews_lora.search.study import ENDED
from agnews_lora.search.trial_log import End
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import Engine, EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict

IDLE_SECONDS: Final = 1.0  # between two looks for a trial, where others still train theirs


@dataclass
class StudyRunner:
    """Claims trials of the study until as many as were asked for have ended, and tells it how they ended.

    folder: where each trial's work folder lies. stop: polled; once true, nothing is started any more. patience: seconds
    that the study's storage or the tracker may be away. record_seconds: wall time spent here, in the study, the tracker
    and the screen.
    """

    study: optuna.Study
    leases: Leases
    quest: Quest
    tracker: Tracker
    screen: Screen
    folder: Path
    stop: Callable[[], bool]
    patience: float = PATIENCE_SECONDS
    record_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._deliveries = Deliveries(self.study, self.leases, self.tracker, self.screen, self.folder, self.patience)

    def work(self, engine: Engine) -> None:
        """Let an engine train until no trial of the study is left or running anywhere, or a stop is due.

        Raises:
            StorageError: a store was lost; what it did not get lies in the work folder, for the next start.
        """
        try:
            while not (self.stop() or self._deliveries.loss):
                engine.run(self, self)
                if self.leases.lost:
                    self.close()  # what is left is claimed again
                self._deliveries.catch_up()
                if not self._deliveries.held and self._storage.ask(lambda: is_done(self.study), False):
                    return
                time.sleep(IDLE_SECONDS)
        finally:
            self.close()
        if loss := self._deliveries.loss:
            raise loss

    def close(self) -> None:
        """Give back to the study what did not end, to go on from its checkpoint, and close its runs."""
        self._deliveries.close()

    @property
    def _storage(self) -> Line:
        return self._deliveries.storage

    # The engine's TrialSource

    def next(self) -> TrialPlan | None:
        """The next trial of the study; None where there is none to start now.

        A trial that someone enqueued beyond the budget is failed with the reason, before anything is loaded for it.
        """
        with self._recorded():
            self._deliveries.catch_up()
            while not self.stop_requested():
                if (held := self._storage.ask(self._claim, None)) is None:
                    return None
                if (plan := self._plan(held)) is not None:
                    return plan
        return None

    def _claim(self) -> Held | None:
        """Claim a trial and settle its configuration: all that needs the study."""
        with self.leases.queue(self.stop) as mine:
            held = {name: each.attempts for name, each in self._deliveries.held.items()}
            trial = claim(self.study, self.leases, held) if mine else None
        if trial is None:
            return None
        name = name_of(trial)
        attempts = int(trial.user_attrs.get(study_keys.ATTEMPTS, 0))
        held_trial = Held(
            name,
            trial,
            is_baseline(trial),
            attempts=attempts + 1,
            checkpoint_step=int(trial.user_attrs.get(study_keys.CHECKPOINT, 0)),
        )
        try:
            return self._configured(held_trial, attempts)
        except UpdateFinishedTrialError:  # somebody else took it over and ended it, while this process was away
            self.leases.release(name)
            return None

    def _configured(self, held_trial: Held, attempts: int) -> Held:
        trial, quest = held_trial.trial, self.quest
        try:
            spec = quest.configuration(trial)
        except ValueError as error:  # Optuna's, of a value that someone enqueued
            held_trial.fault = End("FAILED", reason=f"enqueued with a value that no trial can have: {error}")
            return held_trial
        trial.set_user_attr(study_keys.SPEC, spec.as_dict())
        trial.set_user_attr(study_keys.SEED, quest.seed_of(trial))
        trial.set_user_attr(study_keys.TRAINABLE, trainable_parameters(spec, quest.shape))
        held_trial.spec = spec
        if attempts >= MAX_ATTEMPTS:
            held_trial.fault = _exhausted(held_trial)
        else:
            trial.set_user_attr(study_keys.ATTEMPTS, attempts + 1)
        return held_trial

    def _plan(self, held: Held) -> TrialPlan | None:
        """What the engine is to train; None where the trial has ended before it starts."""
        self._deliveries.admit(held)
        quest, spec = self.quest, held.spec
        label = f"{spec or 'enqueued by hand'}{' (baseline)' if held.baseline and spec else ''}"
        self.screen.trial_started(held.name, label, quest.total_steps)
        seed = quest.seed_of(held.trial)
        held.facts = {"seed": seed, "baseline": held.baseline, **quest.facts_of(held.trial)}
        if spec is not None:
            held.facts["trainable_parameters"] = trainable_parameters(spec, quest.shape)
            try:
                require_within_budget(spec, quest.shape, quest.budget)
            except BudgetError as error:
                held.fault = End("FAILED", reason=str(error))
        if held.fault is not None and held.journal.end is None:
            held.journal.finish(held.fault)
        self._deliveries.deliver(held)
        if held.journal.end is not None:  # an earlier process ended it, and could not tell
            return None
        assert spec is not None
        return TrialPlan(held.name, spec, seed, self.folder / held.name, self._checkpoint(held))

    def _checkpoint(self, held: Held) -> Path | None:
        """The newest sound checkpoint that can be had: here, else from the run's artifacts."""
        folder, known = self.folder / held.name, held.checkpoint_step
        found = checkpoints.newest(folder)
        if known and (found is None or checkpoints.step_of(found) < known):
            self._deliveries.fetch_checkpoints(held)
            found = checkpoints.newest(folder)
        step = checkpoints.step_of(found) if found else 0
        if found is None and known:
            self.screen.message(
                f"{held.name} starts again from step 0: its checkpoint of step {known} can be had neither here nor "
                f"from its run{'' if self._deliveries.runs.up else ', which cannot be reached'}"
            )
        elif found is not None and step < known:
            self.screen.message(
                f"{held.name} goes on from {found.name}: the one of step {known} is damaged or elsewhere"
            )
        held.checkpoint_step = step
        return found

    # The engine's Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        with self._recorded():
            self.screen.logged(points)
            self._deliveries.note(points)

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        """All points are reported before the first is judged: some pruners depend on the order."""
        with self._recorded():
            self.screen.evaluated(points)
            self._deliveries.note(points)
            return [self._judge(point) for point in points]

    def _judge(self, point: EvalPoint) -> Verdict:
        """Where the study cannot be asked, the trial goes on, to be judged at its next evaluation."""
        held = self._deliveries.held[point.trial]
        if point.final or held.baseline or held.study_is_behind:
            return Verdict.CONTINUE
        return Verdict.PRUNE if self._storage.ask(held.trial.should_prune, False) else Verdict.CONTINUE

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        with self._recorded():
            held = self._deliveries.held[trial]
            if step > held.checkpoint_step:
                held.checkpoint_step, held.attempts = step, 0
            self._deliveries.keep_checkpoint(held, path)

    def finished(self, result: TrialResult) -> None:
        with self._recorded():
            if result.final is None:
                reason = f"below the median of all other trials at step {result.steps} of {result.total_steps}"
                self._deliveries.finish(result.trial, End("PRUNED", result, reason))
            else:
                self._deliveries.finish(result.trial, End("COMPLETE", result))

    def failed(self, trial: str, error: Exception) -> None:
        with self._recorded():
            report = "".join(traceback.format_exception(error))
            self._deliveries.finish(trial, End("FAILED", None, str(error) or type(error).__name__, report))

    def stop_requested(self) -> bool:
        return self.stop() or self._deliveries.loss is not None or bool(self.leases.lost)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Count the wall time inside as time of recording."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.record_seconds += time.perf_counter() - began


def _exhausted(held: Held) -> End:
    reached = f"the checkpoint of step {held.checkpoint_step}" if held.checkpoint_step else "a first checkpoint"
    return End(
        "FAILED",
        reason=f"{MAX_ATTEMPTS} attempts in a row ended without getting beyond {reached}: each time the process died "
        "(killed, or out of memory); it is not tried again",
    )


def tidy(study: optuna.Study, folder: Path) -> None:
    """Remove the work folders of trials that have ended: a kill may have come between the two."""
    ended = {name_of(trial) for trial in study.get_trials(deepcopy=False, states=ENDED)}
    for left in folder.glob("t*"):
        if left.name in ended:
            shutil.rmtree(left, ignore_errors=True)
