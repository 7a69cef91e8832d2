import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from agnews_lora.errors import RegistryError, StorageError
from agnews_lora.tracking.descriptions import MARK
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import experiment_id, open_client
from agnews_lora.tracking.versions import CANDIDATE, CHAMPION, PREVIOUS


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return open_client(tmp_path_factory.mktemp("mlruns"))


@pytest.fixture
def registry(client: MlflowClient, request: pytest.FixtureRequest) -> Registry:
    return Registry(client, request.node.name)


@pytest.fixture
def new_run(client: MlflowClient, registry: Registry) -> Callable[[], str]:
    experiment = experiment_id(client, registry.model)
    return lambda: str(client.create_run(experiment).info.run_id)


TAGS = {"trial": "t0001"}


def write(folder: Path, identity: Model) -> dict[str, str]:
    folder.mkdir()
    identity.add_flavor("text", data="data.txt")
    identity.save(str(folder / "MLmodel"))
    (folder / "data.txt").write_text("something")
    return TAGS


def test_there_is_nothing_before_the_first_version(registry: Registry) -> None:
    assert registry.aliased(CHAMPION) is None
    assert registry.of_run("0" * 32) is None
    with pytest.raises(RegistryError, match=r"Cannot use version 1 of .*: it is not registered. Register one with"):
        registry.version(1)


def test_versions_are_counted_and_keep_run_tags_and_files(registry: Registry, new_run: Callable[[], str]) -> None:
    run_id, uri = new_run(), mlflow.get_tracking_uri()
    first = registry.register(run_id, write)
    second = registry.register(new_run(), write)
    assert (first.number, second.number) == (1, 2)
    assert registry.of_run(run_id) == first == registry.version(1)
    assert first.run_id == run_id and first.tags == TAGS and first.aliases == ()
    folder = registry.folder(first)
    assert (folder / "data.txt").read_text() == "something" and folder != registry.folder(second)
    assert mlflow.get_tracking_uri() == uri, "MLflow's global URI is neither read nor changed"
    with pytest.raises(RegistryError, match=r"Cannot use version 7 of .*: it is not registered. Name one of 1, 2."):
        registry.version(7)


def test_the_logged_model_belongs_to_its_run_and_version(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    run_id = new_run()
    version = registry.register(run_id, write)
    outputs = client.get_run(run_id).outputs
    (model,) = [client.get_logged_model(each.model_id) for each in outputs.model_outputs]
    assert model.status == "READY" and model.source_run_id == run_id
    assert f'"version": {version.number}' in model.tags["mlflow.modelVersions"]


def test_a_model_that_cannot_be_written_becomes_no_version(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    def fail(folder: Path, identity: Model) -> dict[str, str]:
        raise OSError("disk full")

    run_id = new_run()
    with pytest.raises(OSError, match=r"disk full"):
        registry.register(run_id, fail)
    assert registry.of_run(run_id) is None
    (model,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert model.status == "FAILED"


def test_an_alias_points_to_one_version(registry: Registry, new_run: Callable[[], str]) -> None:
    first, second = (registry.register(new_run(), write) for _ in range(2))
    registry.set_alias(CANDIDATE, first)
    registry.set_alias(CANDIDATE, second)
    registry.set_alias(PREVIOUS, second)
    assert registry.version(1).aliases == ()
    assert set(registry.version(2).aliases) == {CANDIDATE, PREVIOUS}
    registry.remove_alias(CANDIDATE)
    assert registry.aliased(CANDIDATE) is None
    assert registry.aliased(PREVIOUS) == registry.version(2)


def test_a_full_disk_is_no_missing_file(
    registry: Registry, new_run: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, full = registry.register(new_run(), write), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def download(**_: object) -> None:
        raise mlflow.MlflowException(f"The following failures occurred: {full!r}")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    with pytest.raises(StorageError, match=f"Cannot download version 1 of .* to {tempfile.gettempdir()}: No space"):
        registry.folder(version)


def test_files_that_are_gone_are_said_to_be(registry: Registry, new_run: Callable[[], str]) -> None:
    version = registry.register(new_run(), write)
    folder = registry.folder(version)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(RegistryError, match=r"Cannot load version 1 of .*: its files at .* are gone"):
        registry.folder(version)


@pytest.mark.parametrize(
    "name",
    ["../escaped.txt", "a/../../escaped.txt", "/escaped.txt", "%2e%2e/escaped.txt"],
    ids=["parent", "deep", "absolute", "encoded"],
)
def test_a_server_cannot_name_a_file_outside_the_folder(
    registry: Registry, new_run: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Hostile(BaseHTTPRequestHandler):
        """A store of artifacts that lists one file under that name."""

        def do_GET(self) -> None:
            listing = json.dumps({"files": [{"path": name, "is_dir": False, "file_size": 4}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(listing.encode() if "?path=" in self.path else b"evil")

        def log_message(self, *of: object) -> None:
            """Nothing on the screen."""

    version = registry.register(new_run(), write)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/model"
        monkeypatch.setattr(registry._client, "get_model_version_download_uri", lambda *of: uri)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "download"))
        (tmp_path / "download").mkdir()
        with pytest.raises(RegistryError, match=r"its files at http.* are gone"):
            registry.folder(version)
        server.shutdown()
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/escaped.txt").exists()


def test_a_report_is_kept_with_the_versions_run(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str], tmp_path: Path
) -> None:
    version = registry.register(new_run(), write)
    assert registry.report(version, "report.md") is None
    (tmp_path / "report.md").write_text("passed")
    registry.log_report(version, tmp_path)
    assert [file.path for file in client.list_artifacts(version.run_id, "promotion/v1")] == ["promotion/v1/report.md"]
    assert registry.report(version, "report.md") == "passed"


def test_tags_and_descriptions_are_replaced_and_notes_kept(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    version = registry.register(new_run(), write)
    registry.introduce("of a sweep")
    present = client.get_registered_model(registry.model).description
    client.update_registered_model(registry.model, f"{present} Ask the news desk.")
    registry.introduce("of **a** sweep")
    for result in ("failed", "passed"):
        registry.describe(version, result)
        registry.set_tags(version, {"promotion": result})
    assert registry.version(1).tags == {"promotion": "passed", "trial": "t0001"}
    shown = client.get_registered_model(registry.model).description, client.get_model_version(registry.model, "1")
    assert shown[0].replace(MARK, "").split("\n\n") == ["of **a** sweep", " Ask the news desk."]
    assert shown[1].description.replace(MARK, "").strip() == "passed"


def test_a_logged_model_shows_what_its_run_measured_and_the_run_stays_as_it_was(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    run_id, parent = new_run(), new_run()
    client.log_param(run_id, "lora_r", "8")
    for step, value in ((10, 0.7), (20, 0.8)):
        client.log_metric(run_id, "eval/accuracy", value, timestamp=1_000 + step, step=step)
    version = registry.register(run_id, write)
    for _ in range(2):  # told twice, it is known once
        registry.link(version, parent, ["lora_r", "absent"], ["eval/accuracy", "absent"], ("newswire", "ab" * 32))
    (output,) = client.get_run(run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.params == {"lora_r": "8"}
    measured = [(each.key, each.value, each.step, each.dataset_name, each.dataset_digest) for each in model.metrics]
    assert measured == [("eval/accuracy", 0.8, 20, "newswire", "ab" * 18)]
    assert [point.step for point in client.get_metric_history(run_id, "eval/accuracy")] == [10, 20]
    assert [each.model_id for each in client.get_run(parent).outputs.model_outputs] == [output.model_id]


def test_a_version_whose_logged_model_was_deleted_is_left_alone(
    registry: Registry, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    version, parent = registry.register(new_run(), write), new_run()
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    client.delete_logged_model(output.model_id)
    registry.link(version, parent, [], [], ("newswire", "ab" * 32))
    assert not client.get_run(parent).outputs.model_outputs


def test_the_candidate_waits_or_else_the_champion(registry: Registry, new_run: Callable[[], str]) -> None:
    assert registry.waiting() is None
    with pytest.raises(RegistryError, match=r"Cannot use .*: it has no champion"):
        registry.champion()
    first, second = (registry.register(new_run(), write) for _ in range(2))
    registry.set_alias(CHAMPION, first)
    assert registry.waiting() == registry.champion() == registry.version(1)
    registry.set_alias(CANDIDATE, second)
    assert registry.waiting() == registry.version(2)
