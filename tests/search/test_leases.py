"""Leases on real databases: one owner at a time, and a death that is noticed by watching alone."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError

from agnews_lora.search.leases import BEAT_SECONDS, STALE_SECONDS, SURE_SECONDS, Leases, create_table
from tests.servers import Postgres, postgres_missing

STUDY = 1


class Clock:
    """Goes on when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    if reason := postgres_missing():
        pytest.skip(reason)
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    with server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A database with an empty table of leases."""
    if request.param == "sqlite":
        made = create_engine(f"sqlite:///{tmp_path / 'optuna.db'}", connect_args={"timeout": 60})
    else:
        server: Postgres = request.getfixturevalue("postgres")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        made = create_engine(server.url.replace("postgresql://", "postgresql+psycopg://"))
    create_table(made)
    yield made
    with made.begin() as connection:
        connection.exec_driver_sql("DELETE FROM agnews_lora_leases")
    made.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mine(engine: Engine, clock: Clock) -> Leases:
    return Leases(engine, STUDY, "folder-a/1", clock)


@pytest.fixture
def theirs(engine: Engine, clock: Clock) -> Leases:
    return Leases(engine, STUDY, "folder-b/1", clock)


def test_one_owner_at_a_time(mine: Leases, theirs: Leases) -> None:
    assert mine.take("t0000")
    assert mine.take("t0000"), "it is its own already"
    assert not theirs.take("t0000")
    assert theirs.take("t0001")
    assert mine.holders() == {"t0000": "folder-a/1", "t0001": "folder-b/1"}
    theirs.release("t0000")  # not theirs to let go of
    assert mine.holder("t0000") == "folder-a/1"
    mine.release("t0000")
    assert theirs.take("t0000")


def test_studies_of_one_database_do_not_meet(engine: Engine, mine: Leases) -> None:
    other = Leases(engine, STUDY + 1, "folder-b/1")
    assert mine.take("t0000") and other.take("t0000")
    other.revoke("folder-a/")
    assert mine.holder("t0000") == "folder-a/1"


def test_of_many_that_want_it_one_gets_it(engine: Engine) -> None:
    owners = [Leases(engine, STUDY, f"owner/{number}") for number in range(8)]
    barrier, winners = threading.Barrier(len(owners)), []

    def contend(leases: Leases) -> None:
        barrier.wait()
        if leases.take("t0000"):
            winners.append(leases.owner)

    threads = [threading.Thread(target=contend, args=(leases,)) for leases in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [owners[0].holder("t0000")]


def test_whoever_beats_is_left_alone_for_ever(mine: Leases, theirs: Leases, clock: Clock) -> None:
    theirs.take("t0000")
    for _ in range(40):
        clock.now += BEAT_SECONDS
        theirs.beat()
        mine.beat()
    assert mine.holder("t0000") == "folder-b/1"


def test_whoever_does_not_is_removed_once_it_was_watched_for_long_enough(
    mine: Leases, theirs: Leases, clock: Clock
) -> None:
    theirs.take("t0000")
    mine.beat()
    while clock.now + BEAT_SECONDS < STALE_SECONDS:
        clock.now += BEAT_SECONDS
        mine.beat()
        assert mine.holder("t0000") == "folder-b/1"
    for _ in range(2):
        clock.now += BEAT_SECONDS
        mine.beat()
    assert mine.holder("t0000") is None
    assert mine.take("t0000")
    theirs.beat()
    assert theirs.lost == {"t0000"}
    assert mine.lost == set()


def test_a_watcher_that_was_away_itself_does_not_count_that_time(mine: Leases, theirs: Leases, clock: Clock) -> None:
    theirs.take("t0000")
    mine.beat()
    clock.now += 100 * STALE_SECONDS  # a database that hung for everybody, or a machine that slept
    mine.beat()
    assert mine.holder("t0000") == "folder-b/1"
    for _ in range(4):
        clock.now += BEAT_SECONDS
        mine.beat()
        mine.forget_watch()  # it did not answer
    assert mine.holder("t0000") == "folder-b/1"


def test_revoking_frees_all_that_a_folder_held(engine: Engine, mine: Leases, theirs: Leases) -> None:
    sibling = Leases(engine, STUDY, "folder-a/2")
    assert mine.take("t0000") and sibling.take("t0001") and theirs.take("t0002")
    theirs.revoke("folder-a/")
    assert theirs.holders() == {"t0002": "folder-b/1"}
    mine.beat()
    assert mine.lost == {"t0000"}
    mine.forget("t0000")
    assert mine.lost == set()


def test_it_is_sure_of_what_it_holds_for_a_while_after_each_beat(mine: Leases, clock: Clock) -> None:
    assert mine.sure()
    clock.now += SURE_SECONDS + 1
    assert not mine.sure()
    mine.beat()
    assert mine.sure()


def test_the_queue_is_for_one_and_given_up_when_told(mine: Leases, theirs: Leases) -> None:
    with mine.queue(lambda: False) as held:
        assert held
        with theirs.queue(lambda: True) as other:
            assert not other
    with theirs.queue(lambda: False) as held:
        assert held
    assert mine.holders() == {}


def test_a_living_supervisor_is_not_replaced(mine: Leases, theirs: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agnews_lora.search.leases.BEAT_SECONDS", 0.01)
    assert theirs.contend("supervisor")
    beating = threading.Timer(0.05, theirs.beat)
    beating.start()
    assert not mine.contend("supervisor")
    beating.join()


def test_a_dead_supervisor_is(mine: Leases, theirs: Leases, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert theirs.contend("supervisor")

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("agnews_lora.search.leases.time.sleep", sleep)
    assert mine.contend("supervisor")
    assert STALE_SECONDS <= clock.now < 2 * STALE_SECONDS


def test_a_database_that_is_gone_is_said_so(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'absent' / 'optuna.db'}")
    with pytest.raises(OperationalError):
        Leases(engine, STUDY, "folder-a/1").take("t0000")


def test_the_table_is_made_once_by_whoever_comes_first(engine: Engine) -> None:
    threads = [threading.Thread(target=create_table, args=(engine,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Leases(engine, STUDY, "folder-a/1").take("t0000")
