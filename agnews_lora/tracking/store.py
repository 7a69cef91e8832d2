"""The run store: a SQLite database and a folder of artifacts below one root (`mlruns`)."""

import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from agnews_lora.errors import StorageError

DATABASE: Final = "mlflow.db"
ARTIFACTS: Final = "artifacts"


def tracking_uri(root: Path) -> str:
    """URI of the run database in the folder of stores `root` (`mlruns`)."""
    return f"sqlite:///{root.resolve() / DATABASE}"


def artifact_uri(root: Path) -> str:
    """URI of the artifacts' folder in the folder of stores `root`."""
    return (root.resolve() / ARTIFACTS).as_uri()


def open_client(root: Path) -> MlflowClient:
    """A client of the run store in the folder `root`, which is created with the database's schema where it is missing.

    Raises:
        StorageError: the folder or the database cannot be created, read or written, or its schema is another MLflow's.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = tracking_uri(root)
    try:
        with _locked(root):
            _create_database(root)
        _require_writable(root / DATABASE)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(
            f"the run store must be a writable SQLite database, but {root / DATABASE} is not: {error}; "
            f"mend its permissions, end the process that locks it, or move it away to start an empty store"
        ) from error
    except MlflowException as error:
        raise StorageError(
            f"the run store must have the schema of the installed MLflow, but {root / DATABASE} cannot be opened: "
            f"{error.message} (run `mlflow db upgrade {uri}` after a copy, or install the MLflow that wrote it)"
        ) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time creates what is missing: two at once would break the schema, or each other."""
    root.mkdir(parents=True, exist_ok=True)
    folder = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _create_database(root: Path) -> None:
    """Write the schema beside and rename: migrations, killed half-way, would leave a store that nothing can open."""
    database = root / DATABASE
    if database.exists():
        return
    folder = root / ".schema"
    shutil.rmtree(folder, ignore_errors=True)  # a killed process may have left its own
    folder.mkdir()
    store = SqlAlchemyStore(tracking_uri(folder), artifact_uri(root))
    store.engine.dispose()
    (folder / DATABASE).replace(database)
    folder.rmdir()


def _require_writable(database: Path) -> None:
    """Asked of SQLite itself, since MLflow would retry for minutes."""
    with closing(sqlite3.connect(database, timeout=20)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the MLflow experiment of this name, created where it is missing, with its artifacts beside the database.

    Raises:
        StorageError: it was deleted, or its artifacts belong to another folder of stores.
    """
    root = Path(client.tracking_uri.removeprefix("sqlite:///")).parent
    with _locked(root):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return client.create_experiment(name, artifact_location=artifact_uri(root))
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StorageError(
            f"runs need an active MLflow experiment, but {name!r} was deleted; restore it with "
            f"`MLFLOW_TRACKING_URI={client.tracking_uri} mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}`"
        )
    if experiment.artifact_location != artifact_uri(root):
        raise StorageError(
            f"a run store must stay in the folder it was made in, but the artifacts of {name!r} belong to "
            f"{experiment.artifact_location} and not to {artifact_uri(root)}; move the folder back, or start with an "
            f"empty one"
        )
    return experiment.experiment_id
