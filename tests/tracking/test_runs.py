import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError
from agnews_lora.tracking.descriptions import MARK
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import MAX_DESCRIPTION, METRICS, SweepRuns, find_run, newest_parent, page_of, read_curve
from agnews_lora.tracking.store import open_client, tracking_uri
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialEnd, TrialResult

SPEC = TrialSpec("qv", rank=8, alpha=16.0, dropout=0.1, learning_rate=2e-4)
FACTS = {"seed": 1, "trainable_parameters": 5_000, "baseline": False, "study_trial": 0}
PARAMS = {
    "targets": "qv",
    "lora_r": "8",
    "lora_alpha": "16",
    "lora_dropout": "0.1",
    "learning_rate": "0.0002",
    "head": "full",
    "trainable_parameters": "5000",
    "seed": "1",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a store") / "mlruns"


@pytest.fixture(scope="module")
def client(root: Path) -> MlflowClient:
    return open_client(root)


@pytest.fixture
def runs(client: MlflowClient, request: pytest.FixtureRequest) -> SweepRuns:
    return SweepRuns(client, request.node.name)


@pytest.fixture
def parent(runs: SweepRuns) -> str:
    return runs.open_parent(
        "embedded-1", params={"budget": 100_000}, tags={"device": "CPU"}, texts={"sweep.yaml": "a: 1\n"}
    )


@pytest.fixture
def later(client: MlflowClient, parent: str, request: pytest.FixtureRequest) -> SweepRuns:
    """The same study in another process."""
    runs = SweepRuns(client, request.node.name)
    assert runs.open_parent("embedded-1", params={}, tags={}, texts={}) == parent
    return runs


def train_points(*steps: int, trial: str = "t0000", timestamp: int = 1_000) -> list[TrainPoint]:
    return [TrainPoint(trial, step, 1 / step, 1e-4 * step, timestamp + step) for step in steps]


def eval_point(step: int, *, accuracy: float = 0.8, final: bool = False, timestamp: int = 1_000) -> EvalPoint:
    return EvalPoint("t0000", step, accuracy, accuracy - 0.01, 0.5, 2_000, final, timestamp + step)


def ended(**changes: Any) -> TrialResult:
    whole = TrialResult("t0000", 20, 20, None, None, 5_000, 1_200, 1.0, 0.5, 1_000)
    return replace(whole, **changes)


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float, int]]:
    return sorted((metric.step, metric.value, metric.timestamp) for metric in client.get_metric_history(run_id, key))


def artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, path)}


def text(client: MlflowClient, run_id: str, name: str) -> str:
    return Path(client.download_artifacts(run_id, name)).read_text()


# The store --------------------------------------------------------------------------------------------------


def test_two_processes_create_one_store_in_its_folder_and_say_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from agnews_lora.tracking.runs import SweepRuns; "
        "from agnews_lora.tracking.store import open_client; runs = SweepRuns(open_client(Path('mlruns')), 'e'); "
        "runs.open_parent(sys.argv[1], params={}, tags={}, texts={'a.txt': 'b'})"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, study],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for study in ("first", "second")
    ]
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"mlruns"}
    assert {path.name for path in (tmp_path / "mlruns").iterdir()} == {"mlflow.db", "artifacts", "lock"}
    reopened = open_client(tmp_path / "mlruns")
    assert (
        reopened.tracking_uri == tracking_uri(tmp_path / "mlruns") == f"sqlite+pysqlite:///{tmp_path}/mlruns/mlflow.db"
    )
    experiment = reopened.get_experiment_by_name("e")
    assert experiment.artifact_location == (tmp_path / "mlruns/artifacts").as_uri()
    assert {run.info.run_name for run in reopened.search_runs([experiment.experiment_id])} == {"first", "second"}
    assert len(list((tmp_path / "mlruns/artifacts").rglob("a.txt"))) == 2


def test_store_that_a_killed_process_left_half_made_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".schema").mkdir()
    (tmp_path / ".schema" / "mlflow.db").write_bytes(b"half")
    assert open_client(tmp_path).get_experiment_by_name("Default") is not None
    assert not (tmp_path / ".schema").exists()


def test_store_that_is_no_folder_or_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("notes on the sweep, and long enough to be read as a header by SQLite" * 20)
    for root, cause in ((tmp_path, "file is not a database"), (tmp_path / "mlflow.db" / "mlruns", "permissions")):
        with pytest.raises(StorageError, match=f"Cannot use the run store {root}/mlflow.db: .*{cause}"):
            open_client(root)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(
    client: MlflowClient, runs: SweepRuns, request: pytest.FixtureRequest
) -> None:
    experiment = client.get_experiment_by_name(request.node.name).experiment_id
    client.delete_experiment(experiment)
    for use in (SweepRuns, newest_parent):
        with pytest.raises(StorageError, match=f"was deleted. Restore it .*--experiment-id {experiment}`"):
            use(client, request.node.name)


def test_experiment_whose_artifacts_lie_elsewhere_is_refused(client: MlflowClient) -> None:
    client.create_experiment("moved", artifact_location="file:///elsewhere/mlruns/artifacts")
    with pytest.raises(StorageError, match=r"file:///elsewhere/mlruns/artifacts and not to .*Rename"):
        SweepRuns(client, "moved")


# The parent run ---------------------------------------------------------------------------------------------


def test_parent_run_carries_what_was_asked_and_keeps_it_when_it_is_resumed(
    client: MlflowClient,
    runs: SweepRuns,
    parent: str,
    later: SweepRuns,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    run = client.get_run(parent)
    assert (run.info.run_name, run.info.status, run.data.params) == ("embedded-1", "RUNNING", {"budget": "100000"})
    tags = {"device": "CPU", "study": "embedded-1", "sweep": request.node.name, "state": "RUNNING"}
    assert run.data.tags.items() >= tags.items()
    assert text(client, parent, "sweep.yaml") == "a: 1\n"
    figure = tmp_path / "drawn.png"
    figure.write_bytes(b"png")
    runs.close_parent("INTERRUPTED", metrics={"best/accuracy": 0.8}, artifacts={"history.png": figure})
    assert client.get_run(parent).info.status == "KILLED"
    resumed = later.open_parent("embedded-1", params={"budget": 1, "seed": 7}, tags={"device": "GPU"}, texts={})
    assert resumed == parent
    assert client.get_run(parent).info.status == "RUNNING"
    assert client.get_run(parent).data.params == {"budget": "100000", "seed": "7"}
    later.close_parent("COMPLETE", metrics={"best/accuracy": 0.9}, tags={"winner": "t0003"})
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"best/accuracy": 0.9}
    assert run.data.tags.items() >= {"device": "GPU", "winner": "t0003", "state": "COMPLETE"}.items()
    assert artifacts(client, parent) == {"sweep.yaml", "history.png"}


def test_dataset_is_an_input_of_parent_and_trials_under_our_digest(
    client: MlflowClient, runs: SweepRuns, parent: str, later: SweepRuns
) -> None:
    digest = "0123456789abcdef" * 4
    for session in (runs, later):  # logged again when the study is resumed: still one input
        session.log_dataset(
            "newswire", digest, num_rows=1_800, profile={"labels": 4}, source="newswire, seed 7", context="training"
        )
        child = session.start_trial("t0000", SPEC, FACTS, None)
    for run_id in (parent, child):
        (dataset_input,) = client.get_run(run_id).inputs.dataset_inputs
        assert dataset_input.dataset.name == "newswire"
        assert digest.startswith(dataset_input.dataset.digest)
        assert len(dataset_input.dataset.digest) >= 32
        assert json.loads(dataset_input.dataset.profile) == {"num_rows": 1_800, "labels": 4}
        assert "newswire, seed 7" in dataset_input.dataset.source
        assert [(tag.key, tag.value) for tag in dataset_input.tags] == [("mlflow.data.context", "training")]


# Pages ------------------------------------------------------------------------------------------------------


def test_a_description_replaces_the_one_before_and_ends_with_a_whole_line(
    client: MlflowClient, runs: SweepRuns, parent: str
) -> None:
    def shown() -> str:
        return str(client.get_run(parent).data.tags["mlflow.note.content"]).replace(MARK, "").strip()

    runs.page().describe("first")
    runs.page().describe("second\n\n| a |\n| --- |\n| ü |")
    assert shown() == "second\n\n| a |\n| --- |\n| ü |"
    line = "x" * 99
    runs.page().describe("\n".join([line] * 200))  # too long for a tag
    assert set(shown().split("\n")) == {line} and len(shown().split("\n")) == MAX_DESCRIPTION // 100 - 1


@pytest.mark.parametrize("note", ["{}\n\nbelow", "above\n\n{}", "above {} below", "all of it is mine"])
def test_notes_of_people_stay_around_a_description(
    client: MlflowClient, runs: SweepRuns, parent: str, note: str
) -> None:
    runs.page().describe("first")
    tag = "mlflow.note.content"
    client.set_tag(parent, tag, note.format(client.get_run(parent).data.tags[tag]))
    for text in ("second", "third", "x\n" * 5_000):
        runs.page().describe(text)
        kept = client.get_run(parent).data.tags[tag]
        assert all(part.strip() in kept for part in note.split("{}"))
        assert "first" not in kept and kept.count(text[:5]) >= 1
    assert "third" not in kept and len(kept) <= MAX_DESCRIPTION


def test_trials_of_a_study_are_found_under_the_parent_run_that_is_made_again(
    client: MlflowClient, request: pytest.FixtureRequest
) -> None:
    first, again = (SweepRuns(client, request.node.name) for _ in range(2))
    deleted = first.open_parent("embedded-1", identity="one", params={}, tags={}, texts={})
    child = first.start_trial("t0000", SPEC, FACTS, None)
    first.log_points("t0000", train_points(1, 2))
    client.delete_run(deleted)
    parent = again.open_parent("embedded-1", identity="one", params={}, tags={}, texts={})
    assert parent != deleted
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert list(again.curve("t0000")["step"]) == [1, 2]
    assert again.start_trial("t0000", SPEC, FACTS, None) == child


def test_a_store_that_has_none_of_the_runs_of_a_study_is_refused(runs: SweepRuns, parent: str) -> None:
    runs.require_known([])
    runs.require_known(["0" * 32, parent])
    with pytest.raises(StorageError, match=r"none of the 2 runs .*--tracking URL.*--new"):
        runs.require_known(["0" * 32, "1" * 32])


def test_a_table_again_replaces_its_rows_and_all_are_listed(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    page = runs.page()
    page.log_table("leaderboard", pd.DataFrame({"trial": ["t0000"], "accuracy": [0.8]}))
    page.log_table("mistakes", pd.DataFrame({"text": ["a, b"]}))
    page.log_table("leaderboard", pd.DataFrame({"trial": ["t0001", "t0000"], "accuracy": [float("nan"), 0.8]}))
    assert page.read_text("leaderboard.csv") == "trial,accuracy\nt0001,\nt0000,0.8\n"
    table = json.loads(text(client, parent, "leaderboard.json"))
    assert table == {"columns": ["trial", "accuracy"], "data": [["t0001", None], ["t0000", 0.8]]}
    listed = json.loads(client.get_run(parent).data.tags["mlflow.loggedArtifacts"])  # tables of MLflow's UI
    assert listed == [{"path": f"{name}.json", "type": "table"} for name in ("leaderboard", "mistakes")]


def test_files_keep_their_folders_and_an_absent_one_is_none(
    client: MlflowClient, runs: SweepRuns, parent: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    page = runs.page()
    page.log_files({"a.txt": tmp_path / "a.txt", "inner/a.txt": tmp_path / "a.txt"})
    assert artifacts(client, parent) == {"sweep.yaml", "a.txt", "inner"}
    assert page.read_text("inner/a.txt") == "text"
    assert page.read_text("b.txt") is page.read_text("other/a.txt") is None


def test_addresses_are_relative_to_the_ui(runs: SweepRuns, parent: str) -> None:
    page = runs.page()
    assert page.url == f"#/experiments/{page.experiment_id}/runs/{parent}?workflowType=machine_learning"
    path, _, query = page.url.partition("?")
    assert page.artifact_url("promotion/v1/a b.md") == f"{path}/artifacts/promotion/v1/a%20b.md?{query}"
    assert page.image_url("thumbnails/a.png") == f"get-artifact?path=thumbnails%2Fa.png&run_uuid={parent}"


def test_every_study_of_a_sweep_has_a_view_of_its_own(client: MlflowClient, runs: SweepRuns) -> None:
    found = {}
    for study in ("embedded-1", "embedded-2", "embedded-1"):
        parent = runs.open_parent(study, identity=study, params={"objective": "macro_f1"}, tags={}, texts={})
        [key] = re.findall(r"workflowType=machine_learning&viewStateShareKey=([\w-]+)", runs.links["trials"])
        assert runs.links["charts"] == f"{runs.links['trials']}&compareRunsMode=CHART"
        found[parent] = key
    assert list(found.values()) == ["sweep", "sweep-2"]
    tags = client.get_experiment(runs.page().experiment_id).tags
    for parent, key in found.items():
        state = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        assert parent in state["searchFilter"] and state["orderByKey"] == "metrics.`eval/macro_f1`"


def test_a_child_knows_its_parent_and_is_found_by_its_mark(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    child, _ = (runs.start_trial(trial, SPEC, FACTS, None) for trial in ("t0000", "t0001"))
    above = page_of(client, child).parent()
    assert above is not None and above.run_id == parent and above.parent() is None
    runs.page(child).set_tags({"winner": "true"})
    assert runs.marked("winner") == [child]
    client.delete_run(child)
    assert find_run(client, child) is None and runs.marked("winner") == []


# Trials -----------------------------------------------------------------------------------------------------


def test_trial_is_a_child_run_with_its_points(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.log_points("t0000", [*train_points(5, 10), eval_point(10)])
    run = client.get_run(run_id)
    assert run.info.run_name == "t0000-qv-r8"
    assert run.data.params == PARAMS
    assert run.data.tags.items() >= {"mlflow.parentRunId": parent, "trial": "t0000", "study_trial": "0"}.items()
    assert history(client, run_id, "train/loss") == [(5, 0.2, 1_005), (10, 0.1, 1_010)]
    assert history(client, run_id, "train/learning_rate") == [(5, 5e-4, 1_005), (10, 1e-3, 1_010)]
    assert history(client, run_id, "eval/accuracy") == [(10, 0.8, 1_010)]
    assert history(client, run_id, "eval/macro_f1") == [(10, 0.79, 1_010)]
    assert history(client, run_id, "eval/loss") == [(10, 0.5, 1_010)]
    assert client.get_run(run_id).info.status == "RUNNING"


def test_more_points_than_mlflow_takes_at_once(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.log_points("t0000", train_points(*range(1, 902)))
    assert [step for step, _, _ in history(client, run_id, "train/loss")] == list(range(1, 902))


def test_points_delivered_twice_are_kept_once(client: MlflowClient, runs: SweepRuns, later: SweepRuns) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.log_points("t0000", [*train_points(5, 10), eval_point(10)])
    runs.log_points("t0000", [*train_points(5, 10), eval_point(10)])
    runs.finish_trial("t0000", TrialEnd("INTERRUPTED", reason="stopped"))
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(run_id).data.tags["state"] == "INTERRUPTED"

    assert later.start_trial("t0000", replace(SPEC, rank=9), FACTS, run_id) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    later.log_points("t0000", [*train_points(5, 10, 15, timestamp=9_000), eval_point(10, timestamp=9_000)])
    later.log_points("t0000", [eval_point(20, accuracy=0.9, final=True, timestamp=9_000)])
    later.finish_trial("t0000", TrialEnd("COMPLETE", ended(train_seconds=7.0)))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == PARAMS
    assert [(step, stamp) for step, _, stamp in history(client, run_id, "train/loss")] == [
        (5, 1_005),
        (10, 1_010),
        (15, 9_015),
    ]
    assert history(client, run_id, "eval/accuracy") == [(10, 0.8, 1_010), (20, 0.9, 9_020)]
    assert run.data.metrics["train_seconds"] == 7.0


def test_run_made_just_before_a_kill_is_found_again(runs: SweepRuns, later: SweepRuns) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    assert later.start_trial("t0000", SPEC, FACTS, None) == run_id
    assert later.start_trial("t0001", SPEC, FACTS, None) != run_id
    later.open_parent("embedded-2", params={}, tags={}, texts={})
    assert later.start_trial("t0000", SPEC, FACTS, None) != run_id


def test_trial_whose_run_was_deleted_gets_a_new_one(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    client.delete_run(run_id)
    assert runs.start_trial("t0000", SPEC, FACTS, run_id) != run_id


def test_pruned_trial_is_killed_with_its_state(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.log_points("t0000", train_points(3))
    runs.finish_trial("t0000", TrialEnd("PRUNED", ended(), "below the median"))
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags.items() >= {"state": "PRUNED", "reason": "below the median"}.items()
    assert history(client, run_id, "train/loss") != []


def test_failed_trial_keeps_the_error(client: MlflowClient, runs: SweepRuns, parent: str) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    error = "Traceback (most recent call last):\n" + "x" * 2_000
    runs.finish_trial("t0000", TrialEnd("FAILED", None, "it broke", error))
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == error[:500]
    assert text(client, run_id, "error.txt") == error


def test_finished_trial_keeps_adapter_curves_and_costs(client: MlflowClient, tmp_path: Path) -> None:
    def draw(points: pd.DataFrame, title: str, folder: Path) -> dict[str, Path]:
        assert title == "t0000-qv-r8"
        (folder / "drawn.png").write_bytes(b"png")
        return {"accuracy_curve.png": folder / "drawn.png"}

    runs = SweepRuns(client, "finished", draw=draw)
    adapter = tmp_path / "work" / "adapter-of-t0000"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.finish_trial("t0000", TrialEnd("COMPLETE", ended(adapter=adapter)))
    assert artifacts(client, run_id) == {"adapter", "accuracy_curve.png"}
    assert artifacts(client, run_id, "adapter") == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    costs = {"rows_seen": 1_200, "train_seconds": 1.0, "eval_seconds": 0.5, "peak_memory_bytes": 1_000}
    assert client.get_run(run_id).data.metrics == costs
    assert client.get_run(run_id).info.status == "FINISHED"


def test_curve_and_times_are_the_same_from_memory_and_from_the_store(
    client: MlflowClient, runs: SweepRuns, later: SweepRuns
) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    began = client.get_run(run_id).info.start_time
    points = [*train_points(10, 5), eval_point(10), eval_point(20, accuracy=0.9, final=True)]
    runs.log_points("t0000", [replace(point, timestamp=began + 1_000 * point.step) for point in points])
    runs.finish_trial("t0000", TrialEnd("COMPLETE", ended()))
    curve = runs.curve("t0000")
    assert list(curve.columns) == ["trial", "step", *METRICS]
    assert curve["trial"].tolist() == ["t0000"] * 3
    assert curve["step"].tolist() == [5, 10, 20]
    assert curve["train/loss"].tolist()[:2] == [0.2, 0.1]
    assert curve["eval/accuracy"].isna().tolist() == [True, False, False]
    assert curve["eval/accuracy"].tolist()[1:] == [0.8, 0.9]
    for same in (later.curve("t0000"), read_curve(client, run_id, "t0000")):
        pd.testing.assert_frame_equal(same, curve)
    assert runs.times("t0000") == later.times("t0000") == [began / 1000 + step for step in (0, 5, 10, 20)]
    for empty in (later.curve("t0009"), read_curve(client, "0" * 32, "t0000")):
        assert empty.empty and list(empty) == list(curve)
    assert later.times("t0009") == []


def test_single_training_is_a_run_of_its_own_every_time(client: MlflowClient, runs: SweepRuns) -> None:
    runs.log_dataset("ag_news", "ab" * 32, num_rows=10, profile={}, source="a folder", context="training")
    first = runs.start_trial("t0000", SPEC, FACTS, None)
    runs.log_points("t0000", [eval_point(10)])
    runs.finish_trial("t0000", TrialEnd("COMPLETE", ended()))
    second = runs.start_trial("t0000", SPEC, FACTS, None)
    assert first != second
    assert "mlflow.parentRunId" not in client.get_run(first).data.tags
    assert len(client.get_run(second).inputs.dataset_inputs) == 1
    assert len(runs.curve("t0000")) == 0


# Provenance -------------------------------------------------------------------------------------------------


def test_provenance_names_code_and_machine_but_no_host_and_no_path() -> None:
    tags = provenance()
    assert tags.keys() >= {"version.torch", "version.peft", "version.python", "version.agnews_lora", "device"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", tags["version.mlflow"])
    text = "\n".join(tags.values())
    assert str(Path(__file__).parents[2]) not in text
    assert str(Path.home()) not in text


def test_git_tags_follow_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agnews_lora.tracking.provenance import _git_tags

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert _git_tags(package) == {}  # no checkout
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert _git_tags(package) == {}  # a checkout that does not track the package
    git("add", ".")
    git("commit", "-m", "first")
    assert _git_tags(package) == {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.dirty": "false"}
    (package / "module.py").write_text("")
    assert _git_tags(package)["git.dirty"] == "true"
    monkeypatch.setenv("PATH", "")
    assert _git_tags(package) == {}  # no git


def test_a_study_of_the_same_name_from_another_storage_has_its_own_runs(client: MlflowClient) -> None:
    runs = SweepRuns(client, "relocated")
    first = runs.open_parent("relocated", identity="one", params={"budget": 1}, tags={}, texts={})
    assert runs.open_parent("relocated", identity="two", params={"budget": 2}, tags={}, texts={}) != first
    assert runs.open_parent("relocated", identity="one", params={}, tags={}, texts={}) == first


def test_the_newest_parent_run_of_a_sweep_is_found(client: MlflowClient) -> None:
    assert newest_parent(client, "newest") is None
    experiment = client.create_experiment("newest")
    for start, name in enumerate(["old", "new"], start=1):
        client.create_run(experiment, start_time=start, tags={"kind": "sweep"}, run_name=name)
    client.create_run(experiment, start_time=3, tags={"kind": "trial"})
    newest = newest_parent(client, "newest")
    assert newest is not None and newest.info.run_name == "new"


def test_the_newest_parent_run_is_told_by_number_where_the_clock_went_back(client: MlflowClient) -> None:
    runs = [SweepRuns(client, "back") for _ in range(2)]
    experiment = client.get_experiment_by_name("back")
    assert experiment is not None
    client.create_run(experiment.experiment_id, start_time=2**42, tags={"kind": "sweep"}, run_name="an older release's")
    for each, name in zip(runs, ("first", "second"), strict=True):
        each.open_parent(name, identity=name, params={}, tags={}, texts={})
    newest = newest_parent(client, "back")
    assert newest is not None and newest.info.run_name == "second"
