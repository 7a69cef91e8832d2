"""A store goes away in the middle of a sweep: for a while, for good, or while somebody presses Ctrl-C.

Training goes on, what it reports is kept on disk, and delivered when the store is back: in order, and nothing twice.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.cluster import Command, Stores, both_stores, missing
from tests.project import write_project
from tests.servers import MlflowServer, Postgres

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

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
        (EVAL_EVERY, ("eval/accuracy", "eval/macro_f1", "eval/loss")),
        (LOG_EVERY, ("train/loss", "train/learning_rate")),
    )
    for metric in metrics
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    with both_stores(tmp_path_factory.mktemp("stores")) as both:
        yield both


def test_every_point_is_there_after_both_stores_were_away_for_30_seconds(stores: Stores, tmp_path: Path) -> None:
    folder = project(tmp_path, "away", trials=2)
    with Command(folder, "sweep", "away", *stores.options) as sweep:
        sweep.wait_for(f"t0000 step {EVAL_EVERY}/")
        runs_gone = stopped(stores.mlflow.kill)
        time.sleep(3)
        studies_gone = stopped(stores.postgres.kill)
        runs_back = started(stores.mlflow.start, runs_gone + OUTAGE_SECONDS)
        studies_back = started(stores.postgres.start, studies_gone + OUTAGE_SECONDS)
        assert sweep.end() == 0, sweep.report()

    require_complete(stores, "away", trials=2)
    assert len(sweep.evaluated) == len(set(sweep.evaluated)) == 2 * STEPS // EVAL_EVERY, "training went on, once"
    taken = timestamps(stores, "away")
    for gone, back in ((runs_gone, runs_back), (studies_gone, studies_back)):
        assert any(gone < each < back for each in taken), "training went on without the store"
    assert not list((folder / "mlruns" / "work").rglob("journal.jsonl")), "what was delivered is kept no longer"


@pytest.mark.parametrize("name", ["mlflow", "postgres"])
def test_gone_for_good_or_stopped_meanwhile_loses_nothing(stores: Stores, tmp_path: Path, name: str) -> None:
    store: MlflowServer | Postgres = getattr(stores, name)
    folder = project(tmp_path, name, trials=1)
    arguments = ["sweep", name, *stores.options, "--patience", "4"]
    journal = folder / "mlruns" / "work" / name / name / "t0000" / "journal.jsonl"
    try:
        with Command(folder, *arguments) as lost:
            lost.wait_for(f"t0000 step {EVAL_EVERY}/")
            store.stop()
            assert lost.end() == 2, lost.report()
        assert lost.stderr.count("agnews-lora: ") == 1, lost.stderr
        assert "nothing is lost" in lost.stderr
        assert "Traceback" not in lost.report()
        assert evaluations(journal) == [step for _, step in lost.evaluated]
    finally:
        store.start()

    try:
        with Command(folder, *arguments) as interrupted:
            interrupted.wait_for("t0000 step ")
            store.stop()
            time.sleep(1)
            interrupted.interrupt()
            began = time.monotonic()
            assert interrupted.end() == 130, interrupted.report()
            assert time.monotonic() - began < 20, "a stop must not wait for a store"
        assert "Traceback" not in interrupted.report()
        assert evaluations(journal) == [step for _, step in lost.evaluated + interrupted.evaluated]
    finally:
        store.start()

    with Command(folder, *arguments) as last:
        assert last.end() == 0, last.report()
    evaluated = lost.evaluated + interrupted.evaluated + last.evaluated
    assert evaluated == [("t0000", step) for step in EXPECTED["eval/accuracy"]], "each start goes on where one ended"
    require_complete(stores, name, trials=1)


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


def evaluations(journal: Path) -> list[int]:
    """Steps of the evaluations that a trial's journal holds."""
    entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return [entry["EvalPoint"]["step"] for entry in entries if "EvalPoint" in entry]
