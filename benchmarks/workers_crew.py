"""Workers of one study as processes, and what must hold once they have ended."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import optuna
from optuna.trial import TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search import study as study_keys
from agnews_lora.search.claims import set_quota
from agnews_lora.search.leases import Leases
from agnews_lora.search.queue import enqueue_baseline
from agnews_lora.search.standings import trial_name
from agnews_lora.search.study import IDENTITY, open_storage, open_study
from benchmarks.worker_process import Job
from tests.search.scripted import BUDGET, EVAL_EVERY, OUTSIDE, SHAPE, SPACE, TOTAL_STEPS, accuracy

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
POLL_SECONDS = 0.02


@dataclass
class Crew:
    """A study that is opened here, and its workers. trials: that are to end. environment: of the workers, beside ours.

    processes, by number: they wait for `begin` once the context is entered, and are killed when it is left.
    """

    job: Job
    num_workers: int
    trials: int
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        job = self.job
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        self._storage = open_storage(job.storage)
        self.study = open_study(self._storage, job.name, {}, job.sampler, job.pruner, new=False)
        enqueue_baseline(self.study, OUTSIDE, SPACE, SHAPE, BUDGET)
        set_quota(self.study, self.trials)
        if job.runs is not None:
            self._open_runs(Path(job.runs))
        for number in range(self.num_workers):
            with Path(job.folder, f"worker-{number}.stderr").open("wb") as stderr:
                command = [sys.executable, "-m", "benchmarks.worker_process", job.dump(), str(number)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
                self.processes.append(subprocess.Popen(command, stderr=stderr, cwd=ROOT, env=environment))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _open_runs(self, folder: Path) -> None:
        from agnews_lora.tracking.runs import SweepRuns
        from agnews_lora.tracking.store import open_client

        runs = SweepRuns(open_client(folder), self.job.name, self.job.name)
        identity = self.study.user_attrs[IDENTITY]
        runs.open_parent(self.study.study_name, identity=identity, params={}, tags={}, texts={})

    def begin(self) -> None:
        """Let the workers begin, together. Raises RuntimeError, with what they printed, where one does not come up."""
        deadline = time.monotonic() + START_SECONDS
        while not all(self.job.started(number).exists() for number in range(self.num_workers)):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"a worker did not start:\n{self.printed()}")
            time.sleep(POLL_SECONDS)
        self.job.go.touch()

    def finish(self, seconds: float) -> None:
        """Wait until all workers have ended. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.wait(max(0.0, deadline - time.monotonic()))

    def started(self, number: int) -> list[str]:
        """Names of the trials that a worker has started, in order."""
        path = self.job.started(number)
        return path.read_text(encoding="ascii").split() if path.exists() else []

    def printed(self) -> str:
        """What all workers have written to their standard error."""
        files = sorted(Path(self.job.folder).glob("worker-*.stderr"))
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def faults(self, disturbed: frozenset[int] = frozenset()) -> list[str]:
        """What does not hold of the study and its workers; nothing, where all is well.

        disturbed: numbers of workers that were killed or stopped on the way: their trials may have started twice.
        """
        found = [f"worker {number} ended with status {code}" for number, code in self._bad_ends(disturbed)]
        if printed := self.printed():
            found.append(f"workers wrote to their standard error: {printed}")
        trials = self.study.get_trials(deepcopy=False)
        if (numbers := [trial.number for trial in trials]) != list(range(self.trials)):
            found.append(f"{len(numbers)} trials, where {self.trials} were asked for")
        found += [
            f"trial {trial.number} is {trial.state.name}"
            for trial in trials
            if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED)
        ]
        found += [
            f"trial {trial.number} has other reports than its script" for trial in trials if not _as_scripted(trial)
        ]
        found += self._started_wrongly(disturbed)
        if left := Leases.of(self.study, "nobody").holders():
            found.append(f"leases are left: {left}")
        if left_there := [path.name for path in Path(self.job.folder, "work").iterdir()]:
            found.append(f"work folders are left: {left_there}")
        return found

    def _bad_ends(self, disturbed: frozenset[int]) -> list[tuple[int, int | None]]:
        codes = [(number, process.poll()) for number, process in enumerate(self.processes)]
        return [(number, code) for number, code in codes if code != 0 and not (number in disturbed and code == -9)]

    def _started_wrongly(self, disturbed: frozenset[int]) -> list[str]:
        by_worker = [self.started(number) for number in range(self.num_workers)]
        starts = Counter(trial for started in by_worker for trial in started)
        twice = {trial for trial, count in starts.items() if count > 1}
        for number in disturbed:
            twice -= set(by_worker[number])
        missing = {trial_name(number) for number in range(self.trials)} - starts.keys()
        return [f"trial {trial} was started {starts[trial]} times" for trial in sorted(twice | missing)]


def _as_scripted(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial's reports, its attributes and its value are those of its curve."""
    spec = TrialSpec(**trial.user_attrs[study_keys.SPEC])
    last = trial.last_step or 0
    expected = {step: accuracy(spec, step) for step in range(EVAL_EVERY, last + 1, EVAL_EVERY)}
    whole = trial.state is not TrialState.COMPLETE or last == TOTAL_STEPS
    return whole and trial.intermediate_values == expected and trial.value == expected[last]
