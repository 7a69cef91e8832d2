"""A trial's way through its steps, apart from any slot: what comes next, and what has been seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agnews_lora.errors import TrainingError
from agnews_lora.training.checkpoints import folder_of
from agnews_lora.training.data_order import batches
from agnews_lora.training.evaluation import accuracy, macro_f1, mean_cross_entropy
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrainSettings, TrialPlan, TrialResult, timestamp
from agnews_lora.training.multilora.model import SlotBatch
from agnews_lora.training.multilora.optimizer import linear_rate


@dataclass
class Progress:
    """What changes from step to step, and goes into a checkpoint.

    loss_sum, loss_batches: of the batches since the last point of the training loss. evaluated: step of the last
    evaluation that was reported.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_batches: int = 0
    evaluated: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `Progress(**d)` is its inverse."""
        return asdict(self)


@dataclass
class Trial:
    """A plan under way. lengths: tokens of each training row. saved: the progress in its last checkpoint, if any."""

    plan: TrialPlan
    settings: TrainSettings
    lengths: Sequence[int]
    progress: Progress
    saved: Progress | None = None
    final: EvalPoint | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    _epoch: tuple[int, list[list[int]]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.plan.checkpoint == folder_of(self.plan.folder, self.progress.step):
            self.saved = replace(self.progress)

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.lengths) / self.settings.batch_size)

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def ended(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step == self.total_steps

    @property
    def due(self) -> bool:
        """Whether an evaluation is due before the next step."""
        step = self.progress.step
        return step > self.progress.evaluated and (self.ended or step % self.settings.eval_every == 0)

    @property
    def changed(self) -> bool:
        """Whether its last checkpoint says something else, or there is none."""
        return self.saved != self.progress

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return self._rate(self.progress.step)

    def batch(self, slot: int) -> SlotBatch:
        """The next step, in a slot."""
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        rows = self._batches(epoch)[position]
        return SlotBatch(slot, rows, self.learning_rate, self.progress.step + 1, self.plan.seed)

    def advance(self, loss: float, gradient_norm: float, seconds: float) -> None:
        """Take down a step that was done.

        Raises:
            TrainingError: its loss or gradient is not finite.
        """
        self.progress.step += 1
        self.train_seconds += seconds
        self._require_finite("training loss", loss)
        self._require_finite("gradient's norm", gradient_norm)
        self.progress.loss_sum += loss
        self.progress.loss_batches += 1

    def score(self, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], seconds: float) -> EvalPoint:
        """The point of an evaluation: logits [rows, classes], labels [rows].

        Raises:
            TrainingError: the loss is not finite.
        """
        self.eval_seconds += seconds
        loss = mean_cross_entropy(logits, labels)
        self._require_finite("validation loss", loss)
        predicted = logits.argmax(axis=-1)
        return EvalPoint(
            trial=self.plan.trial,
            step=self.progress.step,
            accuracy=accuracy(predicted, labels),
            macro_f1=macro_f1(predicted, labels),
            loss=loss,
            rows=len(labels),
            final=self.ended,
            timestamp=timestamp(),
        )

    def point_if_due(self) -> TrainPoint | None:
        """The point of the training loss, at every `log_every`th step and at the last."""
        return self.point() if self.ended or self.progress.step % self.settings.log_every == 0 else None

    def point(self) -> TrainPoint | None:
        """The point over the batches since the last one, or None where there are none."""
        progress = self.progress
        if not progress.loss_batches:
            return None
        loss = progress.loss_sum / progress.loss_batches
        progress.loss_sum, progress.loss_batches = 0.0, 0
        return TrainPoint(self.plan.trial, progress.step, loss, self._rate(progress.step - 1), timestamp())

    def rows_seen(self) -> int:
        """Training rows of all steps done, counted once an epoch."""
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        seen = epoch * len(self.lengths)
        return seen + sum(len(rows) for rows in self._batches(epoch)[:position]) if position else seen

    def result(self, adapter: Path | None, trainable_parameters: int, peak_memory_bytes: int) -> TrialResult:
        """The trial as it ended: at its last step, or pruned (no adapter)."""
        return TrialResult(
            trial=self.plan.trial,
            steps=self.progress.step,
            total_steps=self.total_steps,
            final=self.final,
            adapter=adapter,
            trainable_parameters=trainable_parameters,
            rows_seen=self.rows_seen(),
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            peak_memory_bytes=peak_memory_bytes,
        )

    def _require_finite(self, name: str, value: float) -> None:
        if not isfinite(value):
            raise TrainingError(
                f"the {name} became {value} by step {self.progress.step} ({self.plan.spec}); a lower learning rate or "
                "alpha keeps it finite"
            )

    def _rate(self, step: int) -> float:
        warmup = round(self.settings.warmup * self.total_steps)
        return self.plan.spec.learning_rate * linear_rate(step, warmup, self.total_steps)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, batches(self.lengths, self.settings.batch_size, self.plan.seed, epoch))
        return self._epoch[1]
