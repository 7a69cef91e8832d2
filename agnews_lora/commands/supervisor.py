"""A sweep's worker processes: one a GPU, or several on a CPU; started, started again when they die, and stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Final

import optuna

from agnews_lora.commands.watch import Watch
from agnews_lora.errors import ConfigError, StudyError
from agnews_lora.search.confirmation import find_round
from agnews_lora.search.leases import Leases
from agnews_lora.search.lines import STORAGE_FAULTS
from agnews_lora.search.place import Place
from agnews_lora.search.study import CHECKPOINT, ENDED

MAX_DEATHS: Final = 5  # in a row, without any trial getting on in between
STOP_SECONDS: Final = 20.0  # then a worker that was asked to stop is killed; its trials go on from their checkpoints
_POLL_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 1.0


def devices(num_workers: int) -> list[str | None]:
    """What each worker may see of CUDA: a device of its own, or None where there is none.

    Raises:
        ConfigError: more workers than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return [None] * num_workers
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = visible or [str(number) for number in range(torch.cuda.device_count())]
    if num_workers > len(visible):
        raise ConfigError(
            f"--workers must be at most one a GPU, but got {num_workers} and this machine shows {len(visible)}; each "
            "worker trains many trials at once on its own (`slots:` in the sweep's file)"
        )
    return list(visible[:num_workers])


@dataclass
class _Worker:
    device: str | None
    owner: str = ""
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process else None


@dataclass
class Crew:
    """The workers of one start of a sweep.

    arguments: of `agnews-lora worker`. place: the work folder, which the workers hold together with this process.
    leases: for freeing what a dead worker held. watch: what is shown meanwhile.
    """

    arguments: Sequence[str]
    place: Place
    leases: Leases
    study: optuna.Study
    devices: Sequence[str | None]
    watch: Watch
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _deaths: int = field(default=0, init=False)
    _seen: object = field(default=None, init=False)

    def work(self, stop: Callable[[], bool]) -> None:
        """Keep the workers at work until all have left, since no trial is left, or until a stop is due.

        Raises:
            StudyError: a worker met something that the user can mend and has said it, or they die again and again.
        """
        self._workers = [_Worker(device) for device in self.devices]
        looked = time.monotonic()
        with self.watch:
            try:
                for worker in self._workers:
                    self._start(worker)
                while not stop() and any(worker.exit_code is None for worker in self._workers):
                    for worker in self._workers:
                        self._look_after(worker)
                    if time.monotonic() - looked >= _LOOK_SECONDS:
                        self.watch.look()
                        looked = time.monotonic()
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop()

    def _start(self, worker: _Worker) -> None:
        worker.owner = self.place.new_owner()
        environment = dict(os.environ)
        if worker.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = worker.device
        else:  # cores are shared out: more threads than cores would wait for each other
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.devices))))
        worker.process = subprocess.Popen(
            [sys.executable, "-m", "agnews_lora", "worker", *self.arguments, "--supervised", worker.owner],
            stdin=subprocess.PIPE,  # ends when this process does, however it ends
            stderr=subprocess.PIPE if self.watch.is_live else None,  # else it would write across the table
            env=environment,
            pass_fds=[self.place.lock],
            start_new_session=True,  # a Ctrl-C is for this process alone: it asks the workers to stop
        )
        if worker.process.stderr:
            threading.Thread(target=self._relay, args=(worker.process.stderr,), daemon=True).start()

    def _relay(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.watch.say(line.decode(errors="replace").rstrip())

    def _look_after(self, worker: _Worker) -> None:
        code = worker.exit_code
        if code in (None, 0):
            return
        if code == 2:
            raise StudyError("a worker cannot go on, for the reason it gave above; the others were stopped")
        try:
            self.leases.revoke(worker.owner)
            seen = self._standing()
        except STORAGE_FAULTS:  # away: the worker is started when it is back
            return
        self._deaths = self._deaths + 1 if seen == self._seen else 1
        self._seen = seen
        if self._deaths > MAX_DEATHS:
            raise StudyError(
                f"workers died {self._deaths} times in a row before any trial got on (the last by "
                f"{_cause(code)}); see above for what they said, mend it, and start again"
            )
        self.watch.say(f"a worker died by {_cause(code)}; it is started again")
        self._start(worker)

    def _standing(self) -> object:
        """Changes whenever a trial got on."""
        repeated = find_round(self.study)
        trials = self.study.get_trials(deepcopy=False) + (repeated.get_trials(deepcopy=False) if repeated else [])
        return [(trial.state in ENDED, trial.user_attrs.get(CHECKPOINT, 0)) for trial in trials]

    def _stop(self) -> None:
        running = [worker.process for worker in self._workers if worker.process and worker.exit_code is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
