"""What a run measured, by metric and step."""

from dataclasses import dataclass, field
from typing import Final

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from agnews_lora.training.interface import EvalPoint, TrainPoint

METRICS: Final = ("train/loss", "train/learning_rate", "eval/accuracy", "eval/macro_f1", "eval/loss")


@dataclass
class RecordedRun:
    """A run being written, or read. began: in ms since 1970. points: all it has; buffer: those not yet in the store."""

    run_id: str
    began: int
    points: dict[tuple[str, int], Metric] = field(default_factory=dict)
    buffer: list[Metric] = field(default_factory=list)

    @classmethod
    def read(cls, client: MlflowClient, run: Run) -> "RecordedRun":
        """A run with all points that are in the store."""
        histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
        points = {(metric.key, metric.step): metric for history in histories for metric in history}
        return cls(run.info.run_id, run.info.start_time, points)

    def add(self, key: str, value: float, step: int, timestamp: int) -> None:
        """Take a point down, unless it is known."""
        if (key, step) not in self.points:
            self.points[key, step] = Metric(key, value, timestamp, step)
            self.buffer.append(self.points[key, step])

    def curve(self, trial: str) -> pd.DataFrame:
        """One row a step, ascending, with columns `trial`, `step` and those of `METRICS`; NaN: not measured."""
        steps = sorted({step for key, step in self.points if key in METRICS})
        columns = {key: [_value(self.points.get((key, step))) for step in steps] for key in METRICS}
        return pd.DataFrame({"trial": [trial] * len(steps), "step": steps, **columns})

    def times(self) -> list[float]:
        """The run's beginning and the time of every point of `METRICS`, ascending, in seconds since 1970."""
        stamps = {point.timestamp for (key, _), point in self.points.items() if key in METRICS}
        return [stamp / 1000 for stamp in sorted({self.began, *stamps})] if self.run_id else []


def metrics_of(point: TrainPoint | EvalPoint) -> dict[str, float]:
    """What a point measured, by MLflow's names."""
    if isinstance(point, EvalPoint):
        return {"eval/accuracy": point.accuracy, "eval/macro_f1": point.macro_f1, "eval/loss": point.loss}
    return {"train/loss": point.loss, "train/learning_rate": point.learning_rate}


def _value(point: Metric | None) -> float:
    return float("nan") if point is None else point.value
