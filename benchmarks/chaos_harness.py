"""Runs a sweep while killing it (-9) at moments drawn from a seed: who is hit, when, and what had been reached.

Progress is read from the trials' work folders, from outside. Every start is the same command in the same folder, and
nothing is cleaned up between two of them.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import psutil  # type: ignore[import-untyped]

from agnews_lora.cli import ENVIRONMENT
from benchmarks.chaos_blows import Blow, Moment
from benchmarks.chaos_marks import Folder, Mark

# Seconds between what announces a moment and the kill, at most: the start of a process, a logged loss, a checkpoint
# (its evaluation follows), an adapter's folder or the end of a journal (half a second or more before the study knows).
LONGEST_DELAYS: Final[dict[Moment, float]] = {"start-up": 6.0, "training": 0.5, "evaluation": 0.3, "finish": 0.3}
PATIENCE_SECONDS: Final = 240.0  # without anything new, or until the end after the last kill: then something hangs
LOOK_SECONDS: Final = 0.02


class ChaosError(Exception):
    """The sweep did not go on as it must."""


@dataclass
class Kill:
    """A kill that was made. A worker that was hit is one of several; `tree` is everything.

    reached: what was new. began: Unix seconds. marks: all that had been reached. checkpoints: {trial: step} of those on
    disk. output: (start, offset in its output). progress_seconds: until something new was reached. orphans_seconds:
    until the last worker of a killed supervisor was gone.
    """

    blow: Blow
    reached: str
    began: float
    marks: set[Mark]
    checkpoints: dict[str, int]
    output: tuple[int, int]
    progress_seconds: float | None = None
    orphans_seconds: float | None = None


class Chaos:
    """One sweep that is killed again and again. starts: (standard output, standard error) of each start."""

    def __init__(self, folder: Path, sweep: str, workers: int, seed: int = 0) -> None:
        self.folder, self.workers = folder, workers
        self.command = [sys.executable, "-m", "agnews_lora", "sweep", sweep, "--workers", str(workers)]
        self.files = Folder(folder, sweep)
        self.starts: list[tuple[Path, Path]] = []
        self.kills: list[Kill] = []
        self._chance = random.Random(seed)
        self._seen: set[Mark] = set()
        self._process: subprocess.Popen[bytes]
        self._open: list[IO[bytes]] = []

    def run(self, blows: Sequence[Blow]) -> int:
        """Start, strike all blows, and let the last start come to its end; its exit code.

        Raises:
            ChaosError: the sweep ended before its last blow or otherwise than by it, or did not get on.
        """
        try:
            self._start()
            for blow in blows:
                self._strike(blow)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while self._process.poll() is None and time.monotonic() < deadline:
                if self._look():
                    deadline = time.monotonic() + PATIENCE_SECONDS
                time.sleep(LOOK_SECONDS)
            if (code := self._process.poll()) is None:
                raise ChaosError(f"the sweep did not end; nothing new for {PATIENCE_SECONDS:.0f} s")
            return code
        finally:
            if self.starts and self._process.poll() is None:
                self._kill_tree()
            for file in self._open:
                file.close()

    # Starting

    def _start(self) -> None:
        logs = self.folder / "starts"
        logs.mkdir(exist_ok=True)
        number = len(self.starts) + 1
        paths = (logs / f"{number:02d}.out", logs / f"{number:02d}.err")
        output, errors = (path.open("wb") for path in paths)
        self._open += [output, errors]
        self.starts.append(paths)
        own = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}  # as a user has it
        self._process = subprocess.Popen(
            self.command, cwd=self.folder, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )

    def _crew(self) -> list[Any]:
        """The worker processes of the present start."""
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if "--supervised" in _arguments(child)]

    # Waiting

    def _look(self) -> set[Mark]:
        """What is reached for the first time."""
        new = self.files.marks() - self._seen
        self._seen |= new
        if new and self.kills and self.kills[-1].progress_seconds is None:
            self.kills[-1].progress_seconds = time.time() - self.kills[-1].began
        return new

    def _await(self, wanted: Callable[[str], bool]) -> Mark:
        """Wait until something of a kind is reached for the first time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            new = self._look()
            if hits := sorted(mark for mark in new if wanted(mark[1])):
                return self._chance.choice(hits)
            if new:
                deadline = time.monotonic() + PATIENCE_SECONDS
            self._require_alive(deadline)
            time.sleep(LOOK_SECONDS)

    def _require_alive(self, deadline: float) -> None:
        struck = len(self.kills)
        if (code := self._process.poll()) is not None:
            raise ChaosError(f"the sweep ended with exit code {code} after {struck} kills, before the next one")
        if time.monotonic() > deadline:
            raise ChaosError(f"nothing new for {PATIENCE_SECONDS:.0f} s after kill {struck}")

    # Striking

    def _strike(self, blow: Blow) -> None:
        delay = blow.share * LONGEST_DELAYS[blow.moment]
        trial = ""
        while sum(what == "end" for _, what in self._seen) < blow.num_ended:
            self._await(lambda what: what == "end")
        if blow.moment == "start-up":
            reached = self._await_start_up(blow, delay)
        else:
            trial, what = self._await(_announces(blow))
            reached = f"{trial} {what}"
            time.sleep(delay)
        crew = self._crew()
        hit = self._choose(crew, trial) if blow.victim == "worker" else None
        output, _ = self.starts[-1]
        if hit is not None:
            hit.kill()
            hit.wait()
        elif blow.victim == "supervisor":
            self._process.kill()
            self._process.wait()
        else:
            self._kill_tree()
        began = time.time()
        self._seen |= self.files.marks()  # written before the kill
        kill = Kill(
            blow,
            reached,
            began,
            set(self._seen),
            self.files.checkpoints(),
            (len(self.starts) - 1, output.stat().st_size),
        )
        self.kills.append(kill)
        if hit is not None:
            self._await_successor({worker.pid for worker in crew})
            return
        self._start()
        if blow.victim == "supervisor" and crew:
            kill.orphans_seconds = _seconds_until_gone(crew, began)
            self._seen |= self.files.marks()  # what they still wrote is no progress of the new start

    def _await_start_up(self, blow: Blow, delay: float) -> str:
        """Bring about a start that has new progress behind it, and wait for the moment in it; what had been reached."""
        reached = "nothing yet"
        if self.kills:
            trial, what = self._await(lambda what: what.startswith("checkpoint"))
            if blow.harshly:
                self._kill_tree()
            else:
                self._process.terminate()
                if (code := self._process.wait()) != 128 + signal.SIGTERM:
                    raise ChaosError(f"a sweep that was asked to stop ended with exit code {code}")
            reached = f"{trial} {what}, then started anew after {'SIGKILL' if blow.harshly else 'SIGTERM'}"
            self._look()
            self._start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        wait_for_crew = self.workers > 1 and (blow.late or blow.victim == "worker")
        while wait_for_crew and len(self._crew()) < self.workers:
            self._require_alive(deadline)
            time.sleep(LOOK_SECONDS)
        ready = time.monotonic() + delay
        while time.monotonic() < ready and not self._look():  # a start that already trains is hit at once
            time.sleep(LOOK_SECONDS)
        self._require_alive(deadline)
        return f"{reached}; {delay:.1f} s after {'the workers began' if wait_for_crew else 'the start'}"

    def _choose(self, crew: list[Any], trial: str) -> Any:
        """The worker that holds a trial, or any."""
        holder = self.files.holder(trial) if trial else None
        holding = [worker for worker in crew if holder and holder in _arguments(worker)]
        if not crew:
            raise ChaosError(f"no worker was there to be killed after kill {len(self.kills)}")
        return self._chance.choice(holding or crew)

    def _kill_tree(self) -> None:
        """Kill everything that a start began; the sweep is held still meanwhile, so that it begins nothing more."""
        top = psutil.Process(self._process.pid)
        top.suspend()
        for process in [*top.children(recursive=True), top]:
            process.kill()
        self._process.wait()

    def _await_successor(self, before: set[int]) -> None:
        """Wait until the supervisor has started another worker (or is done: none was needed any more)."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._process.poll() is None and {worker.pid for worker in self._crew()} <= before:
            if time.monotonic() > deadline:
                raise ChaosError("a worker was killed, and no other was started")
            self._look()
            time.sleep(LOOK_SECONDS)


def _announces(blow: Blow) -> Callable[[str], bool]:
    if blow.moment == "training":
        return lambda what: what.startswith("step")
    if blow.moment == "evaluation":
        return lambda what: what.startswith("checkpoint")
    return lambda what: what in ("adapter", "end")


def _arguments(process: Any) -> list[str]:
    try:
        return cast(list[str], process.cmdline())
    except psutil.Error:
        return []


def _seconds_until_gone(processes: list[Any], began: float) -> float:
    """Seconds since `began` (Unix) until the last of them had ended; whoever reaps it may take longer."""
    while any(map(_lives, processes)):
        if time.time() - began > PATIENCE_SECONDS:
            raise ChaosError("a worker outlived its supervisor")
        time.sleep(LOOK_SECONDS)
    return time.time() - began


def _lives(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
