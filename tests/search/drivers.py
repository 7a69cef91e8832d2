"""A driver without a study: a list of trials, and what it was told of them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agnews_lora.training import checkpoints
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from tests.search.scripted import INSIDE


@dataclass
class ListDriver:
    """A driver of `num_trials` trials that keeps what it is told, by trial."""

    folder: Path
    num_trials: int
    waiting: list[str] = field(init=False)
    running: dict[str, str] = field(default_factory=dict)  # {trial: worker}
    points: dict[str, list[int]] = field(default_factory=dict)
    adapters: dict[str, bytes] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    resumed_from: dict[str, list[int]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    stop: bool = False
    closed: bool = False
    on_checkpoint: Callable[[str, int], None] = lambda trial, step: None
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def __post_init__(self) -> None:
        self.waiting = [f"t{number:04d}" for number in range(self.num_trials)]

    def next(self, worker: str = "") -> TrialPlan | None:
        assert threading.current_thread() is self.thread
        if not self.waiting or self.stop:
            return None
        trial = self.waiting.pop(0)
        assert trial not in self.running
        self.running[trial] = worker
        newest = checkpoints.newest(self.folder / trial)
        self.resumed_from.setdefault(trial, []).append(checkpoints.step_of(newest) if newest else 0)
        return TrialPlan(trial, INSIDE, 7, self.folder / trial, newest)

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self._note(points)

    def evaluated(self, points: Sequence[EvalPoint]) -> list[Verdict]:
        self._note(points)
        return [Verdict.CONTINUE] * len(points)

    def _note(self, points: Sequence[TrainPoint | EvalPoint]) -> None:
        assert threading.current_thread() is self.thread
        for point in points:
            assert point.trial in self.running
            self.points.setdefault(point.trial, []).append(point.step)

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        assert trial in self.running and path.parent == self.folder / trial and checkpoints.is_sound(path)
        self.on_checkpoint(trial, step)

    def finished(self, result: TrialResult) -> None:
        del self.running[result.trial]
        assert result.adapter is not None and result.adapter.parent == self.folder / result.trial
        assert result.trial not in self.adapters
        self.adapters[result.trial] = (result.adapter / "adapter_model.safetensors").read_bytes()

    def failed(self, trial: str, error: Exception) -> None:
        del self.running[trial]
        self.errors[trial] = error

    def stop_requested(self) -> bool:
        return self.stop

    def is_done(self) -> bool:
        return not self.running and len(self.adapters) + len(self.errors) == self.num_trials

    def requeue(self, trials: Iterable[str], reason: str) -> None:
        for trial in trials:
            del self.running[trial]
            self.waiting.insert(0, trial)
        self.reasons.append(reason)

    def catch_up(self) -> None:
        assert threading.current_thread() is self.thread

    @contextmanager
    def driving(self) -> Iterator[None]:
        yield
        self.closed = True
