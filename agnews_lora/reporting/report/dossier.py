"""What the stores say of one sweep, as plain values and data frames: all that a report is composed from.

trials: one row a trial of the search (not those that confirm others), in the columns that `reporting.figures` reads,
and `loss`, `macro_f1`, `lora_r`, `lora_alpha`, `lora_dropout`, `learning_rate`, `head`, `run_id`, `reason`,
`rows_seen`, `train_seconds`, `eval_seconds`, `peak_memory_bytes` (NaN or None where the run has none).

predictions: `row`, `label`, `predicted` (class names), then a column a class with its probability: a row a row of the
validation split. mistakes: `row`, `label`, `predicted`, `confidence`, `text`, the surest first.

confirmation: `trial`, `seeds` (runs counted in), `failed`, `own_accuracy`, `mean_accuracy`, `std_accuracy` (of a
sample), `drop`, `chosen`, `runs` (JSON: a list of `{trial, seed, accuracy}`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.experiment import Experiment
from agnews_lora.config.sweep import Sweep
from agnews_lora.serving.model_package import TestScore
from agnews_lora.tracking.reading import DatasetUse
from agnews_lora.tracking.registry import Version
from agnews_lora.training.interface import TrainSettings

# States of trials, and what they are called.
STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "INTERRUPTED": "stopped",
}


@dataclass(frozen=True)
class Registered:
    """The winner in the registry. checks: the gate's findings (`rule`, `found`, `passed`), where it was judged."""

    version: Version
    score: TestScore | None
    checks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Answers:
    """What the winner and the baseline say of every validation row, where that was kept."""

    winner: pd.DataFrame | None = None
    baseline: pd.DataFrame | None = None
    mistakes: pd.DataFrame | None = None


@dataclass(frozen=True)
class Dossier:
    """state: of the parent run (`COMPLETE`, `RUNNING`, `INTERRUPTED`). began, ended: in UTC; ended is None while it is
    under way, as_of the newest moment that the stores know of. asked: trials that are to have ended, where known.
    params, tags: the parent run's. files: the sweep's and the experiment's file, by name. experiment, definition: what
    those say, where this version can read them. winner, baseline: ids of trials, or None. pictures: PNG files by the
    name of what they show.
    """

    sweep: str
    study: str
    state: str
    began: datetime
    ended: datetime | None
    as_of: datetime
    params: Mapping[str, str]
    tags: Mapping[str, str]
    trials: pd.DataFrame
    asked: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    experiment: Experiment | None = None
    definition: Sweep | None = None
    settings: TrainSettings | None = None
    datasets: tuple[DatasetUse, ...] = ()
    shape: ModelShape | None = None
    winner: str | None = None
    baseline: str | None = None
    confirmation: pd.DataFrame | None = None
    answers: Answers = Answers()
    registered: Registered | None = None
    bound: float | None = None
    pictures: Mapping[str, Path] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Trainable parameters that a trial may have, head included."""
        return int(self.params["budget"])

    @property
    def is_complete(self) -> bool:
        return self.state == "COMPLETE"

    @property
    def best_called(self) -> str:
        """What the best trial may be called: there is a winner only once the sweep has ended."""
        return "winner" if self.is_complete else "best trial so far"

    def trial(self, name: str | None) -> Any:
        """The row of a trial, or None."""
        found = self.trials[self.trials["trial"] == name]
        return None if found.empty else next(found.itertuples())

    def count(self, state: str) -> int:
        """Trials in a state."""
        return int((self.trials["state"] == state).sum())

    def num_rows(self, context: str) -> int | None:
        """Rows of the data set that was used for something (`training`, `validation`), where the runs tell."""
        return next((used.num_rows for used in self.datasets if used.context == context), None)

    def complete(self) -> pd.DataFrame:
        """The trials that were trained to their end, the best first (ties: the lower loss, then the earlier)."""
        done = self.trials[self.trials["state"] == "COMPLETE"]
        return done.sort_values(["accuracy", "loss", "number"], ascending=[False, True, True])


def spec_of(row: Any) -> TrialSpec:
    """The adapter configuration of a trial's row."""
    return TrialSpec(
        targets=row.targets,
        rank=int(row.lora_r),
        alpha=float(row.lora_alpha),
        dropout=float(row.lora_dropout),
        learning_rate=float(row.learning_rate),
        head=row.head,
    )
