"""A work folder that one start of a sweep has for itself, together with the workers that it starts."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from agnews_lora.errors import StorageError, StudyError

ORPHANS_SECONDS: Final = 10.0  # workers end within 5 s of their supervisor's death
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Place:
    """A folder that is held. id: of the folder, for good. lock: descriptor of the lock.

    A worker that inherits the descriptor holds the folder too. So whoever gets hold of it knows that everyone who held
    it before is dead, and that what they held elsewhere (`Leases.revoke`) is free.
    """

    id: str
    lock: int

    def new_owner(self) -> str:
        """A name for a process that holds the folder, unlike any other."""
        return f"{self.id}/{uuid4().hex}"


@contextmanager
def exclusive(folder: Path, study: str) -> Iterator[Place]:
    """Hold the folder; the system lets go of it when all processes that hold it have ended, however they end.

    Raises:
        StudyError: another process holds it, and goes on holding it for longer than workers outlive their supervisor.
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise StorageError(
            f"the work folder {folder} cannot be written ({error.strerror}); make it writable"
        ) from error
    with file:
        deadline = time.monotonic() + ORPHANS_SECONDS
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                raise StudyError(
                    f"sweep {study} is being run by another process; wait for it to end, or stop it, and start again "
                    f"(to add a worker to it: agnews-lora worker {study})"
                )
            time.sleep(_POLL_SECONDS)
        file.seek(0)
        identity = file.read().strip()
        if not identity:
            identity = uuid4().hex
            file.write(identity)
            file.flush()
        yield Place(identity, file.fileno())


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
