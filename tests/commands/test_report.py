"""`agnews-lora report` over a real store, with runs and results made by hand: nothing is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from agnews_lora.cli import main
from agnews_lora.search.results import SweepResult
from agnews_lora.tracking.store import open_client
from tests.reporting.results import bare, curve, result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def client(folder: Path) -> MlflowClient:
    """Of the folder's run store, in which each test has a sweep of its own."""
    return open_client(folder / "mlruns")


@pytest.fixture(autouse=True)
def in_folder(client: MlflowClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def new_experiment(client: MlflowClient, sweep: str) -> str:
    """With its artifacts in the folder: MLflow's own place for them is where the tests were started."""
    return str(client.create_experiment(sweep, artifact_location=str(Path("mlruns", "artifacts").resolve())))


def parent_run(client: MlflowClient, sweep: str, state: str, text: str | None) -> str:
    """A new parent run. text: of its `result.json`; None where it has none."""
    known = client.get_experiment_by_name(sweep)
    experiment = known.experiment_id if known else new_experiment(client, sweep)
    run = client.create_run(experiment, tags={"kind": "sweep", "state": state}, run_name="small-2").info.run_id
    if text is not None:
        client.log_text(run, text, "result.json")
    return str(run)


def with_runs(client: MlflowClient, sweep: str, of: SweepResult) -> SweepResult:
    """The result with the ids of new runs that have its trials' curves."""
    experiment, rows = new_experiment(client, sweep), []
    for row in of.trials:
        run = client.create_run(experiment, tags={"kind": "trial"}).info.run_id
        for point in curve(row).to_dict("records"):
            for name in ("train/loss", "eval/accuracy"):
                client.log_metric(run, name, point[name], step=point["step"])
        rows.append(replace(row, run_id=run))
    return replace(of, trials=tuple(rows))


def test_a_finished_sweep_is_reported_from_its_run_store_alone(
    client: MlflowClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = parent_run(client, "full", "COMPLETE", with_runs(client, "full", result(confirmed=())).to_json())
    assert main(["report", "full"]) == 0
    shown = capsys.readouterr().out
    assert "winner t0001" in shown and "reports/small-2.html" in shown
    written = {path.name: path for path in (folder / "reports").iterdir()}
    assert sorted(written) == ["small-2.html", "small-2.pdf"]
    assert "Learning curves" in written["small-2.html"].read_text(encoding="utf-8")  # so the runs' curves were read
    for name in ("html", "pdf"):
        kept = download_artifacts(
            run_id=parent, artifact_path=f"report.{name}", tracking_uri=client.tracking_uri, dst_path=str(folder)
        )
        assert Path(kept).read_bytes() == written[f"small-2.{name}"].read_bytes()


def test_the_newest_study_is_taken_and_a_trial_whose_run_is_gone_has_no_curve(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    parent_run(client, "newest", "COMPLETE", bare(study="small").to_json())
    parent_run(client, "newest", "COMPLETE", bare().to_json())
    assert main(["report", "sweeps/newest.yaml", "--to", "elsewhere", "--json"]) == 0
    paths = {"html": "elsewhere/small-2.html", "pdf": "elsewhere/small-2.pdf"}
    assert json.loads(capsys.readouterr().out) == {"study": "small-2", **paths}


@pytest.mark.parametrize(
    ("sweep", "state", "text", "cause"),
    [
        ("under-way", "RUNNING", bare().to_json(), "not finished (its state is RUNNING)"),
        ("stopped", "INTERRUPTED", None, "not finished (its state is INTERRUPTED)"),
        ("old", "COMPLETE", None, "has no result.json"),
        ("damaged", "COMPLETE", "{}", "Cannot read result.json"),
    ],
)
def test_a_sweep_without_a_result_is_refused_with_the_remedy(
    sweep: str, state: str, text: str | None, cause: str, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    parent_run(client, sweep, state, text)
    assert main(["report", sweep, "--to", "refused"]) == 2
    message = capsys.readouterr().err
    assert cause in message and f"agnews-lora sweep {sweep}" in message
    assert not Path("refused").exists()


def test_a_sweep_that_never_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "other"]) == 2
    assert "Run `agnews-lora sweep other`" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # which has no store, and gets none
    assert main(["report", "other"]) == 2
    assert "has no run of this sweep" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(client: MlflowClient, capsys: pytest.CaptureFixture[str]) -> None:
    parent_run(client, "no-place", "COMPLETE", bare(trials=()).to_json())
    Path("file").touch()
    assert main(["report", "no-place", "--to", "file"]) == 2
    assert "name another one with --to" in capsys.readouterr().err
