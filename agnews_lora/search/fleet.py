"""Serves the workers of a sweep: gives them the driver's trials, hands the driver their events, replaces the dead.

Knows workers by the two protocols below only, not how they are started or reached.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from agnews_lora.errors import AgnewsLoraError, StudyError
from agnews_lora.training import checkpoints
from agnews_lora.training.exchange import (
    Answer,
    Checkpointed,
    Ended,
    Evaluated,
    Event,
    Failed,
    Finished,
    Judged,
    Logged,
    Planned,
    PlanWanted,
    pack,
    receive_adapter,
    receive_checkpoint,
)
from agnews_lora.training.interface import Observer, TrialPlan

MAX_DEATHS: Final = 5  # in a row, without a new checkpoint or a finished trial in between
SILENCE_SECONDS: Final = 30.0
STOP_SECONDS: Final = 60.0
_WAIT_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 1.0


class WorkerDied(Exception):
    """The worker's process is gone. The message is what is known of why."""


class Worker(Protocol):
    """One engine in another process, with an `exchange` as `EngineWorker` has it."""

    def submit(self, answer: Answer | None, stop: bool) -> None:
        """Start an exchange, and return at once. The first one is answered when the worker has a place and runs."""
        ...

    def collect(self) -> list[Event]:
        """The events of the exchange, after `Workers.wait` gave this worker.

        Raises:
            WorkerDied: instead of an answer.
        """
        ...

    def kill(self) -> None: ...


class Workers(Protocol):
    """Where workers run."""

    def num_places(self) -> int:
        """How many workers can run now; changes as machines join and leave."""
        ...

    def start(self, name: str) -> Worker:
        """Start a worker, and return at once. It waits where all places are taken."""
        ...

    def wait(self, workers: Sequence[Worker], seconds: float) -> Iterable[Worker]:
        """Those whose exchange is over, once there is one; none after `seconds`."""
        ...


class Driver(Observer, Protocol):
    """What the fleet needs of the sweep's driver."""

    def next(self, worker: str = "") -> TrialPlan | None: ...

    def is_done(self) -> bool: ...

    def requeue(self, trials: Iterable[str], reason: str) -> None: ...

    def catch_up(self) -> None: ...

    def driving(self) -> AbstractContextManager[None]:
        """Returns the trials that did not end to the queue, at the end of the block."""
        ...


@dataclass(eq=False)
class _Member:
    """A worker, and what it was given.

    asked_at: start of the exchange that is open. plans: of the trials that it trains. wants_plan: it waits for a trial
    and has not been answered yet. is_running: it has answered once, so that silence is a sign.
    """

    name: str
    worker: Worker
    asked_at: float = 0.0
    plans: dict[str, TrialPlan] = field(default_factory=dict)
    answer: Answer | None = None
    wants_plan: bool = False
    is_running: bool = False


class Fleet:
    """The workers of one sweep, and the driver that they work for. All calls of the driver come from this thread.

    Args:
        message: shows the user a line.
        silence: seconds without an answer after which a worker is killed.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        driver: Driver,
        workers: Workers,
        message: Callable[[str], object],
        silence: float = SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver = driver
        self._workers = workers
        self._message = message
        self._silence = silence
        self._clock = clock
        self._members: list[_Member] = []
        self._started = 0
        self._looked_at = float("-inf")
        self._is_waiting = False
        self._deaths = 0
        self._steps: dict[str, int] = {}  # of each trial's newest checkpoint
        self._fault: AgnewsLoraError | None = None

    def run(self) -> None:
        """Train until the driver is done, or asks for a stop and all trials have been checkpointed.

        Raises:
            AgnewsLoraError: a worker met a fault that the user can mend, or workers die again and again.
        """
        with self._driver.driving():
            self._train()
        if self._fault:
            raise self._fault

    def _train(self) -> None:
        stopped_at: float | None = None
        try:
            while not self._driver.is_done():
                if self._driver.stop_requested() or self._fault:
                    stopped_at = self._clock() if stopped_at is None else stopped_at
                    self._drop([member for member in self._members if not member.plans])
                    if not self._members or self._clock() - stopped_at > STOP_SECONDS:
                        break
                self._look_around(stopped_at is not None)
                self._exchange(stopped_at is not None)
        finally:
            self._drop(list(self._members))

    def _drop(self, members: list[_Member]) -> None:
        for member in members:
            self._members.remove(member)
            member.worker.kill()

    def _look_around(self, stops: bool) -> None:
        """Once a second, and at once after a death: as many workers as there are places."""
        if self._clock() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        self._driver.catch_up()
        if stops:
            return
        places = self._workers.num_places()
        unplaced = [member for member in self._members if not member.is_running]
        self._drop(unplaced[: max(0, len(self._members) - places)])
        is_first_look = self._started == 0
        while len(self._members) < places:
            self._started += 1
            name = f"worker-{self._started}"
            if not is_first_look:
                self._message(f"A place is free: {name} starts.")
            self._members.append(_Member(name, self._workers.start(name)))
            self._submit(self._members[-1], stop=False)
        if not self._members and not self._is_waiting:
            self._message("There is no place for a worker: waiting for a machine to join.")
        self._is_waiting = not self._members

    def _exchange(self, stops: bool) -> None:
        """Wait for events, handle them, and open the next exchange of those that have answered."""
        by_worker = {id(member.worker): member for member in self._members}
        for worker in self._workers.wait([member.worker for member in self._members], _WAIT_SECONDS):
            self._serve(by_worker[id(worker)], stops)
        for member in [each for each in self._members if each.is_running]:
            if self._clock() - member.asked_at <= self._silence:
                continue
            if not list(self._workers.wait([member.worker], 0)):  # it may be this process that slept
                self._lose(member, f"it gave no sign for {self._silence:g} s")

    def _serve(self, member: _Member, stops: bool) -> None:
        try:
            events = member.worker.collect()
        except WorkerDied as death:
            self._lose(member, str(death))
            return
        member.is_running = True
        for event in events:
            if isinstance(event, Ended):
                self._end(member, event)
                return
            self._handle(member, event)
        if member.wants_plan:
            self._offer(member, stops)
        self._submit(member, stops)

    def _submit(self, member: _Member, stop: bool) -> None:
        answer, member.answer = member.answer, None
        member.asked_at = self._clock()
        member.worker.submit(answer, stop)

    def _handle(self, member: _Member, event: Event) -> None:
        driver = self._driver
        match event:
            case PlanWanted():
                member.wants_plan = True
            case Logged(points):
                driver.logged(points)
            case Evaluated(points):
                member.answer = Judged(driver.evaluated(points))
            case Checkpointed(trial, step, _):
                path = receive_checkpoint(event, member.plans[trial])
                self._note_progress(trial, step)
                driver.checkpointed(trial, step, path)
            case Finished(result, _):
                adapter = receive_adapter(event, member.plans.pop(result.trial))
                self._deaths = 0
                driver.finished(replace(result, adapter=adapter))
            case Failed(trial, error):
                member.plans.pop(trial)
                driver.failed(trial, error)

    def _note_progress(self, trial: str, step: int) -> None:
        if step > self._steps.get(trial, 0):
            self._steps[trial] = step
            self._deaths = 0

    def _offer(self, member: _Member, stops: bool) -> None:
        """Answer a worker that wants a trial; one that trains nothing is left to wait, since other workers may die."""
        plan = None if stops else self._driver.next(member.name)
        if plan is not None:
            files: dict[str, bytes] | None = None
            if plan.checkpoint is not None:
                files = pack(plan.checkpoint)
                self._steps.setdefault(plan.trial, checkpoints.step_of(plan.checkpoint))
            member.plans[plan.trial] = plan
            member.answer = Planned(plan, files)
        elif member.plans:
            member.answer = Planned(None)
        else:
            return
        member.wants_plan = False

    def _end(self, member: _Member, event: Ended) -> None:
        """The engine has returned after a stop, or raised."""
        if event.error is None:
            self._drop([member])
        elif isinstance(event.error, AgnewsLoraError):
            self._fault = self._fault or event.error
            self._requeue(member, str(event.error))
        else:
            self._lose(member, "".join([f"{type(event.error).__name__}: {event.error}", *_notes(event.error)]))

    def _lose(self, member: _Member, reason: str) -> None:
        """Requeue what a worker trained. The next look around starts another, if there is a place."""
        cause = reason.splitlines()[0] if reason else "no reason known"
        self._requeue(member, cause)
        self._deaths += 1
        trials = f"; {', '.join(member.plans)} will be resumed" if member.plans else ""
        self._message(f"{member.name} died ({cause}){trials}.")
        if self._deaths >= MAX_DEATHS and self._fault is None:
            self._fault = StudyError(
                f"Cannot go on: workers died {self._deaths} times in a row before any trial got on. "
                f"Fix what the last one said, and start again:\n{reason}"
            )

    def _requeue(self, member: _Member, reason: str) -> None:
        self._drop([member])
        self._looked_at = float("-inf")
        if member.plans:
            self._driver.requeue(list(member.plans), reason)


def _notes(error: Exception) -> list[str]:
    return [f"\n{note}" for note in getattr(error, "__notes__", [])]
