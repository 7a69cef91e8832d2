"""The line to a store that may go away for a while: what is delivered over it, or kept for later."""

import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from agnews_lora.errors import StorageError, StoreAway

POLL_SECONDS: Final = 0.5
RETRY_SECONDS: Final = 2.0
LONGEST_RETRY_SECONDS: Final = 15.0
PATIENCE_SECONDS: Final = 300.0

# What Optuna raises where the database cannot be read or written.
STORAGE_FAULTS: Final = (SQLAlchemyError, StorageInternalError)

# SQLite's answers that waiting does not change: a disk that is full, a file that is read-only, damaged, or gone.
_FINAL_CODES: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
}


Answer = TypeVar("Answer")


class Line:
    """The line to one store.

    store: what it is called in a message. patience: seconds that it may be away before it counts as lost. clock:
    seconds, monotonic.
    """

    def __init__(
        self, store: str, patience: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._patience = patience
        self._clock = clock
        self._away_since: float | None = None
        self._retry_seconds = RETRY_SECONDS
        self._next_try = float("-inf")
        self._reason = ""
        self._final = False

    @property
    def up(self) -> bool:
        """Whether the last delivery went through."""
        return self._away_since is None

    def deliver(self, delivery: Callable[[], object]) -> bool:
        """Make a delivery, and say whether it went through. It may be made again from its beginning."""
        return self.ask(lambda: (delivery(), True)[1], False)

    def ask(self, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        """The store's answer, or `otherwise`. While it is away it is asked now and then only: training goes on."""
        if self._clock() < self._next_try:
            return otherwise
        try:
            answer = question()
        except (StorageError, *STORAGE_FAULTS) as error:
            self._note(error)
            return otherwise
        self._away_since, self._retry_seconds, self._next_try = None, RETRY_SECONDS, float("-inf")
        return answer

    def insist(self, question: Callable[[], Answer], give_up: Callable[[], bool]) -> Answer | None:
        """The store's answer, waited for while it is away; None once `give_up` says so.

        Raises:
            StorageError: the store is lost.
        """
        answers: list[Answer] = []
        while not self.deliver(lambda: answers.append(question())):
            if self.loss:
                raise self.loss
            if give_up():
                return None
            time.sleep(POLL_SECONDS)
        return answers[0]

    @property
    def loss(self) -> StorageError | None:
        """What to tell the user once the store is lost: away for longer than the patience, or for good."""
        if self._away_since is None:
            return None
        seconds = self._clock() - self._away_since
        if not self._final and seconds < self._patience:
            return None
        since = "" if self._final else f" for {seconds:.0f} s"
        return StorageError(
            f"{self._store} must take what the trials report, but it has not{since} ({self._reason}); nothing is lost: "
            "it is kept beside the checkpoints, so mend the store and start again"
        )

    def _note(self, error: Exception) -> None:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
        self._next_try = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)
        self._reason = brief(error)
        self._final = _is_final(error)


def _is_final(error: Exception) -> bool:
    if isinstance(error, StorageError):
        return not isinstance(error, StoreAway)
    database = getattr(_origin(error), "sqlite_errorcode", None)
    return database is not None and database & 0xFF in _FINAL_CODES


def _origin(error: BaseException) -> BaseException:
    """The database driver's own error, out of Optuna's and SQLAlchemy's wrapping."""
    if isinstance(error, StorageInternalError) and error.__cause__:
        return _origin(error.__cause__)
    return error.orig if isinstance(error, DBAPIError) and error.orig else error


def brief(error: BaseException) -> str:
    """The first line of what went wrong, without any wrapping."""
    origin = _origin(error)
    if isinstance(origin, OSError) and origin.strerror:
        return origin.strerror
    return (str(origin).strip() or type(origin).__name__).splitlines()[0].rstrip(".")
