"""Where things lie, below the working directory, and the locks on them."""

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agnews_lora.errors import StorageError

STORES: Final = Path("mlruns")  # mlflow.db, artifacts/, optuna.db
WORK: Final = STORES / "work"  # checkpoints of trials that have not ended
TOKENS: Final = Path(".cache/tokens")  # token tables, made again when missing
TRAINED: Final = Path("trained_models")
REPORTS: Final = Path("reports")


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
