"""An engine behind `exchange`: the same events in the same order, and files that travel with them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agnews_lora.errors import StorageError, TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.exchange import (
    EXCHANGE_SECONDS,
    Answer,
    Checkpointed,
    Ended,
    EngineWorker,
    Evaluated,
    Event,
    Failed,
    Finished,
    Judged,
    Logged,
    Planned,
    PlanWanted,
    pack,
    receive_checkpoint,
)
from agnews_lora.training.interface import Engine, TrialPlan, Verdict
from tests.search.scripted import EVAL_EVERY, INSIDE, TOTAL_STEPS, ScriptedEngine


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Talk:
    """A driver that gives `plans` to one worker and keeps every event."""

    def __init__(self, worker: EngineWorker, *plans: Planned, verdict: Verdict = Verdict.CONTINUE) -> None:
        self.worker, self.plans, self.verdict = worker, list(plans), verdict
        self.events: list[Event] = []
        self.answer: Answer | None = None
        self.stop = False

    def until(self, kind: type[Event]) -> None:
        """Go on until an event of this kind has come; it has not been answered yet."""
        while not any(isinstance(event, kind) for event in self.exchange()):
            pass

    def exchange(self) -> list[Event]:
        events = self.worker.exchange(self.answer, self.stop)
        self.answer = None
        self.events += events
        for event in events:
            if isinstance(event, PlanWanted) and (self.plans or self.stop):
                self.answer = self.plans.pop(0) if self.plans else Planned(None)
            elif isinstance(event, Evaluated):
                self.answer = Judged([self.verdict] * len(event.points))
        return events

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def plan(tmp_path: Path) -> TrialPlan:
    return TrialPlan("t0001", INSIDE, seed=7, folder=tmp_path / "driver" / "t0001")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "worker"


@pytest.fixture
def start(own: Path) -> Iterator[Callable[..., EngineWorker]]:
    workers = []

    def started(engine: Engine | Callable[[], Engine], **options: Any) -> EngineWorker:
        workers.append(EngineWorker(engine if callable(engine) else lambda: engine, own, **options))
        return workers[-1]

    yield started
    for worker in workers:  # no thread outlives its test
        worker.exchange(Planned(None), stop=True)


def test_a_trial_reports_as_it_would_to_a_driver_in_its_process(
    start: Callable[..., EngineWorker], plan: TrialPlan, own: Path
) -> None:
    talk = Talk(start(ScriptedEngine()), Planned(plan))
    talk.until(Finished)
    kinds = [type(event) for event in talk.events if not isinstance(event, Checkpointed)]
    assert kinds == [PlanWanted, *[Logged, Logged, Evaluated] * (TOTAL_STEPS // EVAL_EVERY), Finished]
    finished = talk.of(Finished)[0]
    assert finished.files == {"adapter_model.safetensors": b"t0001"}
    talk.until(PlanWanted)
    assert not (own / "t0001").exists() and not plan.folder.exists()


def test_a_pruned_trial_has_no_adapter(start: Callable[..., EngineWorker], plan: TrialPlan) -> None:
    talk = Talk(start(ScriptedEngine()), Planned(plan), verdict=Verdict.PRUNE)
    talk.until(Finished)
    finished = talk.of(Finished)[0]
    assert (finished.result.steps, finished.files) == (EVAL_EVERY, None)


def test_an_exchange_without_events_returns_soon(start: Callable[..., EngineWorker], plan: TrialPlan) -> None:
    talk = Talk(start(ScriptedEngine()))
    talk.until(PlanWanted)
    began = time.monotonic()
    assert talk.exchange() == []
    assert EXCHANGE_SECONDS <= time.monotonic() - began < 20 * EXCHANGE_SECONDS


@pytest.mark.parametrize(("ship_seconds", "steps"), [(0.9, [10, 20, 30]), (1.5, [10, 30]), (60.0, [10])])
def test_checkpoints_are_sent_at_most_so_often(
    start: Callable[..., EngineWorker], plan: TrialPlan, ship_seconds: float, steps: list[int]
) -> None:
    clock = Clock()

    def pass_a_tenth() -> None:
        clock.now += 0.1

    engine = ScriptedEngine(each_step=pass_a_tenth)
    talk = Talk(start(engine, ship_seconds=ship_seconds, clock=clock), Planned(plan))
    talk.until(Finished)
    assert [event.step for event in talk.of(Checkpointed)] == steps


def test_a_stop_sends_the_checkpoint_and_ends(start: Callable[..., EngineWorker], plan: TrialPlan) -> None:
    talk = Talk(start(ScriptedEngine()), Planned(plan))
    talk.until(Evaluated)
    talk.stop = True
    talk.until(Ended)
    assert [event.step for event in talk.of(Checkpointed)] == [10]  # known already: not sent again
    assert talk.events[-1] == Ended(None)


def test_a_stop_between_evaluations_sends_a_checkpoint_of_that_step(
    start: Callable[..., EngineWorker], plan: TrialPlan
) -> None:
    worker: EngineWorker

    def ask_for_a_stop() -> None:
        worker._stop = True  # as an exchange would that comes just now

    worker = start(ScriptedEngine(script={("t0001", 13): ask_for_a_stop}))
    talk = Talk(worker, Planned(plan))
    talk.until(Ended)
    assert [event.step for event in talk.of(Checkpointed)] == [10, 13]


def test_a_checkpoint_goes_to_the_driver_and_on_to_another_worker(
    start: Callable[..., EngineWorker], plan: TrialPlan
) -> None:
    first = Talk(start(ScriptedEngine()), Planned(plan))
    first.until(Evaluated)
    received = receive_checkpoint(first.of(Checkpointed)[0], plan)
    assert checkpoints.newest(plan.folder) == received

    resumed = TrialPlan(plan.trial, plan.spec, plan.seed, plan.folder, received)
    engine = ScriptedEngine()
    second = Talk(start(engine), Planned(resumed, pack(received)))
    second.until(Finished)
    given = engine.plans[0].checkpoint
    assert given is not None and (given.name, plan.folder in given.parents) == ("checkpoint-10", False)
    assert [point.step for event in second.of(Evaluated) for point in event.points] == [10, 20, 30]
    assert second.of(Checkpointed) == []  # the driver has that of step 10, and less than a minute has passed


def test_a_trials_failure_is_sent_with_its_traceback(start: Callable[..., EngineWorker], plan: TrialPlan) -> None:
    def diverge() -> None:
        raise TrainingError("the loss is no longer finite")

    talk = Talk(start(ScriptedEngine(script={("t0001", 3): diverge})), Planned(plan))
    talk.until(Failed)
    error = talk.of(Failed)[0].error
    assert isinstance(error, TrainingError) and str(error) == "the loss is no longer finite"
    assert "in diverge" in error.__notes__[0]
    talk.until(PlanWanted)  # the engine goes on


class Unsendable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [StorageError("no space left"), Unsendable(1, 2)])
def test_an_engine_that_cannot_be_built_ends_with_its_error(
    start: Callable[..., EngineWorker], error: Exception
) -> None:
    def build() -> Engine:
        raise error

    talk = Talk(start(build))
    talk.until(Ended)
    ended = talk.events[-1]
    assert isinstance(ended, Ended) and str(error) in str(ended.error)
    assert isinstance(ended.error, StorageError) == isinstance(error, StorageError)
