"""The commands of the compose files without containers: the same but for hosts, ports and paths, on real servers."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.docker.compose import DOCKER, interpolate, load, merged
from tests.servers import Postgres, Process, answers, free_port, postgres_missing, postgres_program

pytestmark = pytest.mark.skipif(postgres_missing() is not None, reason=str(postgres_missing()))

SERVICES: dict[str, dict[str, Any]] = load("compose.yaml")["services"]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


def test_postgres_is_healthy(postgres: Postgres) -> None:
    assert healthy(SERVICES["postgres"], {"5432": str(postgres.port), "pg_isready": postgres_program("pg_isready")})
    assert not healthy(SERVICES["postgres"], {"5432": str(free_port()), "pg_isready": postgres_program("pg_isready")})


def test_mlflow_keeps_runs_in_postgres_and_passes_artifacts_on(postgres: Postgres, tmp_path: Path) -> None:
    with mlflow(SERVICES["mlflow"], postgres, tmp_path) as (url, port):
        assert healthy(SERVICES["mlflow"], {"5000": port})
        assert status(url, host=f"mlflow:{port}") == 200
        assert status(url, host=f"localhost:{port}") == 200
        assert status(url, host="elsewhere.example") == 403
        run = write_a_run(url, tmp_path)
    with psycopg.connect(postgres.database("mlflow"), password=postgres.password) as connection:
        assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [(run,)]
    assert [file.read_text(encoding="utf-8") for file in (tmp_path / "artifacts").rglob("note.txt")] == ["kept"]


def test_mlflow_of_a_cluster_asks_for_a_password(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    secrets = {"POSTGRES_PASSWORD": postgres.password, "MLFLOW_PASSWORD": "twelve letters", "MLFLOW_SECRET_KEY": "key"}
    network = {"CLUSTER_ADDRESS": "127.0.0.1", "CLUSTER_HOSTS": "head.example:5000"}
    services = interpolate(merged(), secrets | network)["services"]
    accounts = (
        (DOCKER / "basic_auth.ini").read_text(encoding="utf-8").replace("@postgres/", f"@127.0.0.1:{postgres.port}/")
    )
    (tmp_path / "basic_auth.ini").write_text(accounts, encoding="utf-8")

    with mlflow(services["mlflow"], postgres, tmp_path) as (url, port):
        assert healthy(services["mlflow"], {"5000": port})  # without a password
        assert status(url, host=f"head.example:{port}") == 401
        assert status(url, host="elsewhere.example") == 403
        for name, value in services["worker"]["environment"].items():
            monkeypatch.setenv(name, value)
        write_a_run(url, tmp_path)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another one")
        with pytest.raises(MlflowException, match="401"):
            write_a_run(url, tmp_path)


def test_the_dashboard_shows_the_study(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    packages = tmp_path / "packages"
    install_dashboard(packages)
    service, port = SERVICES["dashboard"], str(free_port())
    program, *arguments = adapt(service["command"], postgres, port)
    environment = {**postgres.environment, "PYTHONPATH": str(packages)}
    url = f"http://127.0.0.1:{port}"
    process = Process("dashboard", tmp_path / "dashboard.log")
    command = [sys.executable, str(packages / "bin" / program), *arguments]
    make_tables = [sys.executable, *adapt(SERVICES["tables"]["command"][1:], postgres, port)]
    for _ in range(2):  # at each `docker compose up`
        subprocess.run(make_tables, env=os.environ | environment, check=True)
    try:
        process.start(command, lambda: answers(f"{url}/dashboard"), tmp_path, environment)
        assert healthy(service, {"8080": port})
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        optuna.create_study(storage=postgres.url, study_name="shown")
        with urllib.request.urlopen(f"{url}/api/studies", timeout=10) as answer:
            assert [study["study_name"] for study in json.load(answer)["study_summaries"]] == ["shown"]
    finally:
        process.end(signal.SIGTERM)


@contextmanager
def mlflow(service: Mapping[str, Any], postgres: Postgres, folder: Path) -> Iterator[tuple[str, str]]:
    """The service's own command and environment; gives the server's URL and port."""
    port = str(free_port())
    command = adapt(service["command"], postgres, port)
    command = [part.replace("=/artifacts", f"={folder / 'artifacts'}") for part in command]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **service["environment"], **postgres.environment}
    if "MLFLOW_AUTH_CONFIG_PATH" in environment:
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / Path(environment["MLFLOW_AUTH_CONFIG_PATH"]).name)
    process = Process("mlflow", folder / "mlflow.log")
    url = f"http://127.0.0.1:{port}"
    try:
        process.start([sys.executable, "-m", *command], lambda: answers(f"{url}/health"), folder, environment)
        yield url, port
    finally:
        process.end(signal.SIGTERM)


def adapt(command: list[str], postgres: Postgres, port: str) -> list[str]:
    """A service's command with loopback in place of the network between containers."""
    loopback = {"@postgres/": f"@127.0.0.1:{postgres.port}/", "0.0.0.0": "127.0.0.1", "5000": port, "8080": port}
    return [replace(part, loopback) for part in command]


def replace(text: str, replacements: Mapping[str, str]) -> str:
    """All at once: what was put in is not looked at again."""
    return re.sub("|".join(map(re.escape, replacements)), lambda found: replacements[found[0]], text)


def healthy(service: Mapping[str, Any], replacements: Mapping[str, str]) -> bool:
    """The service's own health check, with the tests' port and programs."""
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    command = [replace(part, {**replacements, "python": sys.executable}) for part in command]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def status(url: str, host: str) -> int:
    """Of an answer of MLflow's API, asked by this name."""
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def write_a_run(url: str, folder: Path) -> str:
    """An experiment, a run and an artifact, read back; gives the run's id."""
    from mlflow import MlflowClient

    client = MlflowClient(url)
    (folder / "note.txt").write_text("kept", encoding="utf-8")
    run = client.create_run(client.create_experiment(folder.name)).info.run_id
    client.log_metric(run, "eval/accuracy", 0.9, step=3)
    client.log_artifact(run, str(folder / "note.txt"), "notes")
    assert client.get_run(run).data.metrics == {"eval/accuracy": 0.9}
    assert Path(client.download_artifacts(run, "notes/note.txt")).read_text(encoding="utf-8") == "kept"
    return run


def install_dashboard(folder: Path) -> None:
    """What docker/Dockerfile pins for the dashboard alone; the rest of what it needs is installed with the project."""
    pins = re.findall(r" ((?:optuna-dashboard|bottle)==\S+)", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    assert len(pins) == 2
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *pins]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index has {' and '.join(pins)}: {done.stderr[-300:]}")
