"""Real PostgreSQL and MLflow servers on loopback, to be stopped, killed, and started again with their data.

A server dies with the test process, however that ends: it runs below a guard (this file, as a program) whose standard
input is a pipe from the test process, and the guard kills the server's process group when the pipe closes.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DATABASES = Path(__file__).parents[1] / "docker" / "databases.sql"
START_SECONDS = 90
STOP_SECONDS = 30


class Postgres:
    """PostgreSQL with the databases of `docker/databases.sql`, which belong to `agnews`, who is no superuser.

    `url` carries no password: `environment` (`PGPASSWORD`) and `passfile` (for `PGPASSFILE`) do. Port and data stay the
    same from start to start, until `close()` removes the data.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.password = secrets.token_urlsafe(16)
        self.environment = {"PGPASSWORD": self.password}
        self.passfile = folder / "passfile"
        self.passfile.touch(mode=0o600)  # libpq ignores one that others may read
        self.passfile.write_text(f"127.0.0.1:{self.port}:*:agnews:{self.password}\n", encoding="utf-8")
        self._process = Process("postgres", folder / "postgres.log")
        # PostgreSQL refuses to run as root, and its user cannot get into root's folders. A socket's path is short, too.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="postgres-"))
        if self._user:
            shutil.chown(self._home, self._user)

    @property
    def url(self) -> str:
        """The database of the studies."""
        return self.database("agnews")

    def database(self, name: str) -> str:
        """URL of one of the databases: `agnews` or `mlflow`."""
        return f"postgresql://agnews@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        if fresh := not (self._home / "data").exists():
            # As the image does it: the superuser needs no password, but only the socket lets it in like that.
            self._run(
                *("initdb", "-D", str(self._home / "data"), "-U", "postgres", "-E", "UTF8", "--no-locale"),
                *("--no-sync", "--auth-local=trust", "--auth-host=scram-sha-256"),
            )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self._home,
            "fsync": "off",  # what a killed server has committed is kept all the same
        }
        command = [postgres_program("postgres"), "-D", str(self._home / "data")]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process.start(command, self._ready, self._home, user=self._user)
        if fresh:
            superuser = ("-h", str(self._home), "-p", str(self.port), "-U", "postgres", "-d", "postgres")
            script = DATABASES.read_text(encoding="utf-8")
            self._run("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", *superuser, "-f", "-", stdin=script)

    def stop(self) -> None:
        """Shut it down; connections are closed."""
        self._process.end(signal.SIGINT)

    def kill(self) -> None:
        """End it without a checkpoint, so that the next start has to recover."""
        self._process.end(signal.SIGQUIT)  # after SIGKILL, its children would still hold the data for a while

    def close(self) -> None:
        """Stop it and remove its data."""
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self) -> bool:
        isready = [postgres_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(isready, check=False).returncode == 0

    def _run(self, name: str, *arguments: str, stdin: str = "") -> None:
        subprocess.run(
            [postgres_program(name), *arguments],
            input=stdin,
            **_identity(self._user),
            cwd=self._home,
            env={**os.environ, "POSTGRES_PASSWORD": self.password},
            stdout=subprocess.DEVNULL,
            text=True,
            check=True,
        )


class MlflowServer:
    """`mlflow server`, artifacts below the folder; the runs too, in SQLite, unless another store is given.

    `environment` is set for the server: the password of a store in PostgreSQL.
    """

    def __init__(
        self, folder: Path, backend_store_uri: str | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._store = backend_store_uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}
        self._process = Process("mlflow", folder / "mlflow.log")

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store),
            *("--artifacts-destination", str(self._folder / "artifacts"), "--serve-artifacts"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
        ]
        self._process.start(command, lambda: answers(f"{self.url}/health"), self._folder, self._environment)

    def stop(self) -> None:
        """Shut it down; it answers what it has been asked."""
        self._process.end(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its workers in the middle of whatever they do."""
        self._process.end(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Process:
    """A command below a guard, again and again; what it prints is appended to `log`."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._guard: subprocess.Popen[bytes] | None = None

    def start(
        self,
        command: Sequence[str],
        ready: Callable[[], bool],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        """Start it in `folder` and wait until it is ready. Raises RuntimeError, with what it printed, if that fails."""
        assert self._guard is None, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), user or "", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the tests; the end of the pipe tells the guard
            )
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._guard.poll() is not None or time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                output = self.log.read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"{self.name} did not start:\n{output[-4000:]}")
            time.sleep(0.1)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, wait until it has ended, and kill it where it does not."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):  # it has ended by itself, or does not want to
            guard.stdin.write(b"%d\n" % number)
            guard.stdin.flush()
            guard.wait(STOP_SECONDS)
        with suppress(BrokenPipeError):
            guard.stdin.close()
        guard.wait()


def postgres_missing() -> str | None:
    """Why no PostgreSQL can be started here; None: one can."""
    for name in ("initdb", "postgres", "pg_isready", "psql"):
        if _find(name) is None:
            return f"PostgreSQL's {name} is neither in a folder of /usr/lib/postgresql nor on the path"
    if os.geteuid() == 0:
        import pwd

        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL refuses to run as root, and there is no user postgres"
    return None


def postgres_program(name: str) -> str:
    """Path of one of PostgreSQL's programs; only to be asked for where `postgres_missing()` is None."""
    found = _find(name)
    assert found is not None, postgres_missing()
    return found


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # urllib's own errors are among them
        return False


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find(name: str) -> str | None:
    """Path of a program: of the newest version where they are, as on Debian, in a folder of each, else on the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: folder.parent.name.zfill(4))
    return shutil.which(name, path=os.pathsep.join([*map(str, reversed(folders)), os.environ.get("PATH", "")]))


def _identity(user: str | None) -> dict[str, Any]:
    """What `subprocess` takes to run something as this user, in its group alone."""
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def _run_guarded(user: str | None, command: Sequence[str]) -> int:
    """Run a server; send its process group the signals whose numbers come on standard input, and SIGKILL at the end."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **_identity(user))

    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)

    def watch() -> None:
        for line in sys.stdin:
            send(int(line))
        send(signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    exit_code = server.wait()
    send(signal.SIGKILL)  # what it has left behind
    return exit_code


if __name__ == "__main__":
    sys.exit(_run_guarded(sys.argv[1] or None, sys.argv[2:]))
