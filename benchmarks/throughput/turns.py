"""Processes that take turns, so that one of them works at a time."""

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from agnews_lora import set_environment
from benchmarks.throughput.results import Measurement, Task


class Process:
    """A function in a process of its own, which tells over a pipe when its turn is over, and what it found.

    This process imports neither torch nor transformers: a child's peak memory is at least its parent's at the start.
    """

    def __init__(self, module: str, function: str, *arguments: object, checkout: str = "") -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_call, args=(theirs, module, function, arguments, checkout))
        self.process.start()
        theirs.close()
        self.found: Any = None
        self.turns = 0

    def next_turn(self) -> None:
        """Give it a turn (the first begins with the process), and wait for the turn's end."""
        try:
            if self.turns:
                self.pipe.send(None)
            self.turns += 1
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            found = f"the process died (exit code {self.process.exitcode})"
        if found is not None:
            self.found = found
            self.process.join()


def _call(pipe: Connection, module: str, function: str, arguments: Sequence[object], checkout: str) -> None:
    """Call a function with a way to end its turn, and send what it returns, or why it failed.

    checkout: if given, the one that the package is imported from; the benchmark stays this one.

    In the environment of the command line: no library prints what it read, and threads that wait do not spin.
    """

    def wait() -> None:
        pipe.send(None)
        pipe.recv()

    set_environment()
    if checkout:
        sys.path.insert(0, checkout)
        for name in [name for name in sys.modules if name.partition(".")[0] == "agnews_lora"]:
            del sys.modules[name]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the Trainer prints its metrics
    try:
        pipe.send(getattr(importlib.import_module(module), function)(*arguments, wait))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise


def take_turns(tasks: Sequence[Task]) -> list[Measurement | str]:
    """Measure peers step by step in turn, each at the pace of its share of all steps; or say why one failed."""
    going = []
    for task in tasks:
        started = replace(task, started=time.time())
        process = Process("benchmarks.throughput.peers", "measure", started, checkout=task.peer.checkout)
        process.next_turn()
        going.append((process, task.peer.num_trials / task.peer.slots))
    processes = [process for process, _ in going]
    while going := [each for each in going if each[0].found is None]:
        process, _ = min(going, key=lambda each: each[0].turns / each[1])
        process.next_turn()
    return [process.found for process in processes]
