"""Runs a sweep and kills its processes at moments drawn from a seed.

What the sweep has reached is read from outside: from trial logs and checkpoints in its work folder. Every start is the
same command in the same folder, and nothing is cleaned up in between.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil  # type: ignore[import-untyped]

from agnews_lora.search.trial_log import FILE
from benchmarks.chaos.nodes import Nodes, kill
from tests.project import command, environment

# Who is hit: the driver and all below it, the driver alone, a worker, a node; or a worker is suspended (SIGSTOP), or
# the driver's process group gets Ctrl-C.
Victim = Literal["tree", "driver", "worker", "node", "suspended worker", "Ctrl-C"]
Moment = Literal["start-up", "training", "evaluation", "finish"]
Mark = tuple[str, str]  # (trial, `step 6`, `checkpoint 6`, `evaluation 6` or `end`): something was reached

# Seconds between the mark that announces a moment (the start, a logged loss, a checkpoint, the log's last line) and
# the kill, at most.
LONGEST_DELAYS: Final[dict[Moment, float]] = {"start-up": 8.0, "training": 0.5, "evaluation": 0.3, "finish": 0.3}
ANNOUNCED_BY: Final = {"training": "step", "evaluation": "checkpoint", "finish": "end"}
PATIENCE_SECONDS: Final = 240.0  # without anything new: then something hangs
LOOK_SECONDS: Final = 0.02
_KINDS: Final = {"TrainPoint": "step", "EvalPoint": "evaluation"}


class ChaosError(Exception):
    """The sweep did not go on as it must."""


@dataclass
class Kill:
    """A kill, drawn before it is made, and what was seen then.

    Args:
        share: of the moment's longest delay.

    at: Unix seconds. reached: the mark that announced it. ended: trials whose log had its last line. checkpoints:
    {trial: newest step}. output: (number of the start, offset in what it printed). progress_seconds: until a new mark.
    orphans_seconds: until all workers of a killed driver were gone (Ray's own agents follow within a minute or so).
    """

    victim: Victim
    moment: Moment
    share: float
    at: float = 0.0
    reached: str = ""
    ended: set[str] = field(default_factory=set)
    checkpoints: dict[str, int] = field(default_factory=dict)
    output: tuple[int, int] = (0, 0)
    progress_seconds: float | None = None
    orphans_seconds: float | None = None


def draw(seed: int, num: int, victims: Sequence[Victim]) -> list[Kill]:
    """Kills in random order, each victim at each moment about equally often."""
    chance = random.Random(seed)
    pairs: list[tuple[Victim, Moment]] = []
    while len(pairs) < num:
        every: list[tuple[Victim, Moment]] = [(victim, moment) for moment in LONGEST_DELAYS for victim in victims]
        pairs += chance.sample(every, len(every))
    return [Kill(victim, moment, chance.random()) for victim, moment in pairs[:num]]


class Chaos:
    """One sweep that is killed again and again.

    Args:
        folder: of the project, whose sweep is `sweep`.
        options: of the sweep's command.
        nodes: the cluster that it trains on, if it does.
    """

    def __init__(self, folder: Path, sweep: str, *options: str, nodes: Nodes | None = None, seed: int = 0) -> None:
        self.folder = folder
        self.command = ["sweep", sweep, *options]
        self.kills: list[Kill] = []
        self.outputs: list[Path] = []  # what each start printed, messages included
        self._work = folder / "mlruns" / "work" / sweep
        self._nodes = nodes
        self._chance = random.Random(seed)
        self._seen: set[Mark] = set()
        self._sizes: dict[Path, int] = {}
        self._orphans: tuple[Kill, list[psutil.Process]] | None = None
        self._process: subprocess.Popen[bytes]

    def run(self, kills: Sequence[Kill]) -> int:
        """Start, make all kills, and let the last start come to its end; return its exit code.

        Raises:
            ChaosError: the sweep ended before its last kill or otherwise than by it, or did not get on.
        """
        try:
            self._start()
            if self._nodes is not None:  # no node yet: both join late
                self._wait_for("There is no place for a worker")
                for _ in range(2):
                    self._nodes.add()
            for each in kills:
                self._make(each)
            self._until(lambda: self._process.poll() is not None and self._orphans is None)
            return self._process.wait()
        finally:
            self._kill_tree()

    def _start(self) -> None:
        self.outputs.append(self.folder / f"start-{len(self.outputs) + 1:02d}.log")
        with self.outputs[-1].open("wb") as output:
            self._process = subprocess.Popen(
                command(*self.command),
                cwd=self.folder,
                env={**environment(), **(self._nodes.environment if self._nodes else {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    # Waiting

    def marks(self) -> set[Mark]:
        """All that can be seen to have been reached, of trials that have not been removed."""
        found = set(self._seen)
        for trial in self._work.glob("*/t*"):
            found |= {(trial.name, f"checkpoint {step}") for step in _checkpoints(trial)}
            found |= self._logged(trial)
        return found

    def _logged(self, trial: Path) -> set[Mark]:
        path, marks = trial / FILE, set()
        try:
            if path.stat().st_size == self._sizes.get(path):
                return set()
            text = path.read_bytes()
        except OSError:  # removed meanwhile
            return set()
        self._sizes[path] = len(text)
        for line in text.splitlines(keepends=True):
            if line.endswith(b"\n"):
                [(kind, entry)] = json.loads(line).items()
                marks.add((trial.name, f"{_KINDS[kind]} {entry['step']}" if kind in _KINDS else "end"))
        return marks

    def _look(self) -> set[Mark]:
        """What is reached for the first time."""
        if self._orphans is not None and not any(map(_lives, self._orphans[1])):
            self._orphans[0].orphans_seconds = time.time() - self._orphans[0].at
            self._orphans = None
        new = self.marks() - self._seen
        self._seen |= new
        if new and self.kills and self.kills[-1].progress_seconds is None:
            self.kills[-1].progress_seconds = time.time() - self.kills[-1].at
        return new

    def _until(self, is_true: Callable[[], object]) -> None:
        """Wait, for as long as there is something new now and then."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_true():
            if self._look():
                deadline = time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() > deadline:
                raise ChaosError(f"nothing new for {PATIENCE_SECONDS:.0f} s after kill {len(self.kills)}")
            time.sleep(LOOK_SECONDS)

    def _while_running(self, is_true: Callable[[], object]) -> None:
        self._until(lambda: is_true() or self._process.poll() is not None)
        if self._process.poll() is not None:
            raise ChaosError(f"the sweep ended by {self._process.returncode} after {len(self.kills)} kills")

    def _wait_for(self, text: str) -> None:
        self._while_running(lambda: text in self.outputs[-1].read_text(encoding="utf-8"))

    def _await(self, kind: str) -> str:
        """Wait until something of a kind is reached for the first time."""
        hits: list[Mark] = []

        def is_there() -> bool:
            hits.extend(sorted(mark for mark in self._look() if mark[1].startswith(kind)))
            return bool(hits)

        self._while_running(is_there)
        return " ".join(self._chance.choice(hits))

    # Killing

    def _make(self, each: Kill) -> None:
        if each.moment == "start-up":
            each.reached = self._start_again() if self.kills else "nothing yet"
        else:
            each.reached = self._await(ANNOUNCED_BY[each.moment])
        time.sleep(each.share * LONGEST_DELAYS[each.moment])
        if each.victim in ("worker", "suspended worker"):
            self._while_running(self._workers)
        workers = self._workers()
        said = self.outputs[-1].stat().st_size
        self._hit(each.victim)
        each.at = time.time()
        self._seen |= self.marks()  # written before the kill
        each.ended = {trial for trial, what in self._seen if what == "end"}
        each.checkpoints = {
            trial.name: max(found) for trial in self._work.glob("*/t*") if (found := _checkpoints(trial))
        }
        if self._process.poll() is not None:  # after Ctrl-C, trials go on to their last checkpoint, and say so
            said = self.outputs[-1].stat().st_size
        each.output = len(self.outputs) - 1, said
        self.kills.append(each)
        if each.victim == "node":
            assert self._nodes is not None
            self._wait_for_death(said)  # there is no place for its worker's successor, until another node joins
            self._nodes.add()
        elif each.victim == "suspended worker":
            self._wait_for_death(said)
        elif each.victim != "worker":
            self._start()
            if each.victim == "driver" and workers:
                self._orphans = each, workers

    def _wait_for_death(self, since: int) -> None:
        self._while_running(lambda: b" died (" in self.outputs[-1].read_bytes()[since:])

    def _start_again(self) -> str:
        """Stop the sweep in order once it has a new checkpoint, and start it again; return what had been reached."""
        reached = self._await("checkpoint")
        self._process.terminate()
        self._expect(128 + signal.SIGTERM)
        self._start()
        return f"{reached}, then started again after SIGTERM"

    def _hit(self, victim: Victim) -> None:
        match victim:
            case "worker":
                kill([self._chance.choice(self._workers())])
            case "suspended worker":
                self._chance.choice(self._workers()).suspend()
            case "node":
                assert self._nodes is not None
                self._nodes.lose()
            case "driver":
                self._process.kill()
                self._process.wait()
            case "tree":
                self._kill_tree()
            case "Ctrl-C":
                os.killpg(self._process.pid, signal.SIGINT)
                self._expect(128 + signal.SIGINT)

    def _expect(self, code: int) -> None:
        self._until(lambda: self._process.poll() is not None)
        if self._process.returncode != code:
            raise ChaosError(f"a sweep that was asked to stop ended with exit code {self._process.returncode}")

    def _kill_tree(self) -> None:
        if self._process.poll() is not None:
            return
        top = psutil.Process(self._process.pid)
        top.suspend()  # it must start nothing meanwhile
        kill([*top.children(recursive=True), top])
        self._process.wait()

    def _workers(self) -> list[psutil.Process]:
        """Those of this machine, or of the cluster."""
        if self._nodes is not None:
            return list(filter(_is_worker, self._nodes.processes()))
        try:
            return list(filter(_is_worker, psutil.Process(self._process.pid).children(recursive=True)))
        except psutil.NoSuchProcess:
            return []


def _checkpoints(trial: Path) -> list[int]:
    try:
        names = [path.name for path in trial.iterdir()]
    except OSError:  # removed meanwhile
        return []
    return [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return bool(" ".join(process.cmdline()).startswith("ray::TrialWorker"))
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
