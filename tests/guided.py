"""A project folder in which the commands of the documents run: the embedded sweep made small, and `make` beside it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.documents import ROOT, Block
from tests.project import environment, write_project

RUN_SECONDS: Final = 300
ANSWER_SECONDS: Final = 120  # until a server answers
LEAVE_SECONDS: Final = 30  # after Ctrl-C
SETUP_FILES: Final = ("Makefile", "pyproject.toml", "constraints.txt", "requirements-embedded.txt")


@dataclass(frozen=True)
class Outcome:
    """What came of a block. fault: in words; None where it did what its fence says. skipped: why it could not."""

    output: str
    errors: str = ""
    fault: str | None = None
    skipped: str | None = None


class Guided:
    """The folder, and what ran in it. Each line runs by itself; one that is like an earlier one is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outcomes: dict[str, Outcome] = {}
        shrunk = {"experiment": "embedded", "confirmation": {"trials": 1, "seeds": 2}}
        write_project(folder, sweep=shrunk)
        for kind in ("experiments", "sweeps"):
            (folder / kind / "small.yaml").rename(folder / kind / "embedded.yaml")
            shutil.copy(ROOT / kind / "agnews.yaml", folder / kind)
        self._bin = folder / ".venv" / "bin"
        self._set_up()

    def _set_up(self) -> None:
        """A stand-in for the virtual environment, so that `make` finds it set up."""
        self._bin.mkdir(parents=True)
        programs = {"python": '"$@"', "python3": '"$@"', "agnews-lora": '-m agnews_lora "$@"'}
        for name, arguments in programs.items():
            program = self._bin / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n', encoding="utf-8")
            program.chmod(0o755)
        for name in SETUP_FILES:
            shutil.copy(ROOT / name, self.folder)
        (self._bin.parent / ".agnews-lora-installed").touch()

    def run(self, block: Block) -> Outcome:
        """Run a block as its fence says, to its first fault."""
        run = self._served if block.fence == "sh server" else self._ran
        whole = Outcome("")
        for line in block.lines():
            if line not in self._outcomes:
                self._outcomes[line] = run(line)
            one = self._outcomes[line]
            whole = Outcome(whole.output + one.output, whole.errors + one.errors, one.fault, one.skipped)
            if whole.fault:
                break
        return whole

    def _start(self, line: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(self._bin), os.environ["PATH"]])
        python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self.folder,
            env=environment() | {"PATH": path, "PYTHONPATH": python},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that all of its processes can be signalled, and no others
        )

    def _ran(self, line: str) -> Outcome:
        with self._start(line) as process:
            try:
                output, errors = process.communicate(timeout=RUN_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                return Outcome("", fault=f"ran for longer than {RUN_SECONDS} s")
        fault = f"exit code {process.returncode}" if process.returncode else None
        return Outcome(output, errors, fault)

    def _served(self, line: str) -> Outcome:
        with self._start(line) as process:
            assert process.stdout is not None and process.stderr is not None
            errors: list[str] = []
            reader = threading.Thread(target=errors.extend, args=(process.stderr,))
            reader.start()
            late = threading.Timer(ANSWER_SECONDS, _signal, (process, signal.SIGKILL))
            late.start()
            try:
                said, fault = _asked(process)
                late.cancel()
                _signal(process, signal.SIGINT)
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                fault = f"did not end within {LEAVE_SECONDS} s of Ctrl-C"
            finally:
                late.cancel()
                _signal(process, signal.SIGKILL)
            reader.join()
        taken = re.search(r"port \d+ cannot be used", "".join(errors))
        # What MLflow's own processes say when they are interrupted while they start is not looked at.
        shown = "".join(errors) if fault else ""
        return Outcome(said, shown, fault, skipped=f"{taken[0]} here" if taken else None)


def _asked(process: "subprocess.Popen[str]") -> tuple[str, str | None]:
    """(what a server printed until it named its address, what is wrong with it)."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if address := re.search(r"http://127\.0\.0\.1:\d+", said):
            return said, _answer(address[0], process)
    return said, "named no address"


def _answer(address: str, process: "subprocess.Popen[str]") -> str | None:
    """What is wrong with the answer at an address; any status is one."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=10).close()
        except urllib.error.HTTPError:
            return None
        except OSError:
            time.sleep(0.2)
        else:
            return None
    return f"ended before it answered at {address}"


def _signal(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
