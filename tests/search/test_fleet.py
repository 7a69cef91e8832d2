"""The fleet over workers that are threads: they die, fall silent, join late, and nothing is lost or told twice."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.pruners import NopPruner

from agnews_lora.errors import AgnewsLoraError, BaseModelError, StudyError
from agnews_lora.search.confirmation import find_confirmation, num_missing
from agnews_lora.search.fleet import MAX_DEATHS, Fleet, WorkerDied
from agnews_lora.search.racing import repeated
from agnews_lora.search.trials import best_first, summaries
from agnews_lora.training import checkpoints
from agnews_lora.training.exchange import Answer, EngineWorker, Event
from agnews_lora.training.interface import Engine, EvalPoint
from tests.search.drivers import ListDriver
from tests.search.scripted import EVAL_EVERY, LOG_EVERY, TOTAL_STEPS, ScriptedEngine, Session
from tests.search.test_driver import what_counts

SILENCE = 30.0


class Clock:
    """Moves when `Threads.wait` is called: a little, or by all that it was to wait where nothing came."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ThreadWorker:
    """A worker in this process. killed: nobody reads it any more. dead: its exchanges break. silent: they never end."""

    def __init__(self, name: str, engine: Engine, folder: Path, pool: ThreadPoolExecutor, clock: Clock) -> None:
        self.name, self.pool = name, pool
        self.inside = EngineWorker(lambda: engine, folder / name, ship_seconds=0.0, clock=clock)
        self.future: Future[list[Event]] = Future()
        self.killed = self.silent = False
        self.dead: str | None = None

    def submit(self, answer: Answer | None, stop: bool) -> None:
        assert not self.killed
        self.future = Future() if self.silent else self.pool.submit(self.inside.exchange, answer, stop)

    def collect(self) -> list[Event]:
        if self.dead is not None:
            raise WorkerDied(self.dead)
        return self.future.result()

    def kill(self) -> None:
        self.killed = True


class Threads:
    """Workers as threads of this process, in as many places as `places` says."""

    def __init__(self, folder: Path, places: int, make: Callable[[], Engine], clock: Clock) -> None:
        self.folder, self.places, self.make, self.clock = folder, places, make, clock
        self.pool = ThreadPoolExecutor()
        self.started: list[ThreadWorker] = []
        self.on_wait: Callable[[], object] = lambda: None

    def num_places(self) -> int:
        return self.places

    def start(self, name: str) -> ThreadWorker:
        self.started.append(ThreadWorker(name, self.make(), self.folder, self.pool, self.clock))
        return self.started[-1]

    def wait(self, workers: Sequence[ThreadWorker], seconds: float) -> list[ThreadWorker]:
        self.on_wait()
        over = [worker for worker in workers if worker.dead is not None]
        if not over:
            limit = 0.0 if all(worker.silent for worker in workers) else seconds and 5.0
            wait([worker.future for worker in workers], limit, return_when=FIRST_COMPLETED)
            over = [worker for worker in workers if worker.future.done()]
        self.clock.now += 0.01 if over else seconds
        return over

    def alive(self) -> list[ThreadWorker]:
        return [worker for worker in self.started if not worker.killed]


@dataclass
class Setting:
    driver: ListDriver
    threads: Threads
    fleet: Fleet
    messages: list[str]

    def run(self) -> None:
        try:
            self.fleet.run()
        finally:
            assert not self.threads.alive()
            for worker in self.threads.started:  # threads cannot be killed: let them end
                worker.inside.exchange(None, stop=True)

    def worker_of(self, trial: str) -> ThreadWorker:
        name = self.driver.running[trial]
        return next(worker for worker in self.threads.started if worker.name == name)


@pytest.fixture
def setting(tmp_path: Path) -> Callable[..., Setting]:
    def made(trials: int, workers: int, make: Callable[[], Engine] = ScriptedEngine) -> Setting:
        clock, messages = Clock(), list[str]()
        driver = ListDriver(tmp_path / "driver", trials)
        threads = Threads(tmp_path / "workers", workers, make, clock)
        return Setting(driver, threads, Fleet(driver, threads, messages.append, SILENCE, clock), messages)

    return made


def all_points(start: int = 0) -> list[int]:
    """The steps of a trial's points in the order in which they are reported: a resumed one is evaluated again first."""
    evaluations, logs = (
        set(range(EVAL_EVERY, TOTAL_STEPS + 1, EVAL_EVERY)),
        range(LOG_EVERY, TOTAL_STEPS + 1, LOG_EVERY),
    )
    again = [start] if start in evaluations else []
    return again + [step for step in logs if step > start for _ in range(1 + (step in evaluations))]


def all_adapters(trials: int) -> dict[str, bytes]:
    return {f"t{number:04d}": f"t{number:04d}".encode() for number in range(trials)}


@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (2, 1), (3, 4)])
def test_every_trial_is_trained_once(setting: Callable[..., Setting], workers: int, slots: int) -> None:
    each = setting(7, workers, lambda: ScriptedEngine(slots))
    each.run()
    assert each.driver.adapters == all_adapters(7)
    assert all(steps == all_points() for steps in each.driver.points.values())
    assert len(each.threads.started) == workers
    assert each.messages == []


def test_the_trials_of_a_dead_worker_resume_elsewhere(setting: Callable[..., Setting]) -> None:
    each = setting(4, 2, lambda: ScriptedEngine(2))
    killed: list[ThreadWorker] = []

    def die(trial: str, step: int) -> None:
        if (trial, step) == ("t0001", 20) and not killed:
            killed.append(each.worker_of(trial))
            killed[0].dead = "killed by signal 9"

    each.driver.on_checkpoint = die
    each.run()
    assert each.driver.adapters == all_adapters(4)
    assert each.driver.resumed_from["t0001"] == [0, 20]
    assert each.driver.points["t0001"][-len(all_points(20)) :] == all_points(20)
    assert each.driver.reasons == ["killed by signal 9"]
    assert len(each.threads.started) == 3
    died, starts = each.messages
    assert "t0001" in died and "killed by signal 9" in died and "worker-3 starts" in starts


def test_a_silent_worker_is_killed_and_replaced(setting: Callable[..., Setting]) -> None:
    each = setting(2, 1)

    def fall_silent(trial: str, step: int) -> None:
        if (trial, step) == ("t0000", 20):
            each.threads.started[0].silent = True
            each.driver.on_checkpoint = lambda trial, step: None

    each.driver.on_checkpoint = fall_silent
    each.run()
    assert each.driver.adapters == all_adapters(2)
    assert each.driver.resumed_from == {"t0000": [0, 20], "t0001": [0]}
    assert each.threads.started[0].killed and len(each.threads.started) == 2
    assert "30 s" in each.messages[0]


def test_a_worker_that_answered_while_the_driver_slept_is_no_silent_one(setting: Callable[..., Setting]) -> None:
    each = setting(2, 2)
    slept: list[float] = []

    def sleep(trial: str, step: int) -> None:
        if not slept:
            slept.append(each.threads.clock.now)
            each.threads.clock.now += 10 * SILENCE
            wait([worker.future for worker in each.threads.started if worker is not each.worker_of(trial)])

    each.driver.on_checkpoint = sleep
    each.run()
    assert slept and each.driver.reasons == [] and len(each.threads.started) == 2


def test_workers_that_die_before_anything_is_trained_end_the_sweep(setting: Callable[..., Setting]) -> None:
    each = setting(3, 1)
    each.threads.on_wait = lambda: [setattr(worker, "dead", "out of memory") for worker in each.threads.alive()]
    with pytest.raises(StudyError, match="out of memory"):
        each.run()
    assert sum("died" in message for message in each.messages) == MAX_DEATHS


def test_deaths_with_progress_in_between_end_nothing(setting: Callable[..., Setting]) -> None:
    each = setting(1 + MAX_DEATHS, 1)

    def die(trial: str, step: int) -> None:
        if step == EVAL_EVERY:  # a worker that resumes sends no checkpoint of the step that it resumes from
            each.worker_of(trial).dead = "killed"

    each.driver.on_checkpoint = die
    each.run()
    assert each.driver.adapters == all_adapters(1 + MAX_DEATHS)
    assert sum("died" in message for message in each.messages) == 1 + MAX_DEATHS


def test_a_place_that_joins_gets_a_worker_and_one_that_leaves_none(setting: Callable[..., Setting]) -> None:
    each = setting(6, 1)

    def change(trial: str, step: int) -> None:
        each.threads.clock.now += 1
        if (trial, step) == ("t0000", 10):
            each.threads.places = 3
        elif (trial, step) == ("t0003", 10):
            each.threads.places = 2
            each.worker_of(trial).dead = "its node is gone"

    each.driver.on_checkpoint = change
    each.run()
    assert each.driver.adapters == all_adapters(6)
    assert len(each.threads.started) == 3


def test_without_any_place_the_sweep_waits_for_one(setting: Callable[..., Setting]) -> None:
    each = setting(1, 0)
    waits: list[int] = []

    def join() -> None:
        waits.append(1)
        each.threads.places = int(len(waits) > 5)

    each.threads.on_wait = join
    each.run()
    assert each.driver.adapters == all_adapters(1)
    assert len(each.messages) == 1 and "no place" in each.messages[0]


def test_a_worker_that_never_got_its_place_is_dropped_with_it(setting: Callable[..., Setting]) -> None:
    each = setting(2, 1)
    start = each.threads.start

    def start_first_only(name: str) -> ThreadWorker:
        worker = start(name)
        worker.silent = name != "worker-1"
        return worker

    each.threads.start = start_first_only  # type: ignore[method-assign]
    places = iter([1, 2, 1])
    each.threads.on_wait = lambda: setattr(each.threads, "places", next(places, 1))
    each.run()
    assert each.driver.adapters == all_adapters(2)
    assert each.driver.reasons == []


def test_a_stop_checkpoints_what_trains(setting: Callable[..., Setting]) -> None:
    stopped = threading.Event()  # before it, no trial gets beyond its first evaluation

    def hold() -> None:
        stopped.wait(30)

    script = dict.fromkeys([(f"t{number:04d}", 15) for number in range(4)], hold)
    each = setting(8, 2, lambda: ScriptedEngine(2, script))

    def stop(trial: str, step: int) -> None:
        if len(each.driver.running) == 4:
            each.driver.stop = True
            stopped.set()

    each.driver.on_checkpoint = stop
    each.run()
    assert each.driver.closed and len(each.driver.running) == 4  # a real one has returned them to the queue
    assert all(checkpoints.newest(each.driver.folder / trial) for trial in each.driver.running)


def test_a_worker_that_trains_nothing_takes_over_from_one_that_died(setting: Callable[..., Setting]) -> None:
    each = setting(1, 2)

    def die(trial: str, step: int) -> None:
        if step == 20:
            each.threads.places = 1  # no replacement
            each.worker_of(trial).dead = "killed"

    each.driver.on_checkpoint = die
    each.run()
    assert each.driver.adapters == all_adapters(1)
    assert len(each.threads.started) == 2


def broken(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, source: object, observer: object) -> None:
        raise self.error


def test_a_fault_that_the_user_can_mend_ends_the_sweep_with_its_message(setting: Callable[..., Setting]) -> None:
    engines: list[Engine] = [ScriptedEngine(), Failing(BaseModelError("no base on this machine"))]
    each = setting(5, 2, lambda: engines.pop(0))
    with pytest.raises(AgnewsLoraError, match="no base on this machine"):
        each.run()
    assert all(checkpoints.newest(each.driver.folder / trial) for trial in each.driver.running)


def test_an_engine_that_raises_is_a_death(setting: Callable[..., Setting]) -> None:
    engines: list[Engine] = [Failing(ZeroDivisionError("a bug")), ScriptedEngine()]
    each = setting(2, 1, lambda: engines.pop(0))
    each.run()
    assert each.driver.adapters == all_adapters(2)
    assert "ZeroDivisionError: a bug" in each.messages[0]


def test_a_trial_that_fails_is_told_and_others_go_on(setting: Callable[..., Setting]) -> None:
    from agnews_lora.errors import TrainingError

    each = setting(3, 1, lambda: ScriptedEngine(script={("t0001", 7): broken(TrainingError("not finite"))}))
    each.run()
    assert [str(error) for error in each.driver.errors.values()] == ["not finite"]
    assert set(each.driver.adapters) == {"t0000", "t0002"}


def test_a_checkpoint_that_cannot_be_written_ends_the_sweep(setting: Callable[..., Setting]) -> None:
    each = setting(1, 1)
    each.driver.folder.parent.mkdir(parents=True, exist_ok=True)
    each.driver.folder.write_text("no folder")
    with pytest.raises(AgnewsLoraError, match="Cannot write the checkpoint"):
        each.run()


# With the real driver


def train(session: Session, threads: Threads) -> None:
    """One start of a sweep with threads as workers."""
    fleet = Fleet(session.driver, threads, session.screen.message, SILENCE, threads.clock)
    try:
        fleet.run()
    finally:
        for worker in threads.started:
            worker.inside.exchange(None, stop=True)


def kill_sometimes(threads: Threads, every: int) -> None:
    """Let a worker die after every so many waits: from a trial's start to its end anywhere."""
    waits = iter(range(1, 10_000))

    def die() -> None:
        if next(waits) % every == 0:
            threads.alive()[0].dead = "killed"

    threads.on_wait = die


@pytest.mark.parametrize("every", [10_000, 17], ids=["undisturbed", "killed"])
def test_one_worker_makes_the_same_study_as_an_engine_in_the_drivers_process(tmp_path: Path, every: int) -> None:
    inline = Session(tmp_path / "inline", 12)
    inline.run()
    remote = Session(tmp_path / "remote", 12)
    threads = Threads(tmp_path / "workers", 1, ScriptedEngine, Clock())
    kill_sometimes(threads, every)
    train(remote, threads)
    assert what_counts(remote.study) == what_counts(inline.study)
    assert (len(threads.started) > 3) == (every < 100)
    assert not remote.driver.active and not any((tmp_path / "remote" / "work").iterdir())


def test_several_workers_end_exactly_as_many_trials_as_asked_for(tmp_path: Path) -> None:
    session = Session(tmp_path, 15, pruner=NopPruner())
    threads = Threads(tmp_path / "workers", 3, lambda: ScriptedEngine(2), Clock())
    kill_sometimes(threads, 29)
    train(session, threads)
    assert [trial.state.name for trial in session.study.trials] == ["COMPLETE"] * 15
    for recorded in session.tracker.trials.values():
        evaluated = [point.step for point in recorded.points if isinstance(point, EvalPoint)]
        assert evaluated == list(range(EVAL_EVERY, TOTAL_STEPS + 1, EVAL_EVERY))
        assert [end[0] for end in recorded.ends] == ["COMPLETE"]


def test_several_workers_race_the_best_of_all(tmp_path: Path) -> None:
    session = Session(tmp_path, 9, confirmation=(3, 3))
    threads = Threads(tmp_path / "workers", 2, lambda: ScriptedEngine(2), Clock())
    kill_sometimes(threads, 31)
    train(session, threads)
    rows = summaries(session.study)
    found = repeated(rows, find_confirmation(session.study), "accuracy")
    ended = {trial: len(each.runs) for trial, each in found.items() if each.repeats}
    assert sorted(ended) == sorted(row.trial for row in best_first(rows, "accuracy")[:3])
    assert sorted(ended.values()) == [2, 3, 3] and num_missing(session.study, 3, 3) == 0


def test_a_stopped_sweep_is_resumed_with_workers_or_without(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", 8)
    whole.run()
    first = Session(tmp_path / "stopped", 8)
    threads = Threads(tmp_path / "workers", 1, ScriptedEngine, Clock())
    waits = iter(range(100))
    threads.on_wait = lambda: first.stop() if next(waits) == 12 else None
    train(first, threads)
    assert not first.driver.active
    assert {trial.state.name for trial in first.study.trials} <= {"COMPLETE", "PRUNED", "WAITING"}
    second = Session(tmp_path / "stopped", 8)
    second.run()
    assert what_counts(second.study) == what_counts(whole.study)
