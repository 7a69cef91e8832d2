"""The driver: hands out the trials of a study, and records what is reported of them.

It is the engine's `TrialSource` and `Observer`, and the only writer of study, runs and screen. A point goes to the
trial log on disk first, then to the study and to the run that the tracker keeps (`sync`). Either store may be away for
a while: training goes on, and sync catches up.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.budget import require_within_budget, trainable_parameters
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.errors import BudgetError, RunDeleted, StorageError
from agnews_lora.search import space as search_space
from agnews_lora.search import study as keys
from agnews_lora.search.retry import PATIENCE_SECONDS, Retry
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.trial_log import Point, TrialLog
from agnews_lora.search.trials import ENDED_BY_OTHERS, trial_name
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import (
    COSTS,
    SCORES,
    Engine,
    EvalPoint,
    Objective,
    TrainPoint,
    TrialEnd,
    TrialPlan,
    TrialResult,
    Verdict,
)

MAX_ATTEMPTS: Final = 5  # in a row without a new checkpoint
SUSPECT_ATTEMPTS: Final = 2  # from then on a trial trains alone in its process, so that it takes no other with it
MAX_PENDING_POINTS: Final = 200  # training points go to the run with the next evaluation, or when so many wait
IDLE_SECONDS: Final = 1.0


class Tracker(Protocol):
    """Where runs are recorded. Each call may raise StorageError, and may then be repeated."""

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        """Open the trial's run, or reopen it, and return its id."""
        ...

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None: ...

    def finish_trial(self, trial: str, end: TrialEnd) -> None: ...


class Screen(Protocol):
    """Where progress is shown."""

    def trial_started(
        self, trial: str, spec: TrialSpec | None, total_steps: int, confirms: bool, baseline: bool
    ) -> None: ...

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> None: ...

    def trial_ended(self, trial: str, state: str, scores: EvalPoint | None, reason: str | None) -> None: ...

    def planned(self, total_trials: int, confirms: bool) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class Search:
    """What the trials of a study are drawn from.

    Args:
        baseline_seed: the experiment's own seed, so that the baseline is the very run that `train` makes.
        total_steps: of a trial that is not pruned.
        num_trials: how many are to end in all, beside those that a person enqueued on top (`keys.ENQUEUED`).
        objective: the score that is the study's value.
    """

    space: Space
    shape: ModelShape
    budget: int
    seed: int
    baseline: TrialSpec
    baseline_seed: int
    total_steps: int
    num_trials: int
    objective: Objective = "accuracy"

    def configuration(self, trial: optuna.Trial) -> TrialSpec:
        """The adapter of a trial: as given with its name (`enqueue_named`), the baseline's, or asked from the space.

        Raises:
            ValueError: a person enqueued what no trial can have.
        """
        attributes = trial.user_attrs
        if attributes.get(keys.NAME):
            return TrialSpec(**attributes[keys.SPEC])
        if attributes.get(keys.BASELINE) and search_space.outside(self.baseline, self.space, self.shape, self.budget):
            return self.baseline  # from outside the space: not asked from it
        given = keys.given(trial.storage.get_trial(trial._trial_id))
        if faults := search_space.faults(given, self.space, self.shape, self.budget):
            raise ValueError("; ".join(faults))
        spec = search_space.suggest(trial, self.space, self.shape, self.budget)
        if given.get("head", spec.head) != spec.head:
            raise ValueError(f"head {given['head']!r} does not fit the budget with targets {spec.targets}")
        return spec

    def seed_of(self, trial: optuna.Trial) -> int:
        """The seed of a trial's initialisation, dropout and data order."""
        if trial.user_attrs.get(keys.NAME):
            return int(trial.user_attrs[keys.SEED])
        return self.baseline_seed if trial.user_attrs.get(keys.BASELINE) else derived_seed(self.seed, trial.number)


@dataclass
class ActiveTrial:
    """A trial that a worker trains, and how far its study and its run are behind its log.

    spec: None where it has no configuration that could train. fault: why it cannot train. attempts: begun since its
    last new checkpoint, this one included. logged, reported: points of the log that the run and the study have.
    opened, closed: its run. detached: somebody else has ended it in the study. stopped: a person has asked for its end.
    """

    name: str
    trial: optuna.Trial
    worker: str
    objective: Objective
    attempts: int
    checkpoint_step: int
    spec: TrialSpec | None = None
    fault: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    logged: int = 0
    reported: int = 0
    opened: bool = False
    closed: bool = False
    detached: bool = False
    stopped: bool = False
    log: TrialLog = field(init=False)

    def read_stop(self) -> None:
        """Learn from the study whether a person has asked for its end."""
        trial = self.trial.storage.get_trial(self.trial._trial_id)
        self.stopped = self.stopped or keys.is_stopped(trial)

    @property
    def is_reference(self) -> bool:
        """Whether it is trained to its end: the baseline, and what is known to be good, are what others have to beat.

        Early scores tell little: where the baseline had a lucky start, all known configurations would be pruned.
        """
        return self.facts["baseline"] or "source" in self.facts

    @property
    def run_is_behind(self) -> bool:
        """Whether the run lacks an event that it should have by now."""
        if self.spec is None:  # no run: there is no configuration to show
            return False
        pending = self.log.points[self.logged :]
        due = len(pending) >= MAX_PENDING_POINTS or any(isinstance(point, EvalPoint) for point in pending)
        return not self.opened or due or (self.log.end is not None and not self.closed)

    def sync_run(self, tracker: Tracker) -> None:
        """Bring the run up to the trial log. One that somebody deleted meanwhile is made again."""
        try:
            self._deliver(tracker)
        except RunDeleted:
            self.opened, self.logged = False, 0
            self._deliver(tracker)

    def _deliver(self, tracker: Tracker) -> None:
        assert self.spec is not None
        if not self.opened:
            self.run_id = tracker.start_trial(self.name, self.spec, self.facts, self.trial.user_attrs.get(keys.RUN_ID))
            self.opened = True
        if pending := self.log.points[self.logged :]:
            tracker.log_points(self.name, pending)
            self.logged += len(pending)
        if self.log.end is not None and not self.closed:
            tracker.finish_trial(self.name, self.log.end)
            self.closed = True

    def interrupt_run(self, tracker: Tracker, end: TrialEnd) -> None:
        """Close the run of a trial that did not end; one that somebody deleted is closed enough."""
        with suppress(RunDeleted):
            tracker.finish_trial(self.name, end)

    @property
    def study_is_behind(self) -> bool:
        """Whether the study lacks an event that it should have by now."""
        pending = self.log.points[self.reported :]
        return not self.detached and (
            any(isinstance(point, EvalPoint) for point in pending) or bool(self._new_attributes())
        )

    def sync_study(self) -> None:
        """Bring the study up to the trial log."""
        for key, value in self._new_attributes().items():
            self.trial.set_user_attr(key, value)
        for point in self.log.points[self.reported :]:
            if isinstance(point, EvalPoint):
                if point.right:  # by the storage: no attribute for a dashboard
                    key = f"{keys.RIGHT}{point.step}"
                    self.trial.storage.set_trial_system_attr(self.trial._trial_id, key, point.right)
                self.trial.report(point.score(self.objective), point.step)
            self.reported += 1

    def _new_attributes(self) -> dict[str, Any]:
        known: dict[str, Any] = self.trial.user_attrs
        present: dict[str, Any] = {}
        if self.checkpoint_step > (known.get(keys.CHECKPOINT) or 0):
            present[keys.ATTEMPTS] = self.attempts
        if self.checkpoint_step != (known.get(keys.CHECKPOINT) or 0):
            present[keys.CHECKPOINT] = self.checkpoint_step
        if self.run_id is not None:
            present[keys.RUN_ID] = self.run_id
        return {key: value for key, value in present.items() if known.get(key) != value}

    def tell(self) -> None:
        """Tell the study how the trial ended, unless it knows: its answer may have been lost on the way."""
        end, study = self.log.end, self.trial.study
        assert end is not None
        if self.detached or self.trial.storage.get_trial(self.trial._trial_id).state.is_finished():
            return
        if end.reason is not None:
            self.trial.set_user_attr(keys.REASON, end.reason)
        if (scores := self.log.evaluation) is not None:
            self.trial.set_user_attr(keys.SCORES, {name: getattr(scores, name) for name in (*SCORES, "loss", "rows")})
        if end.result is not None:
            self.trial.set_user_attr(keys.COSTS, {name: getattr(end.result, name) for name in COSTS})
        if end.state != "COMPLETE":
            state = TrialState.PRUNED if end.state == "PRUNED" else TrialState.FAIL
            study.tell(self.trial, state=state, skip_if_finished=True)
            return
        assert end.result is not None and end.result.final is not None
        value = end.result.final.score(self.objective)
        study.tell(self.trial, value, state=TrialState.COMPLETE, skip_if_finished=True)


class Driver:
    """Drives a study until as many trials have ended as were asked for. All calls come from one thread.

    Args:
        folder: each trial's work folder lies below it.
        stop: polled; once true, no trial starts any more.
        patience: seconds that a store may be away.
        confirm: the study of the repetitions by how many trials of the search are left, see `open_confirmation`. They
            train when the search has no trial to start.
    """

    def __init__(
        self,
        study: optuna.Study,
        search: Search,
        tracker: Tracker,
        screen: Screen,
        folder: Path,
        stop: Callable[[], bool],
        patience: float = PATIENCE_SECONDS,
        confirm: Callable[[int], optuna.Study | None] = lambda left: None,
    ) -> None:
        self.folder = folder
        self.active: dict[str, ActiveTrial] = {}
        self.record_seconds = 0.0  # wall time spent here: in study, tracker and screen
        self._study = study
        self._search = search
        self._tracker = tracker
        self._screen = screen
        self._stop = stop
        self._confirm = confirm
        self._rounds: optuna.Study | None = None
        self._rounds_after: tuple[int, int] | None = None  # trials left and repetitions ended when those were opened
        self._planned: dict[bool, int] = {}  # trials of the search (True) and repetitions, as the screen knows
        self._storage = Retry("the study's storage", patience)
        self._runs = Retry("the run store", patience)

    def run(self, engine: Engine) -> None:
        """Let an engine of this process train until the study is done, or a stop is due.

        Raises:
            StorageError: a store is lost; the trial logs keep what it did not get, for the next start.
        """
        with self.driving():
            while not self.stop_requested():
                engine.run(self, self)
                self.catch_up()
                if self.is_done():
                    return
                time.sleep(IDLE_SECONDS)

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Return the trials that did not end to the queue at the end of the block.

        Raises:
            StorageError: a store was lost.
        """
        try:
            yield
        finally:
            self._close()
        if self.loss:
            raise self.loss

    @property
    def loss(self) -> StorageError | None:
        """What to tell the user once a store is lost."""
        return self._storage.loss or self._runs.loss

    def is_done(self) -> bool:
        """Whether as many trials have ended as were asked for, with their repetitions, and none is active."""
        return not self.active and self._storage.call(
            lambda: not any(num_left(study, num_trials) for study, num_trials in self._studies()), False
        )

    # TrialSource

    def next(self, worker: str = "") -> TrialPlan | None:
        """The next trial to train, or None: there is none to start now.

        A trial that cannot train (a value that no trial can have, over the budget) fails with the reason, before
        anything is loaded for it.

        Args:
            worker: the process that trains it.
        """
        with self._recorded():
            self.catch_up()
            while not self.stop_requested():
                if (active := self._storage.call(partial(self._ask, worker), None)) is None:
                    return None
                if (plan := self._start(active)) is not None:
                    return plan
        return None

    def _studies(self) -> Iterator[tuple[optuna.Study, int]]:
        """The search, then its confirmation, each with the number of trials that are to end in it."""
        yield self._study, self._search.num_trials
        left = num_left(self._study, self._search.num_trials)
        repeats = self._rounds.get_trials(deepcopy=False) if self._rounds else []
        after = left, sum(trial.state.is_finished() for trial in repeats)
        if after != self._rounds_after:  # else nothing has ended since
            self._rounds, self._rounds_after = self._confirm(left), after
        if self._rounds is not None:
            yield self._rounds, len(self._rounds.get_trials(deepcopy=False))

    def _ask(self, worker: str) -> ActiveTrial | None:
        """Ask the studies for a trial. One that is running there, but trains nowhere, comes first: its process died."""
        mine = [active for active in self.active.values() if active.worker == worker and active.log.end is None]
        if any(active.attempts > SUSPECT_ATTEMPTS for active in mine):
            return None
        for study, num_trials in self._studies():
            trials = study.get_trials(deepcopy=False)
            planned = num_trials + keys.num_enqueued(trials)
            searches = study is self._study
            if planned != self._planned.get(searches):
                if searches:
                    study.set_user_attr(keys.PLANNED, num_trials)
                self._planned[searches] = planned
                self._screen.planned(planned, confirms=not searches)
            for trial in trials:
                lost = trial.state is TrialState.RUNNING and trial_name(trial) not in self.active
                if lost and not (mine and _is_suspect(trial)):
                    return self._configured(keys.running(study, trial), worker)
            waiting = [trial for trial in trials if trial.state is TrialState.WAITING]
            if len(trials) - len(waiting) < planned:
                alone = mine and waiting and _is_suspect(waiting[0])
                return None if alone else self._configured(study.ask(), worker)
        return None

    def _configured(self, trial: optuna.Trial, worker: str) -> ActiveTrial:
        """The trial with its configuration, seed and size, also as attributes of the study's trial."""
        attributes, search = trial.user_attrs, self._search
        attempts = int(attributes.get(keys.ATTEMPTS) or 0)
        name, checkpoint_step = trial_name(trial), int(attributes.get(keys.CHECKPOINT) or 0)
        active = ActiveTrial(name, trial, worker, search.objective, attempts + 1, checkpoint_step)
        active.read_stop()
        try:
            active.spec = search.configuration(trial)
        except ValueError as error:
            active.fault = f"enqueued with a value that no trial can have: {error}"
            return active
        seed, size = search.seed_of(trial), trainable_parameters(active.spec, search.shape)
        described = {keys.SPEC: active.spec.as_dict(), keys.SEED: seed, keys.TRAINABLE: size}
        for key, value in (described | {keys.TOTAL_STEPS: search.total_steps}).items():
            trial.set_user_attr(key, value)
        active.facts = {"seed": seed, "baseline": bool(attributes.get(keys.BASELINE)), "trainable_parameters": size}
        active.facts |= {"confirms": attributes[keys.CONFIRMS]} if attributes.get(keys.CONFIRMS) else {}
        active.facts |= {"source": attributes[keys.SOURCE]} if attributes.get(keys.SOURCE) else {}
        active.facts |= {} if attributes.get(keys.NAME) else {"study_trial": trial.number}
        try:
            require_within_budget(active.spec, search.shape, search.budget)
        except BudgetError as error:
            active.fault = str(error)
            return active
        if attempts >= MAX_ATTEMPTS:
            active.fault = _exhausted(active)
        else:
            trial.set_user_attr(keys.ATTEMPTS, attempts + 1)
        return active

    def _start(self, active: ActiveTrial) -> TrialPlan | None:
        """The plan of a trial; None where it ended before it starts."""
        active.log = TrialLog(self.folder / active.name)
        self.active[active.name] = active
        confirms, baseline = "confirms" in active.facts, bool(active.facts.get("baseline"))
        self._screen.trial_started(active.name, active.spec, self._search.total_steps, confirms, baseline)
        if active.fault is not None and active.log.end is None:
            active.log.finish(TrialEnd("FAILED", reason=active.fault))
        elif active.stopped and active.log.end is None:
            step = active.log.evaluation.step if active.log.evaluation else 0
            active.log.finish(TrialEnd("PRUNED", reason=_stopped(step, self._search.total_steps)))
        self._sync(active)
        if active.log.end is not None:  # it cannot train, or an earlier process ended it and could not tell the study
            return None
        assert active.spec is not None
        folder = self.folder / active.name
        return TrialPlan(active.name, active.spec, active.facts["seed"], folder, self._checkpoint(active))

    def _checkpoint(self, active: ActiveTrial) -> Path | None:
        """The newest sound checkpoint."""
        known, found = active.checkpoint_step, checkpoints.newest(self.folder / active.name)
        active.checkpoint_step = checkpoints.step_of(found) if found else 0
        if active.checkpoint_step < known:
            resumed = f"resumes from {found.name}" if found else "starts again from step 0"
            self._screen.message(f"{active.name} {resumed}: its checkpoint of step {known} is damaged or missing")
        return found

    # Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        with self._recorded():
            self._screen.logged(points)
            self._record(points)

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        """Record all points before the first is judged: some pruners depend on the order."""
        with self._recorded():
            self._screen.evaluated(points)
            self._record(points)
            return [self._judge(point) for point in points]

    def _record(self, points: Sequence[Point]) -> None:
        for point in points:
            self.active[point.trial].log.append([point])
        self.catch_up()

    def _judge(self, point: EvalPoint) -> Verdict:
        """A trial that the study cannot judge now continues, to be judged at its next evaluation."""
        active = self.active[point.trial]
        self._storage.succeeds(active.read_stop)
        if active.detached or active.stopped:
            return Verdict.PRUNE
        if point.final or active.is_reference or active.study_is_behind:
            return Verdict.CONTINUE
        return Verdict.PRUNE if self._storage.call(active.trial.should_prune, False) else Verdict.CONTINUE

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        with self._recorded():
            active = self.active[trial]
            if step > active.checkpoint_step:
                active.checkpoint_step, active.attempts = step, 0
            self._sync(active)

    def finished(self, result: TrialResult) -> None:
        active = self.active[result.trial]
        if active.detached or active.stopped:
            reason = ENDED_BY_OTHERS if active.detached else _stopped(result.steps, result.total_steps)
            self._finish(result.trial, TrialEnd("PRUNED", replace(result, final=None, adapter=None), reason))
        elif result.final is not None:
            self._finish(result.trial, TrialEnd("COMPLETE", result))
        else:
            reason = f"significantly worse than the best other trial at step {result.steps} of {result.total_steps}"
            self._finish(result.trial, TrialEnd("PRUNED", result, reason))

    def failed(self, trial: str, error: Exception) -> None:
        report = "".join(traceback.format_exception(error))
        self._finish(trial, TrialEnd("FAILED", None, str(error) or type(error).__name__, report))

    def stop_requested(self) -> bool:
        return self._stop() or self.loss is not None

    def requeue(self, trials: Iterable[str], reason: str) -> None:
        """Return trials, whose worker died, to the queue under their own numbers.

        The study still has them as running: what runs there and trains nowhere is what `next` gives first.
        """
        for name in trials:
            active = self.active.get(name)
            if active is not None and active.log.end is None:
                del self.active[name]
                self._screen.trial_ended(name, "INTERRUPTED", None, (reason.splitlines() or [""])[0])

    # Sync

    def catch_up(self) -> None:
        """Sync all active trials; what a store does not take is tried again at the next call."""
        for active in list(self.active.values()):
            self._sync(active)

    def _finish(self, name: str, end: TrialEnd) -> None:
        with self._recorded():
            active = self.active[name]
            active.log.finish(end)
            self._sync(active)

    def _sync(self, active: ActiveTrial) -> None:
        """Bring run and study up to the trial's log. Once it has ended and both know all, tell the study."""
        if active.run_is_behind:
            self._runs.succeeds(partial(active.sync_run, self._tracker))
        try:
            if active.study_is_behind:
                self._storage.succeeds(active.sync_study)
            behind = active.run_is_behind or active.study_is_behind
            told = active.log.end and not behind and self._storage.succeeds(active.tell)
        except UpdateFinishedTrialError:  # a person, or another program, has ended it
            active.detached, told = True, False
        if told and active.log.end is not None:
            self._drop(active, active.log.end)

    def _drop(self, active: ActiveTrial, end: TrialEnd) -> None:
        del self.active[active.name]
        shutil.rmtree(self.folder / active.name, ignore_errors=True)  # what is kept of an ended trial is in its run
        state = "FAIL" if end.state == "FAILED" else end.state
        self._screen.trial_ended(active.name, state, active.log.evaluation, end.reason)

    def _close(self) -> None:
        """Requeue the trials that did not end, and close their runs, without waiting for a store that is away."""
        try:
            self.catch_up()
        finally:
            for active in list(self.active.values()):
                self._give_back(active)

    def _give_back(self, active: ActiveTrial) -> None:
        """Close the run first: whoever takes the trial opens it again."""
        step = active.checkpoint_step
        reason = f"resumes from {f'checkpoint-{step}' if step else 'its first step'} at the next start"
        try:
            if active.opened and active.log.end is None:
                end = TrialEnd("INTERRUPTED", reason=f"stopped; {reason}")
                self._runs.succeeds(partial(active.interrupt_run, self._tracker, end))
        finally:
            self._storage.succeeds(partial(self._put_back, active))
            self._screen.trial_ended(active.name, "INTERRUPTED", None, reason)
            del self.active[active.name]

    def _put_back(self, active: ActiveTrial) -> None:
        if not active.detached:
            active.trial.set_user_attr(keys.ATTEMPTS, 0)
            active.trial.storage.set_trial_state_values(active.trial._trial_id, TrialState.WAITING)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Count the wall time of the block as time of recording."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.record_seconds += time.perf_counter() - began


def num_left(study: optuna.Study, num_trials: int) -> int:
    """How many trials are still to end. num_trials: in all, beside those that a person enqueued on top."""
    trials = study.get_trials(deepcopy=False)
    states = [trial.state for trial in trials]
    ended = sum(state.is_finished() for state in states)
    return max(num_trials + keys.num_enqueued(trials) - ended, states.count(TrialState.RUNNING))


def tidy(studies: Iterable[optuna.Study], folder: Path) -> None:
    """Remove the work folders of trials that have ended: a kill may have come between the two."""
    for study in studies:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                shutil.rmtree(folder / trial_name(trial), ignore_errors=True)


def _stopped(step: int, total_steps: int) -> str:
    return f"{keys.STOPPED_BY_PERSON} at step {step} of {total_steps}"


def _is_suspect(trial: FrozenTrial) -> bool:
    return int(trial.user_attrs.get(keys.ATTEMPTS) or 0) >= SUSPECT_ATTEMPTS


def _exhausted(active: ActiveTrial) -> str:
    reached = f"the checkpoint of step {active.checkpoint_step}" if active.checkpoint_step else "a first checkpoint"
    return (
        f"{MAX_ATTEMPTS} attempts in a row ended without getting beyond {reached}: each time the process died (killed, "
        "or out of memory); it is not tried again"
    )
