"""The interface of training: plans in, points and results out.

Plain frozen dataclasses and Protocols of the standard library, so that the training core runs where neither Optuna nor
MLflow is installed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Literal, Protocol

from agnews_lora.adapters.spec import TrialSpec

Precision = Literal["auto", "fp32", "bf16"]
RunState = Literal["COMPLETE", "PRUNED", "FAILED", "INTERRUPTED"]
Objective = Literal["accuracy", "macro_f1"]
SCORES: Final[dict[Objective, str]] = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
"""The scores of an evaluation that a sweep may search by, with their names in texts."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings that all trials of a sweep share.

    epochs: passes over the training rows. batch_size, eval_batch_size: rows. max_length: tokens, special ones included.
    eval_every: steps between two evaluations on the way. eval_rows: size of the fixed stratified subset of the
    validation split that those use (the last evaluation uses the whole split). log_every: steps between two points of
    the training loss; the end of a trial adds one more. warmup: share of all steps over which the learning rate rises
    linearly to its peak, before it falls linearly to zero. weight_decay: AdamW's. max_grad_norm: clipping norm over all
    trainable parameters. base_dropout: dropout inside the frozen base while training. precision: `auto` is bf16 where
    the device computes in it, else fp32.
    """

    epochs: int
    batch_size: int
    eval_batch_size: int
    max_length: int
    eval_every: int
    eval_rows: int
    log_every: int
    warmup: float
    weight_decay: float
    max_grad_norm: float
    base_dropout: float
    precision: Precision


@dataclass(frozen=True)
class TrialPlan:
    """One trial to train or to resume.

    trial: id (`t0007`). seed: of initialisation, dropout and data order. folder: the trial's own work folder, created
    by the engine. checkpoint: a sound one (`checkpoints.newest`) of the same trial and engine to resume from, or None
    to start at step 0.
    """

    trial: str
    spec: TrialSpec
    seed: int
    folder: Path
    checkpoint: Path | None = None


def timestamp() -> int:
    """Read the clock in ms since 1970, the unit of every point's `timestamp`."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class TrainPoint:
    """Training loss (mean over the batches since the last point) and learning rate at a step; timestamp in Unix ms."""

    trial: str
    step: int
    loss: float
    learning_rate: float
    timestamp: int


@dataclass(frozen=True)
class EvalPoint:
    """Scores on `rows` validation rows after `step` steps. final: whole validation split, at the last step.

    right: which of them were answered correctly, in the order in which they were scored (`metrics.packed`); empty where
    an earlier release wrote the point.
    """

    trial: str
    step: int
    accuracy: float
    macro_f1: float
    loss: float
    rows: int
    final: bool
    timestamp: int
    right: str = ""

    def score(self, objective: Objective) -> float:
        """The score that a sweep searches by."""
        return self.accuracy if objective == "accuracy" else self.macro_f1


class Verdict(Enum):
    """The observer's decision after an evaluation."""

    CONTINUE = "continue"
    PRUNE = "prune"


@dataclass(frozen=True)
class TrialResult:
    """A trial that ended: at its last step (`final` is set), or pruned on the way (`final` is None).

    adapter: folder with the adapter of the last step in PEFT's format (None for a pruned trial). rows_seen: training
    rows, counted once an epoch. train_seconds, eval_seconds: wall time of this process inside training steps and
    evaluations. peak_memory_bytes: of the process (CPU) or of the device (CUDA).
    """

    trial: str
    steps: int
    total_steps: int
    final: EvalPoint | None
    adapter: Path | None
    trainable_parameters: int
    rows_seen: int
    train_seconds: float
    eval_seconds: float
    peak_memory_bytes: int


COSTS: Final = ("rows_seen", "train_seconds", "eval_seconds", "peak_memory_bytes")
"""Fields of a `TrialResult` that its run and the sweep result show as costs."""


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended, for its run and its study.

    state: of the run. reason: one line. report: in full, of a failed trial.
    """

    state: RunState
    result: TrialResult | None = None
    reason: str | None = None
    report: str | None = None


class TrialSource(Protocol):
    """Gives an engine its trials."""

    def next(self) -> TrialPlan | None:
        """Give the next trial, or None if there is none to start now. Asked again at every free slot and evaluation."""
        ...


class Observer(Protocol):
    """Receives an engine's reports, and may prune a trial or stop them all.

    A StorageError that it raises is no trial's fault: the engine raises it on, and reports no trial as failed.
    """

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        """Give one verdict per point: all trials due now are judged together. A final point's verdict is not read."""
        ...

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        """Learn of a sealed checkpoint at `path`: before each evaluation, and for every started trial at a stop.

        Called once a step, and once more if the stop finds the trial at a step that has its checkpoint already.
        """
        ...

    def finished(self, result: TrialResult) -> None: ...

    def failed(self, trial: str, error: Exception) -> None: ...

    def stop_requested(self) -> bool:
        """Tell whether to stop. Polled every step: once true, the engine checkpoints its trials and returns."""
        ...


class Engine(Protocol):
    """Trains trials."""

    def run(self, source: TrialSource, observer: Observer) -> None:
        """Train the trials of `source` until all have ended and it gives None, or until a stop is requested.

        Raises:
            StorageError: a checkpoint cannot be written.
        """
        ...
