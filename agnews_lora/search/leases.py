"""Who works on what: leases in the study's own database, so that what a dead process held is found and taken on.

A lease is a row (study, name, owner, beat). Its owner raises the beat every few seconds. Whoever else waits watches the
row by a clock of its own: one that has not changed over `STALE_SECONDS` of watching is removed, and what it stood for
is free. No clock of another machine is ever read, and it works with every database that SQLAlchemy speaks to.

Where a death is known otherwise (the process was reaped, or a lock that it shared is free), `revoke` need not wait.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    delete,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

BEAT_SECONDS: Final = 3.0
STALE_SECONDS: Final = 30.0
SURE_SECONDS: Final = 20.0  # so long after a beat nobody can have taken a lease over, with room for one that was late
QUEUE: Final = "queue"  # held while a trial is taken: one process at a time
SUPERVISOR: Final = "supervisor"  # held by the `sweep` that opened the study
_POLL_SECONDS: Final = 0.02

_LEASES = Table(
    "agnews_lora_leases",
    MetaData(),
    Column("study", Integer, primary_key=True, autoincrement=False),
    Column("name", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("beat", Integer, nullable=False),
)


def create_table(engine: Engine) -> None:
    """Make the table where there is none; another process may be doing the same."""
    try:
        _LEASES.create(engine, checkfirst=True)
    except (IntegrityError, ProgrammingError):  # PostgreSQL's two answers to losing that race
        if not inspect(engine).has_table(_LEASES.name):
            raise


@dataclass
class _Seen:
    """A lease of somebody else as it was last seen. watched_seconds: for how long it has been seen unchanged."""

    owner: str
    beat: int
    watched_seconds: float = 0.0


class Leases:
    """The leases of one study, as one owner sees and holds them.

    engine: of the study's storage. owner: unique to this process in the life of the database. clock: seconds,
    monotonic. Every method may raise SQLAlchemyError where the database does not answer.
    """

    def __init__(self, engine: Engine, study_id: int, owner: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.owner = owner
        self._engine = engine
        self._study_id = study_id
        self._clock = clock
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._guard = threading.Lock()  # the heart beats in a thread of its own
        self._watched: dict[str, _Seen] = {}
        self._looked = clock()
        self._confirmed = clock()

    @classmethod
    def of(cls, study: optuna.Study, owner: str) -> Self:
        """The leases of a study, in the database that stores it."""
        storage: Any = study._storage
        backend: RDBStorage = getattr(storage, "_backend", storage)  # behind Optuna's cache
        return cls(backend.engine, study._study_id, owner)

    def take(self, name: str) -> bool:
        """Whether the lease is this owner's now: it was free, or its own already."""
        owner = self.holder(name)
        if owner is None:
            row = {"study": self._study_id, "name": name, "owner": self.owner, "beat": 0}
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(_LEASES).values(row))
            except IntegrityError:  # somebody was faster
                return False
        elif owner != self.owner:
            return False
        with self._guard:
            self._held.add(name)
            self._lost.discard(name)
        return True

    def contend(self, name: str) -> bool:
        """Take a lease, from a dead holder too (in `STALE_SECONDS`); False once its holder shows that it lives."""
        first = self._rows().get(name)
        while not self.take(name):
            if self._rows().get(name) not in (first, None):
                return False
            time.sleep(BEAT_SECONDS)
            self.beat()
        return True

    def release(self, name: str) -> None:
        """Let go of a lease, if it is still this owner's."""
        self.forget(name)
        self._remove(_LEASES.c.name == name, _LEASES.c.owner == self.owner)

    def forget(self, name: str) -> None:
        """Believe no more that it is held."""
        with self._guard:
            self._held.discard(name)
            self._lost.discard(name)

    def lose(self, name: str) -> None:
        """Know by other means that somebody else has taken it over."""
        with self._guard:
            self._held.discard(name)
            self._lost.add(name)

    def revoke(self, owner_prefix: str) -> None:
        """Remove all leases of owners that are known to be dead."""
        self._remove(_LEASES.c.owner.startswith(owner_prefix, autoescape=True))

    def holder(self, name: str) -> str | None:
        """Who holds a lease."""
        return self.holders().get(name)

    def holders(self) -> dict[str, str]:
        """{name: owner} of all leases of the study."""
        return {name: owner for name, (owner, _) in self._rows().items()}

    def sure(self) -> bool:
        """Whether what is held, and not lost, is held for certain: its last beat is not long ago."""
        return self._clock() - self._confirmed < SURE_SECONDS

    @property
    def lost(self) -> set[str]:
        """Names that somebody else took over, since this process gave no sign of life for too long."""
        with self._guard:
            return set(self._lost)

    @contextmanager
    def queue(self, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Hold the right to take a trial; waited for until `give_up` says so, and then False is yielded."""
        while not (taken := self.take(QUEUE)) and not give_up():
            time.sleep(_POLL_SECONDS)
        try:
            yield taken
        finally:
            if taken:
                self.release(QUEUE)

    def beat(self) -> None:
        """Raise the beat of what is held, notice what was lost, and remove what others have let go stale."""
        began = self._clock()
        with self._engine.begin() as connection:
            mine = and_(_LEASES.c.study == self._study_id, _LEASES.c.owner == self.owner)
            connection.execute(update(_LEASES).where(mine).values(beat=_LEASES.c.beat + 1))
        with self._guard:
            believed = set(self._held)  # before reading: what is taken meanwhile is no loss
        rows = self._rows()
        mine_now = {name for name, (owner, _) in rows.items() if owner == self.owner}
        with self._guard:
            self._lost |= (believed & self._held) - mine_now
            self._confirmed = began
        self._watch({name: row for name, row in rows.items() if row[0] != self.owner})

    def forget_watch(self) -> None:
        """Start watching anew: the database was away, so that nobody could give a sign of life."""
        self._watched.clear()

    def _watch(self, others: dict[str, tuple[str, int]]) -> None:
        now = self._clock()
        # A look that comes late (this process was paused, or the database hung) counts no more than one in time: the
        # others may have been kept from writing just as long.
        passed = min(now - self._looked, 2 * BEAT_SECONDS)
        self._looked = now
        watched = {}
        for name, (owner, beat) in others.items():
            seen = self._watched.get(name)
            if seen is None or (seen.owner, seen.beat) != (owner, beat):
                seen = _Seen(owner, beat)
            else:
                seen.watched_seconds += passed
            if seen.watched_seconds >= STALE_SECONDS:
                self._remove(_LEASES.c.name == name, _LEASES.c.owner == owner, _LEASES.c.beat == beat)
            else:
                watched[name] = seen
        self._watched = watched

    def _rows(self) -> dict[str, tuple[str, int]]:
        query = select(_LEASES.c.name, _LEASES.c.owner, _LEASES.c.beat).where(_LEASES.c.study == self._study_id)
        with self._engine.connect() as connection:
            return {name: (owner, beat) for name, owner, beat in connection.execute(query)}

    def _remove(self, *conditions: object) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(_LEASES).where(_LEASES.c.study == self._study_id, *conditions))  # type: ignore[arg-type]


class Heart:
    """Beats for a process in a thread of its own, for as long as it is inside the context."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(BEAT_SECONDS)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._leases.beat()
            except SQLAlchemyError:  # the runner meets it as well, and decides how long to wait
                self._leases.forget_watch()
