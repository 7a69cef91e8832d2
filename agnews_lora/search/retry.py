"""Calls to a store that may be away for a while: made now, or again later, until patience ends."""

import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from agnews_lora.errors import RunDeleted, StorageError, StoreAway

POLL_SECONDS: Final = 0.5
RETRY_SECONDS: Final = 2.0
LONGEST_RETRY_SECONDS: Final = 15.0
PATIENCE_SECONDS: Final = 300.0
STORAGE_FAULTS: Final = (SQLAlchemyError, StorageInternalError)  # what Optuna raises where the database fails

# SQLite's answers that waiting does not change: a full disk; a file that is read-only, damaged, or gone.
_FINAL_CODES: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
}

_OPTUNA_HAS_NO_RECORD: Final = "Record does not exist."

Answer = TypeVar("Answer")


class Retry:
    """Retries calls to one store.

    Args:
        store: its name in messages.
        patience: seconds that it may be away before it counts as lost.
        clock: seconds, monotonic.
    """

    def __init__(
        self, store: str, patience: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._patience = patience
        self._clock = clock
        self._away_since: float | None = None
        self._pause = RETRY_SECONDS
        self._next_try = float("-inf")
        self._error: Exception | None = None

    def call(self, function: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Call the store, which may be made to repeat the call. While it is away, try now and then only.

        Returns:
            the answer, or `otherwise` where the store did not give one.
        """
        if self._clock() < self._next_try:
            return otherwise
        try:
            answer = function()
        except (StorageError, KeyError, *STORAGE_FAULTS) as fault:
            error = _deleted(fault) if isinstance(fault, KeyError) else fault
            now = self._clock()
            self._away_since = now if self._away_since is None else self._away_since
            self._next_try, self._pause = now + self._pause, min(2 * self._pause, LONGEST_RETRY_SECONDS)
            self._error = error
            return otherwise
        self._away_since, self._pause, self._next_try = None, RETRY_SECONDS, float("-inf")
        return answer

    def succeeds(self, function: Callable[[], object]) -> bool:
        """Call the store and return whether it answered."""
        return self.call(lambda: (function(), True)[1], False)

    def wait(self, function: Callable[[], Answer], give_up: Callable[[], bool]) -> Answer | None:
        """Call the store until it answers; None once `give_up` says so.

        Raises:
            StorageError: the store is lost.
        """
        answers: list[Answer] = []
        while not self.succeeds(lambda: answers.append(function())):
            if self.loss:
                raise self.loss
            if give_up():
                return None
            time.sleep(POLL_SECONDS)
        return answers[0]

    @property
    def loss(self) -> StorageError | None:
        """What to tell the user once the store is lost: away for longer than the patience, or for good."""
        if self._away_since is None or self._error is None:
            return None
        if isinstance(self._error, StudyDeletedError | RunDeleted):
            return self._error
        seconds, final = self._clock() - self._away_since, _is_final(self._error)
        if not final and seconds < self._patience:
            return None
        kept = "Nothing is lost: the trial logs keep what it did not get. Fix it, and start the same command again."
        if final and isinstance(self._error, StorageError):
            return StorageError(f"{self._error} {kept}")
        since = "" if final else f" for {seconds:.0f} s"
        return StorageError(f"Cannot write to {self._store}{since}: {brief(self._error)}. {kept}")


class StudyDeletedError(StorageError):
    """A study, or trials of it, were deleted while it was driven."""


def _deleted(fault: KeyError) -> StudyDeletedError:
    if fault.args != (_OPTUNA_HAS_NO_RECORD,):
        raise fault
    return StudyDeletedError(
        "Cannot go on with the study: somebody deleted it, or trials of it, in its storage. Start the sweep again: "
        "where the study is gone, that makes a new one."
    )


def _is_final(error: Exception) -> bool:
    if isinstance(error, StorageError):
        return not isinstance(error, StoreAway)
    code = getattr(_origin(error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _FINAL_CODES


def _origin(error: BaseException) -> BaseException:
    """The database driver's own error, out of Optuna's and SQLAlchemy's wrapping."""
    if isinstance(error, StorageInternalError) and error.__cause__:
        return _origin(error.__cause__)
    return error.orig if isinstance(error, DBAPIError) and error.orig else error


def brief(error: BaseException) -> str:
    """The first line of the error, without any wrapping."""
    origin = _origin(error)
    if isinstance(origin, OSError) and origin.strerror:
        return origin.strerror
    return (str(origin).strip() or type(origin).__name__).splitlines()[0].rstrip(".")
