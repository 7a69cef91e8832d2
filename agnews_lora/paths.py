"""Where things lie, below the working directory, the locks on them, and how files are written and hashed."""

import errno
import fcntl
import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from agnews_lora.errors import StorageError

STORES: Final = Path("mlruns")  # the two databases, and artifacts/
RUNS_DATABASE: Final = "mlflow.db"
STUDIES_DATABASE: Final = "optuna.db"
RESULTS: Final = STORES / "results"  # `result.json` of each study, under its name
WORK: Final = STORES / "work"  # checkpoints of trials that have not ended, and temporary files
COMPILED: Final = Path(".cache/compiled")  # kernels, made again when missing
TOKENS: Final = Path(".cache/tokens")  # token tables, made again when missing
TRAINED: Final = Path("trained_models")
REPORTS: Final = Path("reports")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside and renamed: it is whole, or as it was. Its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


def sha256_of(path: Path) -> str:
    """Hash a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file and hold it.

    Raises:
        OSError, StorageError: as of `lock_file`.
    """
    with lock_file(path) as acquire:
        while not acquire():
            time.sleep(0.05)
        yield


@contextmanager
def lock_file(path: Path) -> Iterator[Callable[[], bool]]:
    """Open a lock file, made where it is missing, and give the function that tries to acquire its lock.

    The system releases it when the process ends, however it ends. The file is open for writing, since network file
    systems give an exclusive lock on no other.

    Raises:
        OSError: it cannot be written.
        StorageError: its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:

        def acquire() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
                    raise
                raise StorageError(
                    f"Cannot lock {path}: its file system has no locks ({error.strerror}). Move the project to a local "
                    "disk, or mount this one with locks."
                ) from error
            return True

        yield acquire


def read_database(path: Path) -> closing[sqlite3.Connection]:
    """Open an SQLite database to be read alone; it is closed at the end of a `with`."""
    return closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=20))


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of a file, asked without writing or making it; no where it cannot be told."""
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a network disk gives it to who only reads, too
        except BlockingIOError:
            return True
    return False


_TEMPORARY: Final = "temporary-"
_ROOM: Final = 2**20  # bytes


@contextmanager
def temporary_files() -> Iterator[None]:
    """Keep the temporary files of this process and its libraries below `WORK`, for the time of a block or function.

    Where the stores have room, they have it too: the system's folder for them may be small, or full. It is used where
    there are no stores, or they cannot be written. Folders of processes that were killed are removed.

    Raises:
        StorageError: there is no room for temporary files.
    """
    before, compiled = tempfile.tempdir, Path(COMPILED).resolve()
    with ExitStack() as held:
        try:
            tempfile.tempdir = _own_folder(held)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))  # else among the temporary files
        except (OSError, StorageError) as error:
            _require_room(error)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _own_folder(held: ExitStack) -> str:
    """A new folder beside the stores, removed with `held`; its lock says that this process lives."""
    STORES.stat()  # what only reads makes none
    with locked(STORES / "lock"):
        for left in WORK.glob(f"{_TEMPORARY}*"):
            with suppress(OSError), lock_file(left / "lock") as acquire:
                if acquire():
                    shutil.rmtree(left)
        WORK.mkdir(exist_ok=True)
        folder = held.enter_context(
            tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=WORK.resolve(), ignore_cleanup_errors=True)
        )
        held.enter_context(lock_file(Path(folder, "lock")))()
    _write_some(folder)
    return folder


def _require_room(error: Exception) -> None:
    try:
        _write_some(None)
    except OSError as other:
        folder = os.environ.get("TMPDIR") or tempfile.tempdir or "the system's folder for them"
        raise StorageError(
            f"Cannot write temporary files: neither below {WORK} ({error}) nor in {folder} ({other.strerror or other})."
            " Free one of them, or set TMPDIR to a folder with room."
        ) from other


def _write_some(folder: str | None) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_ROOM))
