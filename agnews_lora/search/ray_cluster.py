"""Workers as Ray actors: on this machine (`--workers N`), or on the nodes of a running cluster (`--address ADDRESS`).

The only module that imports Ray, and it does so inside functions: Ray reads its settings from the environment when it
is imported.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import agnews_lora
from agnews_lora.errors import ConfigError, StorageError
from agnews_lora.search.fleet import SILENCE_SECONDS, Driver, Fleet, WorkerDied
from agnews_lora.training.exchange import SHIP_SECONDS, Answer, EngineWorker, Event
from agnews_lora.training.interface import Engine

LOCAL_SHIP_SECONDS: Final = 5.0  # within a machine, checkpoints cost the driver some ms each and no network
OBJECT_STORE_BYTES: Final = 512 * 2**20  # token tables, and checkpoints on their way
CONNECT_SECONDS: Final = 10.0
LOOPBACK_SWITCH: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" keeps all of Ray's ports on loopback, on Linux too
PACKAGE: Final = Path(agnews_lora.__file__).parent
_FOLDER: Final = "agnews-lora-worker-"  # of an actor, in the machine's folder for temporary files

_token_folder: "tempfile.TemporaryDirectory[str] | None" = None  # removed when this process ends


def train(
    driver: Driver,
    engine_factory: Callable[[], Engine],
    workers: int | None = None,
    address: str | None = None,
    screen_message: Callable[[str], object] = print,
    silence: float = SILENCE_SECONDS,
) -> None:
    """Train a driver's trials with Ray actors, until it is done or asks for a stop.

    Ray stays up for the next call, and ends with this process.

    Args:
        engine_factory: builds the engine, inside each actor. It is pickled, and travels to each machine once.
        workers: how many actors this machine runs, at most one a GPU; in a cluster, the most that there will be.
        address: of a running cluster's head, `HOST:PORT`, or `auto` on one of its nodes. None: this machine alone.
        screen_message: shows the user a line.
        silence: seconds without an answer after which an actor is killed and replaced.

    Raises:
        ConfigError: Ray is not installed, more workers than GPUs, or a cluster that cannot be joined.
        AgnewsLoraError: a worker met a fault that the user can mend, or workers die again and again.
    """
    if driver.is_done():
        return
    if find_spec("ray") is None:
        raise ConfigError(
            "Cannot train with several workers: Ray is not installed. "
            "Run `.venv/bin/pip install -c constraints.txt -e '.[cluster]'` in the checkout."
        )
    pool = _local_actors(workers or 1, engine_factory) if address is None else _join(address, workers, engine_factory)
    Fleet(driver, pool, screen_message, silence).run()


class TrialWorker:
    """An actor's process. factory: a list, so that Ray leaves the reference in it for this process to resolve."""

    def __init__(self, factory: list[Any], ship_seconds: float, environment: dict[str, str]) -> None:
        import ray

        os.environ.update(environment)  # before torch is imported, which unpickling the factory may do
        agnews_lora.set_environment()
        tempfile.tempdir = None  # Ray has asked for it: TMPDIR is read again

        def build() -> Engine:
            engine: Engine = ray.get(factory[0])()
            return engine

        self._worker = EngineWorker(build, _own_folder(), ship_seconds)

    def exchange(self, answer: Answer | None, stop: bool) -> list[Event]:
        return self._worker.exchange(answer, stop)


def _own_folder() -> Path:
    """A folder for this process alone. Those of processes that were killed are removed first."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(PermissionError, ValueError):
            try:
                os.kill(int(left.name.removeprefix(_FOLDER).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))


class _Handle:
    """Implements `fleet.Worker`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.call: Any = None

    def submit(self, answer: Answer | None, stop: bool) -> None:
        self.call = self._actor.exchange.remote(answer, stop)

    def collect(self) -> list[Event]:
        import ray

        try:
            events: list[Event] = ray.get(self.call)
        except ray.exceptions.RayError as error:
            raise WorkerDied(_reason(error)) from error
        return events

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def _reason(error: Exception) -> str:
    """What Ray knows of an actor's death, in one line, and where its last words are."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2].partition(" Some common causes")[0]
    if "End of file" in detail:
        detail = "its process was killed, ran out of memory, or crashed"
    return (
        f"{detail or text[:300]}\nIts output is in Ray's logs, by default /tmp/ray/session_latest/logs on its machine."
    )


class _Actors:
    """Implements `fleet.Workers`. start_actor: an actor that waits where all places are taken."""

    def __init__(self, num_places: Callable[[], int], start_actor: Callable[[], Any]) -> None:
        self.num_places = num_places
        self._start_actor = start_actor

    def start(self, name: str) -> _Handle:
        return _Handle(self._start_actor())

    def wait(self, workers: Sequence[Any], seconds: float) -> list[Any]:
        import ray

        if not workers:
            time.sleep(seconds)
            return []
        by_call = {worker.call: worker for worker in workers}
        ready, _ = ray.wait(list(by_call), num_returns=1, timeout=seconds)
        if ready:  # and all others that are, too
            ready, _ = ray.wait(list(by_call), num_returns=len(by_call), timeout=0)
        return [by_call[call] for call in ready]


# This machine --------------------------------------------------------------------------------------------------------


def _local_actors(workers: int, engine_factory: Callable[[], Engine]) -> _Actors:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and workers > gpus:
        raise ConfigError(
            f"Cannot start {workers} workers: this machine shows {gpus} GPU{'s' if gpus > 1 else ''}, and each worker "
            "needs its own. Give --workers at most one a GPU; each trains many trials at once (`slots:`)."
        )
    _prepare_local()
    import ray

    if not ray.is_initialized():
        try:
            _init_ray(
                "local",
                include_dashboard=False,
                num_cpus=workers,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        except (OSError, RuntimeError, ValueError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            raise StorageError(
                f"Cannot start Ray: {cause}. Free {folder}, where it keeps its files, or set RAY_TMPDIR to a short "
                "path of a folder with room."
            ) from error
    # Cores are shared out: more threads than cores would wait for each other.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, "TMPDIR": tempfile.gettempdir()}
    factory = ray.put(engine_factory)
    options = {"num_cpus": 0, "num_gpus": 1} if gpus else {"num_cpus": 1}
    start = partial(_start_actor, factory, LOCAL_SHIP_SECONDS, environment, options)
    return _Actors(lambda: workers, start)


def _prepare_local() -> None:
    """Let Ray listen on loopback alone, ask for a token that only this user can read, and report nothing home."""
    global _token_folder  # noqa: PLW0603
    if _token_folder is not None:
        return
    if "ray" in sys.modules and os.environ.get(LOOPBACK_SWITCH) != "0":
        raise RuntimeError("Ray was imported before its environment was set: it would listen on all interfaces")
    _token_folder = tempfile.TemporaryDirectory(prefix="agnews-lora-token-")
    token = Path(_token_folder.name) / "token"
    (token.parent / PACKAGE.name).symlink_to(PACKAGE)
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would be preferred to the file
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        **{LOOPBACK_SWITCH: "0"},
    )


# A cluster -----------------------------------------------------------------------------------------------------------


def _join(address: str, limit: int | None, engine_factory: Callable[[], Engine]) -> _Actors:
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster listens on a network
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # each takes 40 s where nobody answers
    _protect_token()
    import ray

    if not ray.is_initialized():
        try:
            host, _, port = address.rpartition(":")
            if host and port.isdigit():  # Ray itself asks for minutes where nobody answers
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            _init_ray(address)
        except (ray.exceptions.AuthenticationError, OSError) as error:  # a wrong token gives either
            raise ConfigError(
                f"Cannot join the Ray cluster at {address}: no head answers there, or it asks for another token. Start "
                "it with `ray start --head`, put its token into a file with mode 0600, and set RAY_AUTH_TOKEN_PATH to "
                "that file's path."
            ) from error
        except (RuntimeError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            raise ConfigError(f"Cannot join the Ray cluster at {address}: {cause}") from error
    factory = ray.put(engine_factory)

    def resources() -> dict[str, int]:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return {kind: int(sum(each.get(kind, 0) for each in alive)) for kind in ("GPU", "CPU")}

    def num_places() -> int:
        found = resources()
        places = found["GPU"] or found["CPU"]
        return places if limit is None else min(limit, places)

    def start() -> Any:
        options = {"num_cpus": 0, "num_gpus": 1} if resources()["GPU"] else {"num_cpus": 1}
        return _start_actor(factory, SHIP_SECONDS, {}, options)

    return _Actors(num_places, start)


def _protect_token() -> None:
    """Let nobody else read the token's file: Ray makes it with the mode that all files get."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):  # somebody else's, or on a disk that cannot be written
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


# Both ----------------------------------------------------------------------------------------------------------------


def _init_ray(address: str, **options: Any) -> None:
    import ray
    import ray._private.worker
    from ray.job_config import JobConfig

    class Job(JobConfig):
        """Ray would put the driver's working folder in front of a worker's libraries."""

        def _serialize(self) -> Any:
            # On other machines this package is installed; on this one, it need not be.
            self._py_driver_sys_path = [_token_folder.name] if _token_folder else []
            return super()._serialize()

    ray._private.worker._worker_logs_enabled = False  # it would print what raylets say to stdout, across table and JSON
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with agnews_lora.unset(lambda name: name == "PYTHONWARNINGS"):
            ray.init(address, job_config=Job(), logging_level=logging.ERROR, log_to_driver=False, **options)
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray has set none either
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the sweep without a checkpoint


def _start_actor(factory: Any, ship_seconds: float, environment: dict[str, str], options: dict[str, int]) -> Any:
    import ray

    actor = ray.remote(max_restarts=0, max_task_retries=0)(TrialWorker)
    return actor.options(**options).remote([factory], ship_seconds, environment)
