"""One worker of a study, as a process of its own: `python -m benchmarks.worker_process JOB NUMBER`.

It is what `agnews-lora worker` puts together (study joined, leases, heart, runner), around an engine that trains
nothing. It notes each trial that it starts, as it starts it, and at its end where its wall time went.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import optuna
import sqlalchemy

from agnews_lora.search import leases as lease_times
from agnews_lora.search import runner as runner_module
from agnews_lora.search import space as search_space
from agnews_lora.search.held import Held, Tracker
from agnews_lora.search.leases import Heart, Leases
from agnews_lora.search.pruner import PeerMedianPruner
from agnews_lora.search.quest import Search
from agnews_lora.search.runner import StudyRunner
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import IDENTITY, join_study, open_storage
from agnews_lora.search.trial_log import Journal
from agnews_lora.training.interface import EvalPoint, Observer, TrainPoint, TrialPlan, TrialResult, TrialSource, Verdict
from benchmarks.nowhere import Nowhere
from tests.search.scripted import BUDGET, OUTSIDE, SHAPE, SPACE, TOTAL_STEPS, ScriptedEngine

SEED = 7
LEASES = ("BEAT_SECONDS", "SURE_SECONDS", "STALE_SECONDS")


@dataclass(frozen=True)
class Job:
    """What a crew of workers shares.

    name: of the sweep. storage: URL of the studies. folder: for the trials' work folders, and for what workers note.
    runs: folder of the run store, or none for a tracker that keeps nothing. startup_trials: of the sampler.
    step_seconds: how long the engine takes for a step. lease_scale: what the leases' times are multiplied by.
    waits_for_disk: whether SQLite has the study on the disk before it goes on.
    """

    name: str
    storage: str
    folder: str
    runs: str | None = None
    startup_trials: int = 10
    step_seconds: float = 0.0
    lease_scale: float = 1.0
    waits_for_disk: bool = True

    @property
    def sampler(self) -> TrialSeededTPE:
        return TrialSeededTPE(SEED, self.startup_trials, search_space.shared(SPACE, SHAPE, BUDGET))

    @property
    def pruner(self) -> PeerMedianPruner:
        return PeerMedianPruner(4, 0)

    def started(self, number: int) -> Path:
        """Where a worker notes the trials that it starts, a line each."""
        return Path(self.folder, f"worker-{number}.started")

    def spent(self, number: int) -> Path:
        """Where a worker writes its seconds by what they went to."""
        return Path(self.folder, f"worker-{number}.json")

    @property
    def go(self) -> Path:
        """There once all workers are to begin."""
        return Path(self.folder, "go")

    def dump(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class NotedEngine:
    """The scripted engine, with every started trial noted in a file, and points that carry the time of their making."""

    engine: ScriptedEngine
    file: Path

    def run(self, source: TrialSource, observer: Observer) -> None:
        self.engine.run(_NotedSource(source, self.file), _StampedObserver(observer))


@dataclass(frozen=True)
class _NotedSource:
    source: TrialSource
    file: Path

    def next(self) -> TrialPlan | None:
        plan = self.source.next()
        if plan is not None:
            with self.file.open("a", encoding="ascii") as file:
                file.write(f"{plan.trial}\n")
        return plan


@dataclass(frozen=True)
class _StampedObserver:
    observer: Observer

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self.observer.logged([replace(point, timestamp=_now()) for point in points])

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return self.observer.evaluated([replace(point, timestamp=_now()) for point in points])

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        self.observer.checkpointed(trial, step, path)

    def finished(self, result: TrialResult) -> None:
        self.observer.finished(result)

    def failed(self, trial: str, error: Exception) -> None:
        self.observer.failed(trial, error)

    def stop_requested(self) -> bool:
        return self.observer.stop_requested()


def _now() -> int:
    return time.time_ns() // 1_000_000


Answer = TypeVar("Answer")


class Stopwatch:
    """Wall seconds by what they went to, in one thread; what is timed inside something else counts there alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def timed(self, what: str, function: Callable[..., Answer]) -> Callable[..., Answer]:
        def call(*arguments: Any, **named: Any) -> Answer:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                passed = time.perf_counter() - began
                self.seconds[what] += passed - self._inside.pop()
                if self._inside:
                    self._inside[-1] += passed

        return call

    def put_on(self) -> None:
        """Time this process's runner."""
        for what, owner, name in (
            ("waiting for the other workers' last trials", StudyRunner, "work"),
            ("the engine itself", ScriptedEngine, "run"),
            ("claim: parameters, attributes, work folder", StudyRunner, "next"),
            ("claim: asking and leasing", runner_module, "claim"),
            ("claim: sampling", TrialSeededTPE, "sample_relative"),
            ("claim: sampling", TrialSeededTPE, "sample_independent"),
            ("reports to the study", Held, "to_study"),
            ("asking whether to prune", optuna.Trial, "should_prune"),
            ("telling the study the end", Held, "tell"),
            ("the run", Held, "to_run"),
            ("the journal", Journal, "add"),
            ("the journal", Journal, "finish"),
            ("letting go of leases", Leases, "release"),
            *(("the runner's own", StudyRunner, name) for name in ("logged", "evaluated", "checkpointed", "finished")),
        ):
            setattr(owner, name, self.timed(what, getattr(owner, name)))
        queue = Leases.queue

        @contextmanager
        def timed_queue(leases: Leases, give_up: Callable[[], bool]) -> Iterator[bool]:
            with ExitStack() as stack:
                yield self.timed("claim: waiting for its turn", stack.enter_context)(queue(leases, give_up))

        setattr(Leases, "queue", timed_queue)  # noqa: B010 — its type has other names


def tracker_of(job: Job, study_name: str, identity: str) -> Tracker:
    """The runs of MLflow, or nowhere."""
    if job.runs is None:
        return Nowhere()
    from agnews_lora.commands.records import Records
    from agnews_lora.tracking.runs import SweepRuns
    from agnews_lora.tracking.store import open_client

    runs = SweepRuns(open_client(Path(job.runs)), job.name, job.name)
    runs.join_parent(study_name, identity)
    return Records(runs, {"budget": BUDGET}, {"study": study_name})


def no_wait_for_the_disk(connection: Any, record: object) -> None:
    """For SQLite: what survives a kill is enough, and a power cut may do harm."""
    connection.execute("PRAGMA synchronous = OFF")


def work(job: Job, number: int, ready: Callable[[], None]) -> dict[str, float]:
    """Train trials until none is left; seconds by what they went to. ready: called before the first claim."""
    for name in LEASES:
        setattr(lease_times, name, getattr(lease_times, name) * job.lease_scale)
    watch = Stopwatch()
    watch.put_on()
    storage = open_storage(job.storage, create=False)
    if not job.waits_for_disk and storage.engine.dialect.name == "sqlite":
        sqlalchemy.event.listen(storage.engine, "connect", no_wait_for_the_disk)
        storage.engine.dispose()
    study = join_study(storage, job.name, {}, job.sampler, job.pruner)
    leases = Leases.of(study, f"worker-{number}/{uuid4().hex}")
    quest = Search(SPACE, SHAPE, BUDGET, SEED, OUTSIDE, 42, TOTAL_STEPS)
    tracker = tracker_of(job, study.study_name, study.user_attrs[IDENTITY])
    engine = ScriptedEngine(each_step=lambda: time.sleep(job.step_seconds))
    ready()
    with Heart(leases):
        folder = Path(job.folder, "work")
        runner = StudyRunner(study, leases, quest, tracker, Nowhere(), folder, lambda: False)
        runner.work(NotedEngine(engine, job.started(number)))
    return watch.seconds


def main() -> None:
    """Work, once all workers of the crew are ready, and write down where the time went."""
    job, number, parent = Job(**json.loads(sys.argv[1])), int(sys.argv[2]), os.getppid()

    def ready() -> None:
        job.started(number).touch()
        while not job.go.exists():
            if os.getppid() != parent:
                sys.exit(1)
            time.sleep(0.01)

    job.spent(number).write_text(json.dumps(work(job, number, ready)), encoding="utf-8")


if __name__ == "__main__":
    main()
