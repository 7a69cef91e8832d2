import json
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from agnews_lora.tracking.runs import MAX_DESCRIPTION, RunPage, SweepRuns, description, newest_sweeps, page_of
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint, TrialEnd, TrialResult
from tests.tracking.test_runs import FACTS, SPEC


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return open_client(tmp_path_factory.mktemp("mlruns"))


@pytest.fixture
def runs(client: MlflowClient, request: pytest.FixtureRequest) -> SweepRuns:
    runs = SweepRuns(client, request.node.name, "embedded")
    runs.open_parent("embedded", params={}, tags={}, texts={})
    return runs


def tags(client: MlflowClient, page: RunPage) -> dict[str, str]:
    return dict(client.get_run(page.run_id).data.tags)


def test_a_description_replaces_the_one_before(client: MlflowClient, runs: SweepRuns) -> None:
    page = runs.page()
    page.describe("first")
    page.describe("second\n\n| a |\n| --- |\n| ü |")
    assert tags(client, page)["mlflow.note.content"] == "second\n\n| a |\n| --- |\n| ü |"


def test_a_description_too_long_for_a_tag_ends_with_a_whole_line(client: MlflowClient, runs: SweepRuns) -> None:
    line = "x" * 99
    runs.page().describe("\n".join([line] * 200))
    kept = tags(client, runs.page())["mlflow.note.content"].split("\n")
    assert set(kept) == {line} and len(kept) == MAX_DESCRIPTION // 100
    assert description("short") == {"mlflow.note.content": "short"}


def test_two_tables_are_both_listed_and_a_table_again_replaces_its_rows(client: MlflowClient, runs: SweepRuns) -> None:
    page = runs.page()
    page.log_table("leaderboard", pd.DataFrame({"trial": ["t0000"]}))
    page.log_table("mistakes", pd.DataFrame({"text": ["a, b"]}))
    page.log_table("leaderboard", pd.DataFrame({"trial": ["t0001", "t0000"]}))
    listed = json.loads(tags(client, page)["mlflow.loggedArtifacts"])
    assert listed == [{"path": "leaderboard.json", "type": "table"}, {"path": "mistakes.json", "type": "table"}]
    assert page.read_text("leaderboard.csv") == "trial\nt0001\nt0000\n"
    assert json.loads(str(page.read_text("mistakes.json"))) == {"columns": ["text"], "data": [["a, b"]]}


def test_files_keep_their_folders_and_what_is_not_there_is_none(
    client: MlflowClient, runs: SweepRuns, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    page = runs.page()
    page.log_files({"a.png": tmp_path / "a.png", "thumbnails/a.png": tmp_path / "a.png"})
    assert {item.path for item in client.list_artifacts(page.run_id)} == {"a.png", "thumbnails"}
    assert [item.path for item in client.list_artifacts(page.run_id, "thumbnails")] == ["thumbnails/a.png"]
    assert page.read_text("predictions.csv") is None


def test_addresses_are_relative_to_the_ui(client: MlflowClient, runs: SweepRuns) -> None:
    page = runs.page()
    assert page.url == f"#/experiments/{page.experiment_id}/runs/{page.run_id}"
    assert page.artifact_url("promotion/v1/a b.md") == f"{page.url}/artifacts/promotion/v1/a%20b.md"
    assert page.image_url("thumbnails/a.png") == f"get-artifact?path=thumbnails%2Fa.png&run_uuid={page.run_id}"
    assert f"parentRunId%20%3D%20%27{page.run_id}%27" in page.children_url


def test_a_child_knows_its_parent_and_the_parent_its_children(client: MlflowClient, runs: SweepRuns) -> None:
    child = runs.start_trial("t0000", SPEC, {**FACTS, "baseline": True}, None)
    above = page_of(client, child).parent()
    assert above is not None and above.url == runs.page().url
    assert runs.page().parent() is None
    children = runs.children()
    assert set(children) == {child} and children[child]["baseline"] == "true"
    assert runs.is_there(child)
    client.delete_run(child)
    assert not runs.is_there(child) and runs.children() == {}


def test_more_children_than_a_page_of_the_store(
    client: MlflowClient, runs: SweepRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {runs.start_trial(f"t{number:04d}", SPEC, FACTS, None) for number in range(5)}
    search = client.search_runs
    monkeypatch.setattr(client, "search_runs", lambda *given, **named: search(*given, **{**named, "max_results": 2}))
    assert set(runs.children()) == expected


def test_times_are_the_runs_beginning_and_its_points_from_memory_and_from_the_store(
    client: MlflowClient, runs: SweepRuns, request: pytest.FixtureRequest
) -> None:
    run_id = runs.start_trial("t0000", SPEC, FACTS, None)
    began = client.get_run(run_id).info.start_time
    ended = TrialResult("t0000", 7, 7, None, None, 5_000, 112, 1.0, 0.5, 1_000)
    points = [EvalPoint("t0000", step, 0.5, 0.5, 1.0, 10, False, began + 1_000 * step) for step in (7, 3)]
    runs.log_points("t0000", points)
    runs.finish_trial("t0000", TrialEnd("COMPLETE", ended))
    expected = [began / 1000, began / 1000 + 3, began / 1000 + 7]
    assert runs.times("t0000") == pytest.approx(expected)
    later = SweepRuns(client, request.node.name, "embedded")
    later.open_parent("embedded", params={}, tags={}, texts={})
    assert later.times("t0000") == pytest.approx(expected)
    assert later.times("t0009") == []


def test_the_newest_parent_run_of_each_sweep(tmp_path: Path) -> None:
    client = open_client(tmp_path)
    assert newest_sweeps(client) == {}
    pages = {}
    for experiment, study in (("a", "a"), ("a", "a-2"), ("b", "b")):
        runs = SweepRuns(client, experiment, experiment)
        runs.open_parent(study, params={}, tags={}, texts={})
        runs.start_trial("t0000", SPEC, FACTS, None)
        pages[study] = runs.page().url
    assert {study: page.url for study, page in newest_sweeps(client).items()} == {"a-2": pages["a-2"], "b": pages["b"]}
