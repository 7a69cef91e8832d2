"""The run store: a SQLite database and a folder of artifacts below one root (`mlruns`), or an MLflow server."""

import errno
import logging
import os
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.engine import URL, make_url

from agnews_lora.errors import RunDeleted, StorageError, StoreAway
from agnews_lora.paths import RUNS_DATABASE, locked, read_database

ARTIFACTS: Final = "artifacts"
LOCK: Final = "lock"  # one process at a time creates what is missing: two at once would break the schema


def tracking_uri(root: Path) -> str:
    """URI of the run database in the folder of stores `root` (`mlruns`).

    It names the driver, since MLflow would make the folder of a plain `sqlite:///` URI as it is written, `%3F` and all.
    """
    return URL.create("sqlite+pysqlite", database=str(root.resolve() / RUNS_DATABASE)).render_as_string()


def artifact_uri(root: Path) -> str:
    """URI of the artifacts' folder in the folder of stores `root`."""
    return (root.resolve() / ARTIFACTS).as_uri()


# MLflow's codes for what may work later; the first is also its answer where a server cannot be reached at all.
_PASSING_CODES: Final = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_REQUEST"}
_UNKNOWN_USER_CODES: Final = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
# Waiting does not help with a disk that is full, or that may not be written.
_LASTING_FAULTS: Final = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "ENOENT")
}


def open_client(where: Path | str, read: bool = False) -> MlflowClient:
    """A client of the run store: in a folder, created with the database's schema where it is missing, or of a server.

    A folder that was copied or moved has its artifacts in its new place, whatever its database recorded.

    Args:
        read: only to be read: the folder stays as it is, and may be one that this user cannot write.

    Raises:
        StorageError: the store cannot be created, reached, read or written, its schema is another MLflow's, or the
            server's URL is not one to use.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for loud in ("mlflow.store.db.utils", "urllib3"):  # what goes wrong is said once, in the message
        logging.getLogger(loud).setLevel(logging.CRITICAL)
    _artifact_repos_cache.clear()  # MLflow finds artifacts by the run's id alone, which a copied project shares
    return _open_folder(where, read) if isinstance(where, Path) else _open_server(where)


def _open_server(url: str) -> MlflowClient:
    cannot = "Cannot use the run store"
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = None
    if not parts or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        # The text is not shown: it may hold a password.
        raise StorageError(f"{cannot}: its URL is not that of an MLflow server. Give http://HOST:PORT.")
    if parts.username is not None or parts.password is not None:
        raise StorageError(
            f"{cannot}: its URL holds a name or password, which others would read in logs and lists of processes. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead."
        )
    client = MlflowClient(tracking_uri=url, registry_uri=url)
    with reaching(client):
        client.search_experiments(max_results=1)
    return client


@contextmanager
def reaching(client: MlflowClient) -> Iterator[None]:
    """Raise what MLflow raises of a store that cannot be read or written as one error.

    Raises:
        StoreAway: it may work later.
        RunDeleted: somebody deleted what is asked of it.
        StorageError: it will not work, unless somebody fixes it.
    """
    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        cannot, code = f"Cannot use the run store {name_of(client)}", getattr(error, "error_code", None)
        if code in _UNKNOWN_USER_CODES:
            raise StorageError(
                f"{cannot}: it does not know this user, or not by this password. Set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD."
            ) from error
        if code == "PERMISSION_DENIED":
            user = os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")
            raise StorageError(
                f"{cannot}: {user} has no permission for that. Ask its administrator for the permission to edit the "
                "MLflow experiment and the registered model, or set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD of another user."
            ) from error
        if code == "RESOURCE_DOES_NOT_EXIST" or "'active' state" in str(error):
            reason = str(error).splitlines()[0].rstrip(".")
            raise RunDeleted(
                f"{cannot}: {reason}. Restore it in MLflow (`mlflow runs restore`, `mlflow experiments restore`), or "
                "start another study with `agnews-lora sweep --new`."
            ) from error
        unknown = str(error).startswith("API request to endpoint")  # of MLflow's client: the answer is not MLflow's
        if isinstance(error, MlflowException) and code not in _PASSING_CODES and not unknown:
            raise
        if isinstance(error, MlflowException | requests.RequestException) or error.errno not in _LASTING_FAULTS:
            remedy = "Start it (docker/README.md), or leave --tracking out." if is_server(client) else "Try again."
            if unknown:
                remedy = (
                    "Give the URL with the path that the server has (http://HOST:PORT/PATH), and check that its MLflow "
                    "is as new as this one."
                )
            if (proxy := _proxy(error)) is not None:
                host = urlsplit(client.tracking_uri).hostname
                remedy = f"It was asked through the proxy {proxy}: add {host} to NO_PROXY, or correct HTTP_PROXY."
            raise StoreAway(f"{cannot}: {_brief(error)}. {remedy}") from error
        raise StorageError(f"{cannot}: {_brief(error)}. Free or unlock its folder.") from error


def name_of(client: MlflowClient) -> str:
    """The store in messages: a server's URL, or the path of the database."""
    return str(client.tracking_uri if is_server(client) else make_url(client.tracking_uri).database)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those inside it, in order."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__


def _proxy(error: BaseException) -> str | None:
    """Host and port of the proxy that did not answer; None where none was asked."""
    found = next((each for each in _causes(error) if isinstance(each, requests.exceptions.ProxyError)), None)
    if found is None:
        return None
    url = urlsplit(getattr(found.request, "url", "") or "http://")
    proxy = urlsplit(getproxies().get(url.scheme, ""))
    return f"{proxy.hostname}:{proxy.port}"  # without the name and password that it may hold


def _brief(error: BaseException) -> str:
    """The first line of the innermost reason."""
    found = list(_causes(error))
    error = next((each for each in found if isinstance(each, OSError) and each.strerror), found[-1])
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def is_server(client: MlflowClient) -> bool:
    """Whether the store is a server, which others may use from other machines."""
    return str(client.tracking_uri).startswith("http")


def _open_folder(root: Path, read: bool) -> MlflowClient:
    database = root / RUNS_DATABASE
    try:
        if read:
            return _open_to_read(root)
        with locked(root / LOCK):
            _create_database(root)
        relocate(database, root)
        return _client(root)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StorageError(
            f"Cannot use the run store {database}: {reason}. Fix its permissions, end the process that locks it, or "
            "move it away to start an empty store."
        ) from error
    except MlflowException as error:
        raise StorageError(
            f"Cannot use the run store {database}: {error.message}. Copy it and run `mlflow db upgrade "
            f"{tracking_uri(root)}`, or install the MLflow that wrote it."
        ) from error


def _client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(root), registry_uri=tracking_uri(root))


def _open_to_read(root: Path) -> MlflowClient:
    """The store itself where it lies as recorded, else a copy of its database for the life of the client."""
    database = root.resolve() / RUNS_DATABASE
    if not database.exists():
        raise StorageError(
            f"Cannot read the run store {root / RUNS_DATABASE}: it is not there. Start `agnews-lora sweep` first, or "
            "put it back."
        )
    with read_database(database) as connection:
        if _recorded_root(connection) in (None, artifact_uri(root)):
            return _client(root)
        try:
            folder = tempfile.TemporaryDirectory()
            with closing(sqlite3.connect(Path(folder.name, RUNS_DATABASE))) as copy:
                connection.backup(copy)
            relocate(Path(folder.name, RUNS_DATABASE), root)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"Cannot copy the run store {root / RUNS_DATABASE}, which was moved and is to be read alone, to "
                f"{tempfile.tempdir}: {error}. Free it, or set TMPDIR to a folder with room."
            ) from error
    client = _client(Path(folder.name))
    weakref.finalize(client, folder.cleanup)
    return client


def _create_database(root: Path) -> None:
    """Write the schema beside and rename: migrations, killed half-way, would leave a store that nothing can open."""
    database = root / RUNS_DATABASE
    if database.exists():
        return
    folder = root / ".schema"
    shutil.rmtree(folder, ignore_errors=True)  # a killed process may have left its own
    folder.mkdir()
    store = SqlAlchemyStore(tracking_uri(folder), artifact_uri(root))
    store.engine.dispose()
    (folder / RUNS_DATABASE).replace(database)
    folder.rmdir()


# Where MLflow keeps absolute URIs of artifacts.
_LOCATIONS: Final = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def relocate(database: Path, root: Path) -> None:
    """Record that the artifacts lie below `root`, and a version's base inside the project in the project's folder.

    SQLite itself is asked for the permission to write, since MLflow would retry for minutes.
    """
    with closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        old, new = _recorded_root(connection), artifact_uri(root)
        if old is None or old == new:
            return
        for table, column in _LOCATIONS:
            _move(connection, table, column, old, new)
        old_project = Path(local_file_uri_to_path(old)).parents[1]
        _move(connection, "model_version_tags", "value", str(old_project), str(root.resolve().parent), "key = 'base'")


def _move(connection: sqlite3.Connection, table: str, column: str, old: str, new: str, rows: str = "true") -> None:
    """Replace the folder `old` at the beginning of a column's values, where it is whole."""
    connection.execute(
        f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
        f"WHERE {rows} AND substr({column} || '/', 1, length(:old) + 1) = :old || '/'",
        {"old": old, "new": new},
    )


def _recorded_root(connection: sqlite3.Connection) -> str | None:
    """URI of the artifacts' folder that the oldest experiment with one like ours has recorded."""
    locations = connection.execute("SELECT artifact_location FROM experiments ORDER BY experiment_id").fetchall()
    roots = [location.removesuffix("/0") for (location,) in locations if location]  # `Default` has a folder in it
    return next((root for root in roots if root.startswith("file:") and root.endswith(f"/{ARTIFACTS}")), None)


def recorded_place(root: Path) -> Path | None:
    """The folder of stores that a database was written for, or moved to last; None before its first sweep.

    Raises:
        StorageError: it is no database of runs.
    """
    try:
        with read_database(root / RUNS_DATABASE) as connection:
            recorded = _recorded_root(connection)
    except sqlite3.Error as error:
        raise StorageError(
            f"Cannot read the run store {root / RUNS_DATABASE}: {error}. Put it back from a copy, or move it away to "
            "start an empty one."
        ) from error
    return Path(local_file_uri_to_path(recorded)).parent if recorded else None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the MLflow experiment of this name, created where it is missing.

    A local store has its artifacts beside the database, a server wherever it keeps them.

    Raises:
        StorageError: it was deleted, or its artifacts belong to another folder of stores.
    """
    if is_server(client):
        with reaching(client):
            experiment = client.get_experiment_by_name(name) or client.get_experiment(client.create_experiment(name))
    else:
        root = Path(str(make_url(client.tracking_uri).database)).parent
        with locked(root / LOCK):
            experiment = client.get_experiment_by_name(name) or client.get_experiment(
                client.create_experiment(name, artifact_location=artifact_uri(root))
            )
        if experiment.lifecycle_stage == LifecycleStage.ACTIVE and experiment.artifact_location != artifact_uri(root):
            raise StorageError(
                f"Cannot use the run store {name_of(client)}: the artifacts of {name!r} belong to "
                f"{experiment.artifact_location} and not to {artifact_uri(root)}. Rename that MLflow experiment, "
                "or the sweep."
            )
    require_active(client, experiment)
    return experiment.experiment_id


def require_active(client: MlflowClient, experiment: Experiment) -> None:
    """Check that an MLflow experiment is not deleted.

    Raises:
        StorageError: it is.
    """
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StorageError(
            f"Cannot use the runs of {experiment.name!r}: that MLflow experiment was deleted. Restore it with "
            f"`MLFLOW_TRACKING_URI={client.tracking_uri} mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}`."
        )
