"""The tracker that a study's runner is handed: what a trial did, as its run in MLflow, with its curves as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting import figures
from agnews_lora.search.journal import End
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.training.contracts import EvalPoint, TrainPoint


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
        if "study_trial" in facts:
            tags["study_trial"] = str(facts["study_trial"])
        with self.runs.reaching():
            return self.runs.start_trial(trial, self._names[trial], params, tags, run_id)

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        with self.runs.reaching():
            self.runs.log_points(trial, points)

    def finish_trial(self, trial: str, end: End) -> None:
        with self.runs.reaching(), TemporaryDirectory() as folder:
            if end.result is None:
                error = (end.report or end.reason) if end.state == "FAILED" else None
                tags = {} if end.state == "FAILED" else {"reason": end.reason or ""}
                self.runs.finish_trial(trial, end.state, tags=tags, error=error)
                return
            self.runs.finish_trial(
                trial,
                end.state,
                metrics={
                    "rows_seen": end.result.rows_seen,
                    "train_seconds": end.result.train_seconds,
                    "eval_seconds": end.result.eval_seconds,
                    "peak_memory_bytes": end.result.peak_memory_bytes,
                },
                tags={"reason": end.reason or ""},  # an earlier interruption may have left its own
                adapter=end.result.adapter,
                figures=self.curves(trial, Path(folder)),
            )

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None:
        with self.runs.reaching():
            self.runs.keep_checkpoint(trial, checkpoint)

    def fetch_checkpoints(self, trial: str, folder: Path) -> None:
        with self.runs.reaching():
            self.runs.fetch_checkpoints(trial, folder)

    def curves(self, trial: str, folder: Path) -> dict[str, Path]:
        """`accuracy_curve.png` and `loss_curve.png` of a trial, drawn into `folder`."""
        points = self.runs.curve(trial)
        drawn = {name: folder / name for name in ("accuracy_curve.png", "loss_curve.png")}
        figures.accuracy_curve(points, self._names[trial], drawn["accuracy_curve.png"])
        figures.loss_curve(points, self._names[trial], drawn["loss_curve.png"])
        return drawn
