"""`TrialSource` and `Observer` as messages, for an engine that runs in another process than the driver.

The driver pulls: it calls a worker's `exchange` again and again, each time with the answer to the worker's last
question, and gets the events since the call before. `next` and `evaluated` are questions, on which the engine waits;
everything else is one-way. What carries the calls is the caller's choice: nothing here knows a library for that.

A worker writes checkpoints and adapters to a folder of its own, and sends their files as part of the events. A worker
that was given up can therefore damage nothing, even if it was only suspended and wakes up later.
"""

import copy
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from agnews_lora.errors import StorageError
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import (
    Engine,
    EvalPoint,
    TrainPoint,
    TrialPlan,
    TrialResult,
    Verdict,
)

EXCHANGE_SECONDS: Final = 0.5  # an exchange without events returns after so long
SHIP_SECONDS: Final = 60.0

Files = dict[str, bytes]  # {path relative to the packed folder: content}


@dataclass(frozen=True)
class PlanWanted:
    """The engine has a free place, and waits for a `Planned`."""


@dataclass(frozen=True)
class Logged:
    points: Sequence[TrainPoint]


@dataclass(frozen=True)
class Evaluated:
    """The engine waits for a `Judged`."""

    points: Sequence[EvalPoint]


@dataclass(frozen=True)
class Checkpointed:
    trial: str
    step: int
    files: Files


@dataclass(frozen=True)
class Finished:
    """`result.adapter` is a path of the worker; `files` are those of the adapter (None for a pruned trial)."""

    result: TrialResult
    files: Files | None


@dataclass(frozen=True)
class Failed:
    trial: str
    error: Exception


@dataclass(frozen=True)
class Ended:
    """The engine has returned after a stop, or has raised `error`. The last event of a worker."""

    error: Exception | None


Event = PlanWanted | Logged | Evaluated | Checkpointed | Finished | Failed | Ended


@dataclass(frozen=True)
class Planned:
    """`plan.folder` and `plan.checkpoint` are paths of the driver; `files` are those of the checkpoint."""

    plan: TrialPlan | None
    files: Files | None = None


@dataclass(frozen=True)
class Judged:
    verdicts: Sequence[Verdict]


Answer = Planned | Judged
Kind = TypeVar("Kind", Planned, Judged)


def pack(folder: Path) -> Files:
    """Read all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpack(files: Files, folder: Path) -> Path:
    """Write packed files to a folder, in place of what lies there."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def receive_checkpoint(event: Checkpointed, plan: TrialPlan) -> Path:
    """Write a checkpoint that a worker sent to the trial's folder at the driver, sealed.

    Raises:
        StorageError: it cannot be written.
    """
    with checkpoints.written(event.trial, plan.folder, event.step) as folder:
        unpack({name: content for name, content in event.files.items() if name != checkpoints.SEAL}, folder)
    return checkpoints.folder_of(plan.folder, event.step)


def receive_adapter(event: Finished, plan: TrialPlan) -> Path | None:
    """Write the adapter that a worker sent to the trial's folder at the driver; None for a pruned trial.

    Raises:
        StorageError: it cannot be written.
    """
    if event.files is None:
        return None
    try:
        return unpack(event.files, plan.folder / "adapter")
    except OSError as error:
        raise StorageError(
            f"Cannot write the adapter of {plan.trial} to {plan.folder}: {error.strerror}. Free or unlock that folder, "
            "and start again: the trial resumes from its checkpoint."
        ) from error


class EngineWorker:
    """An engine in a thread of its own, and the other end of `exchange`.

    Implements `TrialSource` and `Observer` for the engine.

    Args:
        build: makes the engine, in its thread: importing it may take longer than an exchange.
        folder: for the trials' work folders; nobody else writes there.
        ship_seconds: a trial's checkpoints are sent at most so often; its first one, and those of a stop, always.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        folder: Path,
        ship_seconds: float = SHIP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._build = build
        self._folder = folder
        self._ship_seconds = ship_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._answer: Answer | None = None
        self._stop = False
        self._shipped: dict[str, tuple[int, float]] = {}  # step and time of each trial's last checkpoint at the driver
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def exchange(self, answer: Answer | None, stop: bool) -> list[Event]:
        """Take the answer to the last question, and give the events since the last call once there are any.

        After `EXCHANGE_SECONDS` without an event it gives none.

        Args:
            answer: to the question that was an event of an earlier call, if there is one.
            stop: the engine is to checkpoint what it trains, and to return.
        """
        with self._changed:
            self._stop = self._stop or stop
            if answer is not None:
                self._answer = answer
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._events, EXCHANGE_SECONDS)
            events, self._events = self._events, []
            return events

    def _run(self) -> None:
        error: Exception | None = None
        try:
            engine = self._build()
            while not self._stop:  # it returns when it has no trial left, but more may come
                engine.run(self, self)
        except Exception as raised:
            error = _portable(raised)
        self._tell(Ended(error))

    def _tell(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def _ask(self, question: PlanWanted | Evaluated, kind: type[Kind]) -> Kind:
        self._tell(question)
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None)
            answer, self._answer = self._answer, None
        assert isinstance(answer, kind)
        return answer

    # The engine's TrialSource

    def next(self) -> TrialPlan | None:
        planned = self._ask(PlanWanted(), Planned)
        if (plan := planned.plan) is None:
            return None
        own = replace(plan, folder=self._folder / plan.trial)
        shutil.rmtree(own.folder, ignore_errors=True)
        if plan.checkpoint is not None and planned.files is not None:
            own = replace(own, checkpoint=unpack(planned.files, own.folder / plan.checkpoint.name))
            self._shipped[plan.trial] = checkpoints.step_of(plan.checkpoint), self._clock()
        return own

    # The engine's Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self._tell(Logged(tuple(points)))

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return self._ask(Evaluated(tuple(points)), Judged).verdicts

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        sent_step, sent_at = self._shipped.get(trial, (-1, float("-inf")))
        if step != sent_step and (self._stop or self._clock() - sent_at >= self._ship_seconds):
            self._shipped[trial] = step, self._clock()
            self._tell(Checkpointed(trial, step, pack(path)))

    def finished(self, result: TrialResult) -> None:
        self._tell(Finished(result, pack(result.adapter) if result.adapter else None))
        self._forget(result.trial)

    def failed(self, trial: str, error: Exception) -> None:
        self._tell(Failed(trial, _portable(error)))
        self._forget(trial)

    def stop_requested(self) -> bool:
        return self._stop

    def _forget(self, trial: str) -> None:
        self._shipped.pop(trial, None)
        shutil.rmtree(self._folder / trial, ignore_errors=True)


def _portable(error: Exception) -> Exception:
    """The error, where every process knows its type, else one that says the same.

    Its traceback, which is lost on the way, becomes a note.
    """
    known = type(error).__module__ in ("builtins", "agnews_lora.errors")
    sent = copy.copy(error) if known else RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(f"In the worker:\n{''.join(traceback.format_exception(error))}")
    return sent
