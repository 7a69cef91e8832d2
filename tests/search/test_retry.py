"""The retry to a store: what is kept for later, how often it is tried, and when it counts as lost."""

import sqlite3
from collections.abc import Callable
from itertools import pairwise
from typing import NoReturn

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from agnews_lora.errors import StorageError, StoreAway
from agnews_lora.search.retry import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Retry

AWAY = StoreAway("the run store http://store cannot be reached (Connection refused)")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def raising(error: Exception) -> Callable[[], NoReturn]:
    def deliver() -> NoReturn:
        raise error

    return deliver


def database_error(code: int, text: str) -> StorageInternalError:
    """As it comes out of Optuna."""
    original = sqlite3.OperationalError(text)
    original.sqlite_errorcode = code
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("INSERT", None, original)
    return error


def test_deliveries_go_through() -> None:
    retry, got = Retry("the store"), []
    assert retry.succeeds(lambda: got.append(1))
    assert retry.call(lambda: 7, 0) == 7
    assert got == [1] and retry.loss is None


def test_while_it_is_away_it_is_tried_now_and_then_only() -> None:
    clock, tries = Clock(), []
    retry = Retry("the store", patience=1e9, clock=clock)

    def deliver() -> None:
        tries.append(clock.now)
        raise AWAY

    for tenth in range(1_000):
        clock.now = tenth / 10
        assert not retry.succeeds(deliver)
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[0] == pytest.approx(RETRY_SECONDS)
    assert max(gaps) == pytest.approx(LONGEST_RETRY_SECONDS)
    clock.now += LONGEST_RETRY_SECONDS
    assert retry.succeeds(lambda: None)
    assert retry.call(lambda: 1, 0) == 1


def test_it_is_lost_when_it_was_away_for_longer_than_the_patience() -> None:
    clock = Clock()
    retry = Retry("the store", patience=60, clock=clock)
    retry.succeeds(raising(AWAY))
    assert retry.loss is None
    clock.now = 61
    assert str(retry.loss).startswith("Cannot write to the store for 61 s: ")
    assert "Connection refused" in str(retry.loss) and "start the same command again" in str(retry.loss)
    assert retry.succeeds(lambda: None)
    assert retry.loss is None, "it came back after all"
    clock.now = 1_000
    retry.succeeds(raising(AWAY))
    assert retry.loss is None, "the patience counts anew"


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (StorageError("the disk is full"), True),
        (database_error(sqlite3.SQLITE_FULL, "database or disk is full"), True),
        (database_error(sqlite3.SQLITE_READONLY, "attempt to write a readonly database"), True),
        (database_error(sqlite3.SQLITE_BUSY, "database is locked"), False),
        (AWAY, False),
    ],
)
def test_what_waiting_does_not_mend_is_lost_at_once(error: Exception, final: bool) -> None:
    retry = Retry("the store", patience=60)
    assert not retry.succeeds(raising(error))
    assert (retry.loss is not None) == final
    if final:
        assert str(getattr(error.__cause__, "orig", error)) in str(retry.loss)


def test_a_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        Retry("the store").succeeds(raising(KeyError("trial")))
