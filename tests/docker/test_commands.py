"""The commands of the compose files without containers: the same but for hosts, ports and paths, on real servers."""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agnews_lora.search import study as keys
from tests.docker.compose import DOCKER, load, merged
from tests.servers import Postgres, Process, answers, free_port, postgres_missing, postgres_program

SERVICES: dict[str, dict[str, Any]] = load("compose.yaml")["services"]
ON_POSTGRES: dict[str, dict[str, Any]] = merged("postgres.yaml")["services"]


@pytest.mark.proof
@pytest.mark.skipif(postgres_missing() is not None, reason=str(postgres_missing()))
def test_postgres_is_healthy_and_mlflow_keeps_runs_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    check = {"pg_isready": postgres_program("pg_isready")}
    (tmp_path / "postgres").mkdir()
    with Postgres(tmp_path / "postgres") as postgres:
        assert healthy(ON_POSTGRES["postgres"], {"5432": str(postgres.port), **check})
        assert not healthy(ON_POSTGRES["postgres"], {"5432": str(free_port()), **check})
        at = {"@postgres/": f"@127.0.0.1:{postgres.port}/"}
        with mlflow(ON_POSTGRES["mlflow"], tmp_path, at, postgres.environment) as (url, _):
            run = write_a_run(url, tmp_path)
        with psycopg.connect(postgres.database("mlflow"), password=postgres.password) as connection:
            assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [(run,)]


def test_mlflow_answers_its_hosts_and_keeps_artifacts(tmp_path: Path) -> None:
    with mlflow(SERVICES["mlflow"], tmp_path) as (url, port):
        assert healthy(SERVICES["mlflow"], {"5000": port})
        assert status(url, host=f"mlflow:{port}") == 200
        assert status(url, host=f"localhost:{port}") == 200
        assert status(url, host="elsewhere.example") == 403
        write_a_run(url, tmp_path)
    assert [file.read_text(encoding="utf-8") for file in (tmp_path / "artifacts").rglob("note.txt")] == ["kept"]


@pytest.mark.proof
def test_the_dashboard_shows_the_study(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install_dashboard(packages)
    service, port = SERVICES["dashboard"], str(free_port())
    database = f"sqlite:///{tmp_path / 'optuna.db'}"
    program, *arguments = service["command"]
    arguments = [replace(each, {"0.0.0.0": "127.0.0.1", "8080": port}) for each in arguments[:-1]] + [database]
    storage = keys.open_storage(database)
    keys.make_study(storage, "shown", {keys.SWEEP: "shown"}, "macro_f1")
    study = keys.SweepStudy("shown", storage)
    keys.show(study, "### Sweep shown\n\nNo winner yet.")
    keys.show(study, "### Sweep shown\n\nThe winner is t0007.", "t0007")
    url = f"http://127.0.0.1:{port}"
    process = Process("dashboard", tmp_path / "dashboard.log")
    try:
        command = [sys.executable, str(packages / "bin" / program), *arguments]
        process.start(command, lambda: answers(f"{url}/dashboard"), tmp_path, {"PYTHONPATH": str(packages)})
        assert healthy(service, {"8080": port})
        with urllib.request.urlopen(f"{url}/api/studies", timeout=10) as answer:
            [summary] = json.load(answer)["study_summaries"]
        with urllib.request.urlopen(f"{url}/api/studies/{summary['study_id']}", timeout=10) as answer:
            detail = json.load(answer)
        assert (summary["study_name"], detail["objective_names"]) == ("shown", ["macro_f1"])
        assert "The winner is t0007." in detail["note"]["body"]
        assert {"key": "winner", "value": "t0007"} in detail["user_attrs"]
    finally:
        process.end(signal.SIGTERM)


TRAIN = """
import sys
from pathlib import Path
from agnews_lora.search import ray_cluster
from tests.search.drivers import ListDriver
from tests.search.scripted import ScriptedEngine

driver = ListDriver(Path(sys.argv[1]), 2)
ray_cluster.train(driver, ScriptedEngine, address=sys.argv[2])
print(*sorted(driver.adapters))
"""


@pytest.mark.proof
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[cluster]'")
def test_the_head_and_a_worker_make_a_cluster_that_trains(tmp_path: Path) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    token.chmod(0o600)
    environment = {**SERVICES["sweep"]["environment"], "RAY_AUTH_TOKEN_PATH": str(token)}
    environment |= {"PYTHONPATH": str(DOCKER.parent)}
    address = f"127.0.0.1:{free_port()}"
    start, _, _ = SERVICES["sweep"]["command"][0].partition(" && exec ")
    # In the foreground, so that it ends with this test: `ray stop` would end every Ray of this machine.
    head_command = [*ray, *shlex.split(replace(start, {"6379": address.rpartition(":")[2]}))[1:], "--block"]
    worker_command = [
        *ray,
        "start",
        *(replace(part, {"sweep:6379": address}) for part in SERVICES["worker"]["command"]),
    ]
    head, worker = Process("head", tmp_path / "head.log"), Process("worker", tmp_path / "worker.log")
    try:
        head.start(head_command, lambda: "Ray runtime started" in head.log.read_text(), tmp_path, environment)
        worker.start(worker_command, lambda: "Ray runtime started" in worker.log.read_text(), tmp_path, environment)
        train = [sys.executable, "-c", TRAIN, str(tmp_path / "driver"), address]
        done = subprocess.run(
            train, env=os.environ | environment, cwd=DOCKER.parent, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.split()[-2:]) == (0, ["t0000", "t0001"]), done.stdout + done.stderr
    finally:
        worker.end(signal.SIGKILL)
        head.end(signal.SIGKILL)


@contextmanager
def mlflow(
    service: Mapping[str, Any],
    folder: Path,
    replacements: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str]]:
    """The service's own command, on loopback and with its files in `folder`; gives the server's URL and port."""
    port = str(free_port())
    adapted = {"0.0.0.0": "127.0.0.1", "5000": port, "/runs": str(folder), **(replacements or {})}
    command = [replace(part, adapted) for part in service["command"]]
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}
    process = Process("mlflow", folder / "mlflow.log")
    url = f"http://127.0.0.1:{port}"
    try:
        process.start([sys.executable, "-m", *command], lambda: answers(f"{url}/health"), folder, variables)
        yield url, port
    finally:
        process.end(signal.SIGTERM)


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
