"""A registered version, and the project's own champion read without MLflow, whose import takes long."""

import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from agnews_lora.paths import RUNS_DATABASE, read_database

CANDIDATE: Final = "candidate"
CHAMPION: Final = "champion"
PREVIOUS: Final = "previous"
REPORT: Final = "report"  # of a promotion, `.md` and `.json`


@dataclass(frozen=True)
class Version:
    """A registered version, as it was when it was read. run_id: the run that trained it."""

    model: str
    number: int
    run_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        return f"version {self.number} of {self.model}"


@dataclass(frozen=True)
class LocalVersion:
    """A version and where its files lie, below the stores."""

    version: Version
    place: Path

    def folder(self, version: Version) -> Path:
        """Folder of the files, as `Registry.folder`."""
        assert version == self.version, "it knows one version"
        return self.place


def local_champion(stores: Path, model: str) -> LocalVersion | None:
    """Read the champion from a folder of stores; None where it has to be asked of MLflow, which says what is wrong."""
    with suppress(OSError, sqlite3.Error), read_database(stores / RUNS_DATABASE) as database:
        aliases = database.execute("SELECT alias, version FROM registered_model_aliases WHERE name = ?", (model,))
        numbers: dict[str, int] = dict(aliases.fetchall())
        named = model, numbers.get(CHAMPION)
        row = database.execute("SELECT run_id, source FROM model_versions WHERE name = ? AND version = ?", named)
        tags = database.execute("SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?", named)
        for run_id, source in row:
            if (place := own_folder(stores, source)) is not None:
                own = tuple(alias for alias in numbers if numbers[alias] == numbers[CHAMPION])
                return LocalVersion(Version(model, numbers[CHAMPION], run_id, dict(tags.fetchall()), own), place)
    return None


def own_folder(stores: Path, uri: str) -> Path | None:
    """The folder of artifacts that a store records; None where it lies elsewhere, as after a move, or is gone."""
    folder = Path(unquote(urlsplit(uri).path))
    return folder if folder.is_relative_to(stores.resolve()) and folder.is_dir() else None
