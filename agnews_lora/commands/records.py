"""The tracker that a study's runner is handed: what a trial did, as its run in MLflow, with its curves as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting import figures
from agnews_lora.search.runner import RunState
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.training.contracts import EvalPoint, TrainPoint, TrialResult


class Records:
    """Implements the runner's `Tracker` over `SweepRuns`.

    shared: params that every trial's run carries beside its own.
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
        return self.runs.start_trial(trial, self._names[trial], params, tags, run_id)

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None:
        self.runs.log_points(trial, points)

    def finish_trial(self, trial: str, state: RunState, result: TrialResult | None, reason: str | None) -> None:
        if result is None:
            if state == "FAILED":
                self.runs.finish_trial(trial, state, error=reason)
            else:
                self.runs.finish_trial(trial, state, tags={"reason": reason or ""})
            return
        with TemporaryDirectory() as folder:
            self.runs.finish_trial(
                trial,
                state,
                metrics={
                    "rows_seen": result.rows_seen,
                    "train_seconds": result.train_seconds,
                    "eval_seconds": result.eval_seconds,
                    "peak_memory_bytes": result.peak_memory_bytes,
                },
                tags={"reason": reason or ""},  # an earlier interruption may have left its own
                adapter=result.adapter,
                figures=self.curves(trial, Path(folder)),
            )

    def curves(self, trial: str, folder: Path) -> dict[str, Path]:
        """`accuracy_curve.png` and `loss_curve.png` of a trial, drawn into `folder`."""
        points = self.runs.curve(trial)
        drawn = {name: folder / name for name in ("accuracy_curve.png", "loss_curve.png")}
        figures.accuracy_curve(points, self._names[trial], drawn["accuracy_curve.png"])
        figures.loss_curve(points, self._names[trial], drawn["loss_curve.png"])
        return drawn
