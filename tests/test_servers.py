"""The servers that other tests use: they start, answer, stop, keep their data, and never outlive the tests."""

import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psycopg
import pytest

from tests.servers import MlflowServer, Postgres, answers, postgres_missing

pytestmark = pytest.mark.proof
needs_postgres = pytest.mark.skipif(postgres_missing() is not None, reason=str(postgres_missing()))


@needs_postgres
def test_postgres_keeps_its_data_when_stopped_and_when_killed(tmp_path: Path) -> None:
    with Postgres(tmp_path) as server:
        with connect(server) as connection:
            connection.execute("CREATE TABLE words (word text)")
        for end in (server.stop, server.kill):
            with connect(server) as connection:
                connection.execute("INSERT INTO words VALUES ('kept')")
            end()
            with pytest.raises(psycopg.OperationalError, match="refused"):
                connect(server)
            server.start()
        with connect(server) as connection:
            assert connection.execute("SELECT count(*) FROM words").fetchone() == (2,)


@needs_postgres
def test_postgres_lets_nobody_in_without_the_password_and_nobody_in_as_superuser(tmp_path: Path) -> None:
    with Postgres(tmp_path) as server:
        assert server.password not in server.url
        for user, password in (("agnews", ""), ("agnews", "wrong"), ("postgres", server.password)):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(server.url, user=user, password=password)
        with psycopg.connect(server.url, passfile=str(server.passfile)) as connection:
            role = connection.execute("SELECT rolname, rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
        assert role == ("agnews", False)
        home = server._home
    assert not home.exists()


def test_mlflow_keeps_its_runs_when_killed_and_when_stopped(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with MlflowServer(tmp_path) as server:
        experiment = MlflowClient(server.url).create_experiment("kept")
        for end in (server.kill, server.stop):
            end()
            assert not answers(f"{server.url}/health")
            server.start()
        assert MlflowClient(server.url).get_experiment(experiment).name == "kept"


@pytest.mark.parametrize("server", ["MlflowServer", pytest.param("Postgres", marks=needs_postgres)])
def test_a_server_dies_with_the_process_that_started_it(server: str, tmp_path: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from tests.servers import {server}

        server = {server}(Path(sys.argv[1]))
        server.start()
        print(server.port, getattr(server, "_home", ""), flush=True)
        time.sleep(600)
    """
    tests = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert tests.stdout is not None
    port, _, home = tests.stdout.readline().strip().partition(" ")
    assert listens(int(port))
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    deadline = time.monotonic() + 20
    while listens(int(port)):
        assert time.monotonic() < deadline, "the server has outlived the process that started it"
        time.sleep(0.1)
    if home:
        shutil.rmtree(home)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nosuchstore"):
        MlflowServer(tmp_path, "nosuchstore://here").start()


def connect(server: Postgres) -> psycopg.Connection:
    return psycopg.connect(server.url, password=server.password)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
