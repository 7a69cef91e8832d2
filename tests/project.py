"""A small project folder, as a user has one: an experiment, a sweep, and a way to run the command line in it."""

import copy
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from agnews_lora import ENVIRONMENT

EXPERIMENT: dict[str, Any] = {
    "base": "embedded:minilm",
    "data": {"source": "newswire", "rows": 600, "train_rows": 96, "test_rows": 200},
    "adapter": {"targets": "qk", "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 2e-5},
    "training": {"epochs": 1, "batch_size": 16, "max_length": 48, "eval_every": 3, "eval_rows": 24, "log_every": 2},
    "seed": 13,
}
SWEEP: dict[str, Any] = {
    "experiment": "small",
    "budget": 100_000,
    "space": {"learning_rate": {"low": 1e-3, "high": 5e-3}},
    "trials": 3,
    "confirmation": None,
    "seed": 13,
}


def write_project(folder: Path, experiment: dict[str, Any] | None = None, sweep: dict[str, Any] | None = None) -> Path:
    """Write `experiments/small.yaml` and `sweeps/small.yaml`, with some keys (dotted paths) set, or removed by None."""
    from ruamel.yaml import YAML  # a bare machine lacks it, and its tests write no project

    for kind, document, changes in (("experiments", EXPERIMENT, experiment), ("sweeps", SWEEP, sweep)):
        changed = copy.deepcopy(document)
        for path, value in (changes or {}).items():
            *parents, key = path.split(".")
            block = changed
            for parent in parents:
                block = block.setdefault(parent, {})
            if value is None:
                block.pop(key, None)
            else:
                block[key] = value
        (folder / kind).mkdir(parents=True, exist_ok=True)
        with (folder / kind / "small.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(changed, file)
    return folder


def agnews_lora(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in the project's folder."""
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), input=stdin, capture_output=True, text=True, check=False
    )


class Running:
    """The command line, running in a project's folder beside the test; killed at the end of the `with` block.

    It has a session of its own, so that Ctrl-C in the tests' terminal is not for it. stdout: what has been read so far.
    """

    def __init__(self, folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        self.stdout = ""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env={**environment(), **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    @property
    def stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def wait_for(self, text: str) -> None:
        """Read what it prints, until a line holds this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout += line
            if text in line:
                return
        raise AssertionError(f"it ended before {text!r}:\n{self.stdout}\n{self.stderr}")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait until it has ended; return its exit code."""
        assert self.process.stdout is not None
        self.stdout += self.process.stdout.read()
        return self.process.wait()


def command(*arguments: str) -> list[str]:
    """What runs the command line with the Python that runs the tests."""
    return [sys.executable, "-m", "agnews_lora", *arguments]


def environment() -> dict[str, str]:
    """The tests' own environment, without what `tests/conftest.py` put into it: a user has none of that."""
    return {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
