"""What the tests of the search share."""

import sqlite3
from typing import Any

import sqlalchemy


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def no_wait_for_the_disk(connection: Any, record: Any) -> None:
    """Tests open many databases and survive no power cut: SQLite need not wait for the disk after every write."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
