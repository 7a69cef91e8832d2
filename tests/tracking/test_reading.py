"""Runs read back as plain values, from a real store."""

import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from agnews_lora.tracking import reading
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialEnd
from tests.tracking.test_runs import FACTS, SPEC


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return open_client(tmp_path / "mlruns")


def open_sweep(client: MlflowClient, study: str) -> tuple[SweepRuns, str]:
    runs = SweepRuns(client, "small", "small")
    return runs, runs.open_parent(study, identity=study, params={"budget": 1}, tags={"device": "CPU"}, texts={})


def test_the_newest_study_of_a_sweep_is_found(client: MlflowClient) -> None:
    assert reading.newest_sweep(client, "small") is None
    open_sweep(client, "small")
    time.sleep(0.01)
    _, second = open_sweep(client, "small-2")
    newest = reading.newest_sweep(client, "small")
    assert newest is not None
    assert newest.run_id == second
    assert newest.tags["study"] == "small-2"
    assert newest.params == {"budget": "1"}
    assert newest.ended is None


def test_a_run_that_is_gone(client: MlflowClient) -> None:
    assert reading.read_run(client, "0" * 32) is None


def test_trials_with_their_points_and_data(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAGE", 2)  # more pages than one
    runs, parent = open_sweep(client, "small")
    runs.log_dataset("rows", "abc", num_rows=7, profile={}, source="here", context="training")
    for number in range(5):
        trial = f"t{number:04d}"
        runs.start_trial(trial, SPEC, FACTS, None)
        points = [TrainPoint(trial, 1, 0.5, 1e-3, 1), EvalPoint(trial, 2, 0.25 * number, 0.1, 0.9, 10, True, 2)]
        runs.log_points(trial, points)
        runs.finish_trial(trial, TrialEnd("COMPLETE"))
    found = reading.trials_of(client, parent)
    assert [run.tags["trial"] for run in found] == [f"t{number:04d}" for number in range(5)]
    assert [run.metrics["eval/accuracy"] for run in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found[0].datasets == (reading.DatasetUse("rows", "training", "abc", 7),)
    pd.testing.assert_frame_equal(reading.curve(client, found[3], "t0003"), runs.curve("t0003"), check_dtype=False)


def test_only_what_is_there_is_fetched(client: MlflowClient, tmp_path: Path) -> None:
    _, parent = open_sweep(client, "small")
    client.log_text(parent, "one", "a.txt")
    client.log_text(parent, "two", "deep/b.txt")
    found = reading.fetch(client, parent, ["a.txt", "deep/b.txt", "deep/c.txt", "absent.txt"], tmp_path / "to")
    assert {name: path.read_text() for name, path in found.items()} == {"a.txt": "one", "deep/b.txt": "two"}
