"""Where a benchmark of the search records what it need not keep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search.trial_log import End, Point
from agnews_lora.training.interface import EvalPoint, TrainPoint


class Nowhere:
    """Implements `Tracker` and `Screen`; keeps nothing."""

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        return run_id or f"run-of-{trial}"

    def log_points(self, trial: str, points: Sequence[Point]) -> None: ...

    def finish_trial(self, trial: str, end: End) -> None: ...

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None: ...

    def fetch_checkpoints(self, trial: str, folder: Path) -> None: ...

    def trial_started(self, trial: str, label: str, total_steps: int) -> None: ...

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> None: ...

    def message(self, text: str) -> None: ...

    def trial_ended(self, trial: str, state: str, accuracy: float | None, reason: str | None) -> None: ...
