"""The end of a sweep: what it leaves in MLflow and as result.json, and that a promotion brings all of it up to date."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run

from agnews_lora.cli import main
from agnews_lora.commands import finish
from agnews_lora.commands.finish import answers_of, predictions_of, tfidf_scores
from agnews_lora.commands.sweep import run_sweep
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.rows import Rows
from agnews_lora.reporting.figures import ANSWER_FIGURES, FIGURES
from agnews_lora.search.results import SweepResult
from agnews_lora.serving import model_package
from agnews_lora.tracking.descriptions import MARK
from agnews_lora.tracking.runs import MAX_DESCRIPTION
from agnews_lora.tracking.store import open_client
from agnews_lora.training.multilora.trial_state import TrialState
from tests.project import write_project
from tests.tiny import tiny_base

NOTE = "mlflow.note.content"
DRAWN = set(FIGURES) - {"parameter_importance.png"}  # three trials are too few for it


@pytest.fixture(scope="module")
def client(finished_once: Path) -> MlflowClient:
    return open_client(finished_once / "mlruns")


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


def stored(client: MlflowClient) -> SweepResult:
    return SweepResult.from_json(read(client, parent_of(client), "result.json"))


def test_the_result_is_the_same_in_the_stores_folder_and_on_the_parent_run(
    finished_once: Path, client: MlflowClient
) -> None:
    found, winner, parent = stored(client), winner_of(client), parent_of(client)
    assert found == SweepResult.from_json((finished_once / "mlruns/results/small.json").read_text(encoding="utf-8"))
    assert found.winner is not None and found.winner.run_id == winner.info.run_id
    assert found.winner.accuracy == winner.data.metrics["eval/accuracy"]
    assert (found.study, found.state, found.run_id) == ("small", "COMPLETE", parent.info.run_id)
    assert found.confirmation is not None and len(found.confirmation.runs) == 2
    assert found.facts.planned_trials == 3 and set(found.facts.texts) == {"small.yaml", "experiment-small.yaml"}
    assert found.wall_seconds and found.record_seconds


def test_the_parent_run_has_figures_tables_metrics_and_its_description(client: MlflowClient) -> None:
    parent, winner, found = parent_of(client), winner_of(client), stored(client)
    reports = {"report.html", "report.pdf"}
    assert artifacts(client, parent) >= DRAWN | reports | {"leaderboard.json", "leaderboard.csv", "result.json"}
    assert artifacts(client, parent, "thumbnails") == {f"thumbnails/{name}" for name in DRAWN}
    metrics = parent.data.metrics
    assert metrics["best/accuracy"] == pytest.approx(winner.data.metrics["eval/accuracy"], abs=1e-6)
    assert metrics["best/gain"] == pytest.approx(metrics["best/accuracy"] - metrics["baseline/accuracy"], abs=1e-6)
    assert metrics["trials/complete"] + metrics["trials/pruned"] == 3
    assert found.confirmation is not None
    assert metrics["confirmation/mean_accuracy"] == pytest.approx(found.confirmation.mean("accuracy"), abs=1e-6)
    assert metrics["best/macro_f1"] == pytest.approx(winner.data.metrics["eval/macro_f1"], abs=1e-6)
    assert metrics["majority/accuracy"] == found.facts.majority_accuracy
    assert parent.data.tags["best_trial"] == winner.data.tags["trial"]
    shown = parent.data.tags[NOTE]
    assert len(shown) <= MAX_DESCRIPTION and winner.info.run_id in shown.splitlines()[0]
    for name in DRAWN:
        assert f"thumbnails%2F{name}" in shown
    leaderboard = pd.read_csv(io.StringIO(read(client, parent, "leaderboard.csv")))
    assert leaderboard["trial"].tolist() == [row.trial for row in found.ranking]


def test_trials_share_params_and_metrics_and_say_how_they_ended(client: MlflowClient) -> None:
    children = find(client, "tags.kind = 'trial'")
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert len({frozenset(run.data.metrics) for run in children}) == 1
    assert set(children[0].data.metrics) >= {"eval/accuracy", "eval/loss", "train/loss"}
    for run in children:
        shown = run.data.tags[NOTE]
        assert "trainable parameters" in shown and run.data.params["targets"] in shown
        assert artifacts(client, run, "thumbnails") >= {"thumbnails/accuracy_curve.png", "thumbnails/loss_curve.png"}
    assert "never pruned" in children[0].data.tags[NOTE] or children[0].data.tags.get("winner") == "true"


def test_predictions_mistakes_and_counts_of_the_winner_agree(client: MlflowClient) -> None:
    winner, answers = winner_of(client), stored(client).answers
    assert answers is not None
    predictions = pd.read_csv(io.StringIO(read(client, winner, "predictions.csv")))
    assert predictions.columns.tolist() == ["row", "label", "predicted", "confidence", *LABELS]
    assert predictions["row"].tolist() == list(range(60))
    assert predictions[list(LABELS)].sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-5)
    right = (predictions["label"] == predictions["predicted"]).sum()
    assert right == sum(rows for label, predicted, rows in answers.confusion if label == predicted)
    assert right / 60 == pytest.approx(winner.data.metrics["eval/accuracy"], abs=0.02)  # in fp32, not as it trained
    assert answers.against_baseline is not None and sum(answers.against_baseline.values()) == 60
    assert {"path": "mistakes.json", "type": "table"} in json.loads(winner.data.tags["mlflow.loggedArtifacts"])
    table = json.loads(read(client, winner, "mistakes.json"))
    assert table["columns"] == ["row", "label", "predicted", "confidence", "text"]
    assert len(table["data"]) == len(answers.mistakes) == 10
    assert artifacts(client, winner) >= set(ANSWER_FIGURES)


def test_registered_version_is_described_and_its_model_shows_scores_and_data(client: MlflowClient) -> None:
    winner, parent = winner_of(client), parent_of(client)
    version = client.get_model_version("small", "1")
    assert version.description.startswith(f"{MARK}Passed the promotion checks: test accuracy")
    assert version.tags["confirmation_seeds"] == "2"
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


def test_after_a_promotion_result_and_pages_tell_of_the_champion_alone(client: MlflowClient) -> None:
    registration = stored(client).registration
    assert registration is not None and registration.aliases == ("champion",) and registration.test is not None
    assert registration.test["rows"] == 200 and all(check["passed"] for check in registration.checks)
    for run in (parent_of(client), winner_of(client)):
        assert "candidate" not in run.data.tags[NOTE] and "promote" not in run.data.tags[NOTE]
    assert "On the test split, scored once" in parent_of(client).data.tags[NOTE]


def test_finishing_again_computes_nothing_anew_and_tells_of_a_winner_that_was_overtaken(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_project)
    client = open_client(finished_project / "mlruns")
    before, winner, found = parent_of(client), winner_of(client), stored(client)
    (other, *_) = [run for run in find(client, "tags.study_trial != ''") if "winner" not in run.data.tags]
    client.set_tag(other.info.run_id, "winner", "true")
    history = client.get_metric_history(winner.info.run_id, "eval/accuracy")
    written = Path(client.download_artifacts(winner.info.run_id, "predictions.csv")).stat().st_mtime_ns
    said, again = json.loads(run_sweep("small", quiet=True).to_json()), stored(client)
    assert said == json.loads(again.to_json()) and said["winner"]["run_id"] == winner.info.run_id
    assert (again.trials, again.answers, again.registration) == (found.trials, found.answers, found.registration)
    assert parent_of(client).data.tags[NOTE] == before.data.tags[NOTE]
    assert winner_of(client).info.run_id == winner.info.run_id
    overtaken = client.get_run(other.info.run_id).data.tags
    assert overtaken["winner"] == "false" and overtaken[NOTE].startswith(f"{MARK}**Won [the sweep]")
    assert len(client.get_metric_history(winner.info.run_id, "eval/accuracy")) == len(history)
    kept = Path(client.download_artifacts(winner.info.run_id, "predictions.csv")).stat().st_mtime_ns
    assert kept == written
    assert len(client.get_run(before.info.run_id).outputs.model_outputs) == 1


def test_an_engine_that_computes_something_else_registers_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its training is sound, its scores are of other logits; mended, the same sweep registers what it has trained.

    A large constant on one class is far from what PEFT finds whatever the weights are, even at chance.
    """
    base = str(tiny_base(tmp_path / "tiny-bert", "bert"))
    monkeypatch.chdir(write_project(tmp_path, experiment={"base": base}, sweep={"trials": 1}))
    with monkeypatch.context() as broken:
        score, error = TrialState.score, np.asarray([50.0, 0.0, 0.0, 0.0], np.float32)
        broken.setattr(
            TrialState, "score", lambda self, logits, labels, seconds: score(self, logits + error, labels, seconds)
        )
        assert main(["sweep", "small", "--json"]) == 2
    client = open_client(tmp_path / "mlruns")
    message, run = capsys.readouterr().err, find(client, "tags.kind = 'trial'")[0]
    scores = run.data.metrics["eval/accuracy"], run.data.metrics["eval/loss"]
    assert f"but accuracy {scores[0]:.2%} and loss {scores[1]:.4g} by the engine" in message
    assert client.search_model_versions("name = 'small'") == [] and run.info.status == "FINISHED"
    assert parent_of(client).info.status != "FINISHED"
    study_scores = client.get_metric_history(run.info.run_id, "eval/accuracy")
    monkeypatch.setattr(model_package, "require_reported", lambda *given: None)
    assert main(["sweep", "small", "--json"]) == 0
    assert len(client.search_model_versions("name = 'small'")) == 1
    assert client.get_metric_history(run.info.run_id, "eval/accuracy") == study_scores, "nothing is trained again"


# Answers -------------------------------------------------------------------------------------------------------------


def corpus(labels: list[int]) -> Any:
    texts = tuple(f"text {row}" for row in range(len(labels)))
    return SimpleNamespace(
        labels=LABELS, validation=SimpleNamespace(labels=labels), validation_rows=SimpleNamespace(texts=texts)
    )


def surely(predicted: list[int], confidence: list[float]) -> np.ndarray:
    rows = [[(1 - sure) / 3] * 4 for sure in confidence]
    for row, label, sure in zip(rows, predicted, confidence, strict=True):
        row[label] = sure
    return np.asarray(rows)


def test_answers_count_labels_bins_mistakes_and_pairs() -> None:
    labels = [0, 1, 2, 3, 3]
    probabilities = surely([0, 1, 3, 3, 0], [0.9, 0.3, 0.75, 0.72, 0.75])
    answers = answers_of(probabilities, corpus(labels), np.asarray([0, 0, 2, 3, 1]))
    assert answers.confusion == ((0, 0, 1), (1, 1, 1), (2, 3, 1), (3, 0, 1), (3, 3, 1))
    bins = {each["low"]: (each["count"], each["accuracy"]) for each in answers.calibration}
    # 0.3 and 0.9 are edges, which belong to the bin below.
    assert bins == {0.2: (1, 1.0), 0.7: (3, pytest.approx(1 / 3)), 0.8: (1, 1.0)}
    assert [(each["row"], each["label"], each["predicted"]) for each in answers.mistakes] == [
        (2, "Business", "Sci/Tech"),
        (4, "Sci/Tech", "World"),
    ]
    assert answers.mistakes[0]["text"] == "text 2"
    assert answers.against_baseline == {"both": 2, "only_winner": 1, "only_baseline": 1, "neither": 1}
    assert answers_of(probabilities, corpus(labels)).against_baseline is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.3, 1.0)), min_size=1, max_size=40))
def test_every_answer_is_counted_once(rows: list[tuple[int, int, float]]) -> None:
    labels, predicted, confidence = (list(column) for column in zip(*rows, strict=True))
    answers = answers_of(surely(predicted, confidence), corpus(labels))
    assert (
        sum(count for _, _, count in answers.confusion)
        == sum(each["count"] for each in answers.calibration)
        == len(rows)
    )
    wrong = sum(label != answer for label, answer, _ in rows)
    assert len(answers.mistakes) == min(10, wrong)
    sure = [each["confidence"] for each in answers.mistakes]
    assert sure == sorted(sure, reverse=True)
    json.dumps(answers.calibration + answers.mistakes)  # plain numbers


@pytest.mark.parametrize("num_classes", [2, 1000])
def test_predictions_have_a_column_a_class_where_there_are_few_whatever_their_names(num_classes: int) -> None:
    names = ("row", "label", *(f"class {label}" for label in range(2, num_classes)))
    probabilities = np.full((3, num_classes), 0.5 / num_classes)
    probabilities[:, 1] += 0.5
    of = SimpleNamespace(labels=names, validation=SimpleNamespace(labels=np.asarray([0, 1, 1])))
    found = predictions_of(probabilities, of)  # type: ignore[arg-type]
    assert len(set(found.columns)) == len(found.columns) == (6 if num_classes == 2 else 4)
    assert found.iloc[:, 1].tolist() == ["row", "label", "label"] and set(found["predicted"]) == {"label"}


@pytest.mark.parametrize("limit", [finish.MAX_EXACT_WEIGHTS, 0])
def test_tfidf_tells_topics_apart_with_few_and_with_many_classes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "MAX_EXACT_WEIGHTS", limit)
    topics = ("oil prices", "football match", "new software")
    train = Rows(tuple(f"{topic} number {n}" for n in range(20) for topic in topics), (0, 1, 2) * 20)
    scores = tfidf_scores(train, Rows(topics, (0, 1, 2)))
    assert scores == {"accuracy": 1.0, "macro_f1": 1.0}


def test_tfidf_has_no_score_where_no_text_has_a_word() -> None:
    assert tfidf_scores(Rows(("a", "?"), (0, 1)), Rows(("b",), (0,))) == {}
