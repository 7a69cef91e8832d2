"""A study that several machines work on: each is a project folder of its own, and they share the two stores alone.

A machine that dies in the middle of a trial leaves its newest checkpoint with the trial's run, for another to go on.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy import text

from agnews_lora.tracking import kept
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.training import checkpoints
from tests.commands.cluster import PATIENCE_SECONDS, Command, Stores, both_stores, missing
from tests.project import agnews_lora, write_project

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TAKEN_OVER_SECONDS = 60.0  # a lease that nobody holds any more goes stale in 30
EVAL_EVERY, LOG_EVERY = 5, 2


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    with both_stores(tmp_path_factory.mktemp("stores")) as both:
        yield both


def test_a_sweep_and_a_worker_elsewhere_end_exactly_what_was_asked(stores: Stores, tmp_path: Path) -> None:
    here, there = (project(tmp_path / folder, "shared", steps=20, trials=4) for folder in ("here", "there"))
    open_study(stores, here, "shared")
    with (
        Command(here, "sweep", "shared", *stores.options) as sweep,
        Command(there, "worker", "shared", *stores.options) as worker,
    ):
        assert sweep.end() == 0, sweep.report()
        assert worker.end() == 0, worker.report()
    taken, elsewhere = ({trial for trial, _ in command.evaluated} for command in (sweep, worker))
    assert taken and elsewhere and not taken & elsewhere, f"here {taken}, there {elsewhere}"
    require_complete(stores, "shared", steps=20, trials=4)


def test_a_trial_of_a_dead_machine_goes_on_from_the_checkpoint_that_its_run_has(stores: Stores, tmp_path: Path) -> None:
    steps = 80
    here, *others = (project(tmp_path / folder, "handed", steps, trials=2) for folder in ("here", "there", "elsewhere"))
    open_study(stores, here, "handed")
    with (
        Command(others[0], "worker", "handed", *stores.options) as first,
        Command(others[1], "worker", "handed", *stores.options) as second,
    ):
        for worker in (first, second):
            worker.wait_for(" started: ")
        with Command(here, "sweep", "handed", *stores.options) as sweep:
            wait_until(lambda: "supervisor" in leases(stores))
            wait_until(lambda: all(handed_on(stores, trial) for trial in ("t0000", "t0001")))
            first.kill()
            second.kill()
            died = time.monotonic()
            [newest] = stores.checkpoints("handed", "t0000")
            delete_checkpoints(stores, "t0001")
            sweep.wait_for("t0000 started: ")
            assert time.monotonic() - died < TAKEN_OVER_SECONDS
            assert sweep.end() == 0, sweep.report()

    assert {trial for worker in (first, second) for trial, _ in worker.evaluated} == {"t0000", "t0001"}
    step = int(newest.removeprefix("checkpoint-"))
    expected = list(range(EVAL_EVERY, steps + 1, EVAL_EVERY))
    evaluated = {name: [step for trial, step in sweep.evaluated if trial == name] for name in ("t0000", "t0001")}
    assert evaluated["t0000"] == [each for each in expected if each >= step], "the checkpoint is older than its score"
    assert evaluated["t0001"] == expected
    assert re.search(r"^t0001 starts again from step 0: .* neither here nor from its run", sweep.stdout, re.M)
    assert "t0000 starts again" not in sweep.stdout
    require_complete(stores, "handed", steps, trials=2)


def test_the_newest_two_checkpoints_are_kept_until_the_trial_ends(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    runs = SweepRuns(stores.client, "kept", "kept")
    run_id = runs.start_trial("t0000", "t0000-qv-r4", {}, {})
    for step in (3, 6, 12):
        with checkpoints.written("t0000", tmp_path / "here", step) as folder:
            (folder / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        runs.keep_checkpoint("t0000", tmp_path / "here" / f"checkpoint-{step}")
    assert stores.checkpoints("kept", "t0000") == ["checkpoint-12", "checkpoint-6"]

    (tmp_path / "there").mkdir()
    runs.fetch_checkpoints("t0000", tmp_path / "there")
    newest = checkpoints.newest(tmp_path / "there")
    assert newest is not None and newest.name == "checkpoint-12"
    assert json.loads((newest / "state.json").read_text(encoding="utf-8")) == {"step": 12}

    runs.finish_trial("t0000", "INTERRUPTED")
    assert len(stores.checkpoints("kept", "t0000")) == 2, "it is to go on"
    runs.start_trial("t0000", "t0000-qv-r4", {}, {}, run_id)
    runs.finish_trial("t0000", "COMPLETE")
    assert stores.checkpoints("kept", "t0000") == []


def project(folder: Path, name: str, steps: int, trials: int) -> Path:
    """A machine: a project with the same sweep as the others'."""
    experiment = {
        "data.rows": 2_200,
        "data.train_rows": 16 * steps,
        "training.eval_every": EVAL_EVERY,
        "training.log_every": LOG_EVERY,
    }
    write_project(folder, experiment, {"trials": trials, "slots": 1})
    (folder / "sweeps" / "small.yaml").rename(folder / "sweeps" / f"{name}.yaml")
    return folder


def open_study(stores: Stores, folder: Path, name: str) -> None:
    """Let a sweep make the study, so that workers can join it, and leave before it trains anything."""
    done = agnews_lora(folder, "sweep", name, *stores.options, "--timeout", "0.001")
    assert done.returncode == 0, done.stderr
    assert "started" not in done.stdout


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def leases(stores: Stores) -> list[str]:
    """What somebody holds."""
    with stores.storage() as storage, storage.engine.connect() as connection:
        return [name for (name,) in connection.execute(text("SELECT name FROM agnews_lora_leases"))]


def handed_on(stores: Stores, trial: str) -> bool:
    """Whether a trial has left a checkpoint with its run, and come further."""
    evaluations = stores.trials("handed")[int(trial[1:])].intermediate_values
    return bool(stores.checkpoints("handed", trial) and evaluations)


def delete_checkpoints(stores: Stores, trial: str) -> None:
    uri = stores.run_of("handed", trial).info.artifact_uri
    get_artifact_repository(uri, tracking_uri=stores.client.tracking_uri).delete_artifacts("checkpoints")
    assert stores.checkpoints("handed", trial) == []


def require_complete(stores: Stores, name: str, steps: int, trials: int) -> None:
    """All trials have ended, their runs have every point once, and no checkpoint is kept any more."""
    assert [trial.state.name for trial in stores.trials(name)] == ["COMPLETE"] * trials
    runs = stores.runs(name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == trials + 1
    for trial in stores.trials(name):
        for metric, every in (("eval/accuracy", EVAL_EVERY), ("train/loss", LOG_EVERY)):
            history = stores.client.get_metric_history(trial.user_attrs["run_id"], metric)
            assert sorted(point.step for point in history) == list(range(every, steps + 1, every))
        assert stores.checkpoints(name, f"t{trial.number:04d}") == []
