"""The tracker that a study's runner is handed: what a trial did, as its run in MLflow, with its curves as pictures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.search.trial_log import End
from agnews_lora.tracking.descriptions import trial_description
from agnews_lora.tracking.runs import RunPage, SweepRuns, description
from agnews_lora.training.interface import EvalPoint, TrainPoint


class Records:
    """Implements the runner's `Tracker` over `SweepRuns`.

    shared: params that every trial's run carries beside its own. Every call raises StorageError where the store cannot
    be read or written.
    """

    def __init__(self, runs: SweepRuns, shared: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.runs = runs
        self._shared = shared
        self._tags = tags
        self._names: dict[str, str] = {}
        self._cards: dict[str, Callable[[RunPage | None, End | None], str]] = {}
        self._run_ids: dict[str, str] = {}

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        self._names[trial] = f"{trial}-{spec.targets}-r{spec.rank}"
        params: dict[str, Any] = {
            "targets": spec.targets,
            "lora_r": spec.rank,
            "lora_alpha": f"{spec.alpha:g}",
            "lora_dropout": spec.dropout,
            "learning_rate": spec.learning_rate,
            "head": spec.head,
            **{key: facts[key] for key in ("trainable_parameters", "seed") if key in facts},
            **self._shared,
        }
        tags = {**self._tags, "baseline": str(facts["baseline"]).lower()}
        tags |= {key: str(facts[key]) for key in ("study_trial", "confirms") if key in facts}
        self._cards[trial] = partial(trial_description, spec, {**self._shared, **facts})
        with self.runs.reaching():
            tags |= description(self._cards[trial](None, None))
            self._run_ids[trial] = self.runs.start_trial(trial, self._names[trial], params, tags, run_id)
            return self._run_ids[trial]

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        with self.runs.reaching():
            self.runs.log_points(trial, points)

    def finish_trial(self, trial: str, end: End) -> None:
        card = description(self._cards[trial](self.runs.page(self._run_ids[trial]), end))
        with self.runs.reaching(), TemporaryDirectory() as folder:
            if end.result is None:
                error = (end.report or end.reason) if end.state == "FAILED" else None
                tags = {} if end.state == "FAILED" else {"reason": end.reason or ""}
                self.runs.finish_trial(trial, end.state, tags=tags | card, error=error)
                return
            curves = trial_curves(self.runs.curve(trial), self._names[trial], Path(folder))
            self.runs.finish_trial(
                trial,
                end.state,
                metrics={
                    "rows_seen": end.result.rows_seen,
                    "train_seconds": end.result.train_seconds,
                    "eval_seconds": end.result.eval_seconds,
                    "peak_memory_bytes": end.result.peak_memory_bytes,
                },
                tags={"reason": end.reason or "", **card},  # an earlier interruption may have left its own reason
                adapter=end.result.adapter,
                figures=curves,
            )

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None:
        with self.runs.reaching():
            self.runs.keep_checkpoint(trial, checkpoint)

    def fetch_checkpoints(self, trial: str, folder: Path) -> None:
        with self.runs.reaching():
            self.runs.fetch_checkpoints(trial, folder)
