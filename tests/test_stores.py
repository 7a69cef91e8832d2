"""Stores that others also write, copy, move, delete and protect: what the commands of a finished project make of it."""

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from agnews_lora.cli import main
from agnews_lora.commands.project import examine
from agnews_lora.errors import StorageError
from agnews_lora.tracking.store import open_client
from tests.project import Running, command, environment

# Characters that URLs and URIs give a meaning, and some that nothing does.
NAME = "a%20b %41?c#d&e [f] \N{LATIN SMALL LETTER U WITH DIAERESIS}'$HOME"

COMMANDS = {
    "report": ["report", "small"],
    "promote": ["promote", "small"],
    "predict": ["predict", "--sweep", "small", "Oil prices rose."],
    "export": ["export", "small", "--to", "exported"],
    "sweep": ["sweep", "small", "--quiet"],
    "doctor": ["doctor"],
}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of all that lies below a folder."""
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def succeeds(*arguments: str) -> bool:
    return main(arguments) == 0


# Servers that answer otherwise than MLflow's ------------------------------------------------------------------------


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The URL of a server that gives a web page with this status."""

    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", "12")
            self.end_headers()
            self.wfile.write(b"<html>\n\n\n\n\n\n")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (200, "HOST:PORT/PATH"),  # a page of another server
        (401, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "has no permission"),
        (404, "HOST:PORT/PATH"),  # below the path of MLflow's own, or an older MLflow
        (501, "HOST:PORT/PATH"),
        (503, "Start it"),
    ],
)
def test_what_a_server_answers_is_told_with_its_remedy(status: int, remedy: str) -> None:
    with answering(status) as url, pytest.raises(StorageError, match=r"^Cannot use the run store") as caught:
        open_client(url)
    assert remedy in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_proxy_between_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(StorageError, match=r"proxy 127\.0\.0\.1:9: add tracking\.example to NO_PROXY") as caught:
        open_client("http://tracking.example:5000")
    assert "secret" not in str(caught.value)


# Moved ---------------------------------------------------------------------------------------------------------------


def test_copied_project_works_and_writes_in_its_own_place_alone(
    finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, project = files(finished_once), tmp_path / NAME
    shutil.copytree(finished_once, project)
    monkeypatch.chdir(project)
    for name, arguments in COMMANDS.items():
        assert succeeds(*arguments), name
        assert files(finished_once) == before, f"{name} changed the original"
    assert list(tmp_path.iterdir()) == [project]


def test_renamed_project_works_and_makes_nothing_at_its_old_place(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, place = open_client(finished_project / "mlruns"), f"{finished_project}/bases/own"
    client.set_model_version_tag("small", "1", "note", place)
    client.copy_model_version("models:/small/1", "other")
    client.set_model_version_tag("other", "1", "base", place)
    moved = finished_project.rename(finished_project.with_name("moved"))
    (moved.parent / "linked").symlink_to(moved)
    for read in (True, False):
        found = open_client(moved / "mlruns", read)
        assert found.get_model_version("other", "1").tags["base"] == f"{moved}/bases/own"
        assert found.get_model_version("small", "1").tags["note"] == place
    monkeypatch.chdir(moved.parent / "linked")
    for name, arguments in COMMANDS.items():
        assert succeeds(*arguments), name
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    with Running(moved, "serve", "small", "--port", port) as server:
        server.wait_for("curl")
        asked = requests.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": ["Oil prices rose."]}, timeout=60)
        assert asked.status_code == 200, asked.text
    assert not finished_project.exists()


@pytest.mark.proof
def test_read_only_project_is_read_and_nothing_else(finished_project: Path, tmp_path: Path) -> None:
    """In another place than it was made at."""
    moved = finished_project.rename(finished_project.with_name("moved"))
    plain_user = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    if plain_user and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere (util-linux is not installed)")
    subprocess.run(["chmod", "-R", "a-w", moved], check=True)
    elsewhere = tmp_path / "elsewhere"

    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*plain_user, *command(*arguments)],
            cwd=moved,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    before = files(moved)
    for arguments in (
        COMMANDS["predict"],
        ["report", "small", "--to", str(elsewhere / "reports")],
        ["export", "small", "--to", str(elsewhere / "exported")],
    ):
        assert (done := asked(*arguments)).returncode == 0, done.stderr
    assert (elsewhere / "reports" / "small.html").is_file()
    stores = json.loads(asked("doctor", "--json").stdout)
    assert all("cannot be written" in value for name, value in stores.items() if name.startswith("store"))
    for name in ("sweep", "promote", "report"):
        refused = asked(*COMMANDS[name])
        assert refused.returncode == 2
        assert refused.stderr.startswith("agnews-lora: Cannot "), name
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert files(moved) == before
    subprocess.run(["chmod", "-R", "u+w", moved], check=True)  # pytest removes it


# Deleted in MLflow ---------------------------------------------------------------------------------------------------


class Deletion:
    """What people delete in MLflow, or beside it, after a sweep has finished."""

    def __init__(self, project: Path) -> None:
        self.stores = project / "mlruns"
        self.client = open_client(self.stores)
        experiment = self.client.get_experiment_by_name("small")
        assert experiment is not None
        self.experiment = experiment.experiment_id
        self.version = self.client.get_model_version_by_alias("small", "champion")

    def winner(self) -> None:
        self.client.delete_run(self.version.run_id)

    def winner_for_good(self) -> None:
        """As `mlflow gc` does."""
        self.winner()
        self.client._tracking_client.store._hard_delete_run(self.version.run_id)

    def parent(self) -> None:
        (run,) = self.client.search_runs([self.experiment], "tags.kind = 'sweep'")
        self.client.delete_run(run.info.run_id)

    def all_runs(self) -> None:
        for run in self.client.search_runs([self.experiment]):
            self.client.delete_run(run.info.run_id)

    def mlflow_experiment(self) -> None:
        self.client.delete_experiment(self.experiment)

    def model(self) -> None:
        self.client.delete_registered_model("small")

    def artifacts(self) -> None:
        shutil.rmtree(self.stores / "artifacts")

    def database(self) -> None:
        for store in (SqlAlchemyStore, RegistryStore):
            store._engine_map.pop(self.client.tracking_uri).dispose()  # another process does not know the file
        (self.stores / "mlflow.db").unlink()


USED, REPORTED, RESUMED = "predict export", "report", "sweep"


@pytest.mark.parametrize(
    ("deletion", "works"),
    [
        (Deletion.winner, f"{USED} {REPORTED}"),
        (Deletion.winner_for_good, f"{USED} {REPORTED}"),
        (Deletion.parent, f"{USED} {RESUMED}"),
        (Deletion.all_runs, USED),
        (Deletion.mlflow_experiment, USED),
        (Deletion.model, f"{REPORTED} {RESUMED}"),
        (Deletion.artifacts, ""),
        (Deletion.database, ""),
    ],
)
def test_deletion_is_one_sentence_with_a_remedy_and_a_verified_version_stays_of_use(
    finished_project: Path,
    deletion: Callable[[Deletion], None],
    works: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished_project)
    assert not any(found.remedy for found in examine())
    deletion(Deletion(finished_project))
    assert any(found.remedy for found in examine())
    for name in ("predict", "export", "report", "sweep"):
        code, error = (
            main([*COMMANDS[name], *(["--patience", "5"] if name == "sweep" else [])]),
            capsys.readouterr().err,
        )
        assert code == (0 if name in works.split() else 2), (name, error)
        if code:
            assert error.startswith("agnews-lora: Cannot "), (name, error)
            assert len(error.splitlines()) == 1 and error.count("Cannot ") == 1, (name, error)
            assert any(remedy in error for remedy in ("agnews-lora sweep", "restore")), (name, error)


def lose(*paths: str) -> Callable[[Path], None]:
    def act(project: Path) -> None:
        for path in paths:
            shutil.rmtree(project / path) if (project / path).is_dir() else (project / path).unlink()

    return act


def damage(path: str) -> Callable[[Path], None]:
    return lambda project: next(iter(project.glob(path))).write_bytes(b"nothing")  # type: ignore[return-value]


HALVES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is lost, what has a fault, how to get it back
    "runs": (lose("mlruns/mlflow.db"), "store mlruns/mlflow.db", "cp -a COPY/mlruns/mlflow.db mlruns/"),
    "studies": (lose("mlruns/optuna.db"), "store mlruns/optuna.db", "cp -a {origin}/mlruns/optuna.db mlruns/"),
    "artifacts": (lose("mlruns/artifacts"), "store mlruns/artifacts", "cp -a {origin}/mlruns/artifacts mlruns/"),
    "models": (lose("mlruns/artifacts/models"), "champion of small", "cp -a {origin}/mlruns/artifacts mlruns/"),
    "results": (lose("mlruns/results"), "result mlruns/results/small.json", "`agnews-lora sweep small`"),
    "YAML files": (lose("sweeps", "experiments"), "file sweeps/small.yaml", "mkdir -p sweeps && cp "),
    "both databases": (lose("mlruns/mlflow.db", "mlruns/optuna.db"), "project", "mlruns/optuna.db back"),
    "a database's content": (damage("mlruns/mlflow.db"), "stores", "back from a copy"),
    "a champion's file": (damage("mlruns/artifacts/models/**/adapter_model.safetensors"), "champion of small", "cp -a"),
}


@pytest.mark.parametrize("half", HALVES)
def test_doctor_says_what_a_copy_lacks_and_how_to_get_it_back(
    half: str, finished_once: Path, finished_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_project)
    act, what, remedy = HALVES[half]
    act(finished_project)
    before = files(finished_project)
    faults = {found.what: found.remedy for found in examine() if found.remedy}
    assert remedy.format(origin=finished_once) in faults[what]
    assert files(finished_project) == before


def test_doctor_ends_with_a_verdict_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Everything is in order."
    Path("mlruns").mkdir()
    Path("mlruns/mlflow.db").write_bytes(b"nothing")
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 faults: store mlruns/mlflow.db, stores."


def test_people_keep_their_notes_and_names(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_project)
    client, note = open_client(finished_project / "mlruns"), "\n\nAsk the news desk."
    version = client.get_model_version_by_alias("small", "champion")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'")

    def written() -> list[str]:
        runs = [
            client.get_run(run_id).data.tags["mlflow.note.content"] for run_id in (parent.info.run_id, version.run_id)
        ]
        model, own = client.get_registered_model("small"), client.get_model_version("small", version.version)
        return [*runs, str(model.description), str(own.description)]

    before = written()
    for run_id, text in zip((parent.info.run_id, version.run_id), before, strict=False):
        client.set_tag(run_id, "mlflow.note.content", text + note)
    client.update_registered_model("small", before[2] + note)
    client.update_model_version("small", version.version, before[3] + note)
    client.update_run(parent.info.run_id, name="monday/best try: lr?")
    for name in ("sweep", "report"):
        assert succeeds(*COMMANDS[name])
    assert written() == [text + note for text in before]
    assert client.get_run(parent.info.run_id).info.run_name == "monday/best try: lr?"
