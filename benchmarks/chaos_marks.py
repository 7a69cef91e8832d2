"""What a sweep has reached, read from outside: from its trials' work folders and its leases."""

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from agnews_lora.search.trial_log import FILE

Mark = tuple[str, str]  # (trial, `step 6`, `checkpoint-6`, `evaluation 6`, `adapter` or `end`): something was reached

_KINDS: Final = {"TrainPoint": "step", "EvalPoint": "evaluation"}


@dataclass
class Folder:
    """The work folders of a sweep's trials, as they are seen from outside. folder: the project's."""

    folder: Path
    sweep: str
    _known: dict[Path, tuple[int, set[Mark]]] = field(default_factory=dict)

    def trials(self) -> list[Path]:
        return list((self.folder / "mlruns" / "work" / self.sweep).glob("*/t*"))

    def marks(self) -> set[Mark]:
        """All that can be seen to have been reached, of trials that have not been removed."""
        return {mark for trial in self.trials() for mark in self._marks_of(trial)}

    def checkpoints(self) -> dict[str, int]:
        """{trial: step of its newest checkpoint}."""
        steps = {trial.name: [*map(_checkpoint_step, _names(trial))] for trial in self.trials()}
        return {trial: max(step for step in found if step) for trial, found in steps.items() if any(found)}

    def holder(self, trial: str) -> str | None:
        """The owner of the trial's lease."""
        database = self.folder / "mlruns" / "optuna.db"
        try:
            with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
                query = "SELECT owner FROM agnews_lora_leases WHERE name = ?"
                return cast(str, (connection.execute(query, (trial,)).fetchone() or [None])[0])
        except sqlite3.OperationalError:  # locked, or left by a kill in the midst of writing
            return None

    def _marks_of(self, trial: Path) -> set[Mark]:
        found = {(trial.name, name) for name in _names(trial) if name == "adapter" or _checkpoint_step(name)}
        return found | self._lines_of(trial)

    def _lines_of(self, trial: Path) -> set[Mark]:
        path = trial / FILE
        try:
            size = path.stat().st_size
            if path in self._known and self._known[path][0] == size:
                return self._known[path][1]
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        except OSError:  # removed meanwhile
            return set()
        marks = set()
        for line in lines:
            [(kind, entry)] = json.loads(line).items()
            marks.add((trial.name, f"{_KINDS[kind]} {entry['step']}" if kind in _KINDS else "end"))
        self._known[path] = (size, marks)
        return marks


def _names(trial: Path) -> list[str]:
    try:
        return [path.name for path in trial.iterdir()]
    except OSError:
        return []


def _checkpoint_step(name: str) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None
