"""Several worker processes on one study, on SQLite and PostgreSQL: each trial is trained by one, and none too many."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest
from optuna.trial import TrialState

from agnews_lora.tracking.store import open_client
from benchmarks.worker_process import Job
from benchmarks.workers_crew import Crew
from tests.search.scripted import EVAL_EVERY, LOG_EVERY
from tests.servers import Postgres, postgres_missing

WORKERS = 4
NOTICED = 0.1  # what the leases' times are multiplied by: a dead worker's trials are taken over after 3 s
SECONDS = 300.0  # more than any of these crews needs, on a busy machine


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """URL of the studies' storage, and the environment that its users need."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'optuna.db'}", {}
        return
    if (missing := postgres_missing()) is not None:
        pytest.skip(missing)
    with Postgres(tmp_path) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", server.password)
        yield server.url, server.environment


def job_in(folder: Path, url: str, step_seconds: float = 0.0, lease_scale: float = 1.0, runs: bool = False) -> Job:
    return Job(
        name="workers",
        storage=url,
        folder=str(folder / "crew"),
        runs=str(folder / "runs") if runs else None,
        step_seconds=step_seconds,
        lease_scale=lease_scale,
        waits_for_disk=False,
    )


def until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_four_workers_end_exactly_as_many_trials_as_were_asked_for(
    tmp_path: Path, storage: tuple[str, Mapping[str, str]]
) -> None:
    url, environment = storage
    with Crew(job_in(tmp_path, url), WORKERS, 120, environment) as crew:
        crew.begin()
        crew.finish(SECONDS)
        assert crew.faults() == []
        assert all(len(crew.started(number)) > 5 for number in range(WORKERS))  # the work is shared


def test_what_a_killed_worker_held_is_trained_by_the_others(
    tmp_path: Path, storage: tuple[str, Mapping[str, str]]
) -> None:
    url, environment = storage
    with Crew(job_in(tmp_path, url, step_seconds=0.05, lease_scale=NOTICED), WORKERS, 24, environment) as crew:
        crew.begin()
        until(lambda: len(crew.started(1)) == 2)
        crew.processes[1].kill()
        crew.finish(SECONDS)
        assert crew.faults(disturbed=frozenset({1})) == []
        [left] = crew.started(1)[1:]
        assert any(left in crew.started(number) for number in (0, 2, 3))


@pytest.mark.parametrize(
    ("step_seconds", "trials", "runs"),
    [
        pytest.param(0.05, 24, False, id="its trial has ended elsewhere by then"),
        pytest.param(0.3, 8, True, id="its trial is being trained elsewhere"),
    ],
)
def test_a_worker_that_was_stopped_for_long_disturbs_nothing(
    tmp_path: Path, step_seconds: float, trials: int, runs: bool
) -> None:
    job = job_in(tmp_path, f"sqlite:///{tmp_path / 'optuna.db'}", step_seconds, NOTICED, runs)
    with Crew(job, WORKERS, trials) as crew:
        crew.begin()
        until(lambda: bool(crew.started(2)))
        held = stopped_in_a_trial(crew, 2, tmp_path / "optuna.db")
        until(lambda: any(held in crew.started(number) for number in (0, 1, 3)))
        time.sleep(2.0)  # a trial of short steps ends in that time, one of long steps does not
        os.kill(crew.processes[2].pid, signal.SIGCONT)
        crew.finish(SECONDS)
        assert crew.faults(disturbed=frozenset({2})) == []
        if job.runs is not None:
            runs_agree_with_the_study(crew, Path(job.runs))


def stopped_in_a_trial(crew: Crew, number: int, database: Path) -> str:
    """Stop a worker while it trains, and give the trial that it holds.

    Not in the midst of a write: SQLite would keep everybody waiting for as long as the worker is stopped.
    """
    while True:
        time.sleep(0.3)
        os.kill(crew.processes[number].pid, signal.SIGSTOP)
        held = crew.started(number)[-1]
        connection = sqlite3.connect(database, timeout=1.0, isolation_level=None)
        with closing(connection), suppress(sqlite3.OperationalError):
            connection.execute("BEGIN IMMEDIATE")
            query = "SELECT state FROM trials WHERE number = ?"
            if connection.execute(query, [int(held.removeprefix("t"))]).fetchone() == ("RUNNING",):
                return held
        os.kill(crew.processes[number].pid, signal.SIGCONT)


def runs_agree_with_the_study(crew: Crew, runs: Path) -> None:
    """One run a trial, ended as its trial did, with each of the trial's points once."""
    client = open_client(runs)
    experiment = client.get_experiment_by_name("workers")
    assert experiment is not None
    children = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert sorted(int(run.data.tags["study_trial"]) for run in children) == list(range(crew.trials))
    trials = crew.study.get_trials(deepcopy=False)
    for run in children:
        trial = trials[int(run.data.tags["study_trial"])]
        last = trial.last_step
        assert last is not None
        assert run.data.tags["state"] == trial.state.name
        assert run.info.status == ("FINISHED" if trial.state is TrialState.COMPLETE else "KILLED")
        accuracies = client.get_metric_history(run.info.run_id, "eval/accuracy")
        assert [(point.step, point.value) for point in accuracies] == list(trial.intermediate_values.items())
        losses = client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in losses] == list(range(LOG_EVERY, last + 1, LOG_EVERY))
        assert last % EVAL_EVERY == 0
