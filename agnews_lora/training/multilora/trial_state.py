"""One trial's state apart from any slot: its progress, its checkpoints, and its tensors in PEFT's format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agnews_lora.adapters.adapter_files import AdapterRecord, save_adapter, verify
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.errors import TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.data_order import batches
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrainSettings, TrialPlan, timestamp
from agnews_lora.training.metrics import accuracy, macro_f1, mean_cross_entropy, packed, require_finite
from agnews_lora.training.model import build_model
from agnews_lora.training.multilora.model import SlotBatch
from agnews_lora.training.multilora.optimizer import linear_rate
from agnews_lora.training.multilora.slots import SlotState

TENSORS = "slot.safetensors"
PROGRESS = "progress.json"


@dataclass
class TrainProgress:
    """Everything that changes from step to step beside the tensors; part of each checkpoint.

    loss_sum, loss_batches: of the batches since the last point of the training loss. evaluated: step of the last
    evaluation that was reported.
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_batches: int = 0
    evaluated: int = 0


@dataclass
class TrialState:
    """A plan that is being trained.

    lengths: tokens of each training row. saved: the progress in the last checkpoint, if there is one.
    """

    plan: TrialPlan
    settings: TrainSettings
    lengths: Sequence[int]
    progress: TrainProgress
    saved: TrainProgress | None = None
    final: EvalPoint | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    _epoch: tuple[int, list[list[int]]] = (-1, [])

    def __post_init__(self) -> None:
        if self.plan.checkpoint == checkpoints.folder_of(self.plan.folder, self.progress.step):
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

    def due(self, ahead: int = 0) -> bool:
        """Tell whether an evaluation is due before the next step; ahead: steps taken that are not counted yet."""
        step = self.progress.step + ahead
        return step > self.progress.evaluated and (step == self.total_steps or step % self.settings.eval_every == 0)

    @property
    def changed(self) -> bool:
        """Whether the last checkpoint is out of date, or there is none."""
        return self.saved != self.progress

    def batch(self, slot: int, ahead: int = 0) -> SlotBatch:
        """The next step, in a slot; ahead: steps taken that are not counted yet."""
        step = self.progress.step + ahead
        epoch, position = divmod(step, self.steps_per_epoch)
        return SlotBatch(slot, self._batches(epoch)[position], self._rate(step), step + 1, self.plan.seed)

    def advance(self, loss: float, gradient_norm: float, seconds: float) -> None:
        """Count a step that was taken.

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
        """The point of an evaluation.

        Args:
            logits: [rows, classes].
            labels: [rows].
            seconds: wall time that the evaluation took.

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
            right=packed(predicted == labels),
        )

    @property
    def log_due(self) -> bool:
        """Whether a point of the training loss is due: at every `log_every`th step and at the last."""
        return self.ended or self.progress.step % self.settings.log_every == 0

    def take_points(self) -> list[TrainPoint]:
        """The training loss over the batches since the last point: one point, or none where there are no batches."""
        progress = self.progress
        if not progress.loss_batches:
            return []
        loss = progress.loss_sum / progress.loss_batches
        progress.loss_sum, progress.loss_batches = 0.0, 0
        return [TrainPoint(self.plan.trial, progress.step, loss, self._rate(progress.step - 1), timestamp())]

    def rows_seen(self) -> int:
        """Training rows of all steps done, counted once an epoch."""
        epoch, position = divmod(self.progress.step, self.steps_per_epoch)
        begun = self._batches(epoch)[:position] if position else []
        return epoch * len(self.lengths) + sum(map(len, begun))

    def _require_finite(self, name: str, value: float) -> None:
        require_finite(name, value, self.progress.step, self.plan.spec)

    def _rate(self, step: int) -> float:
        warmup = round(self.settings.warmup * self.total_steps)
        return self.plan.spec.learning_rate * linear_rate(step, warmup, self.total_steps)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, batches(self.lengths, self.settings.batch_size, self.plan.seed, epoch))
        return self._epoch[1]


# Checkpoints ---------------------------------------------------------------------------------------------------------


def write_checkpoint(plan: TrialPlan, progress: TrainProgress, state: SlotState) -> None:
    """Write a sealed checkpoint into the trial's folder, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {f"{kind}/{name}": t for kind, own in state._asdict().items() for name, t in own.items()}
    described = {"spec": asdict(plan.spec), "seed": plan.seed, "progress": asdict(progress)}
    with checkpoints.written(plan.trial, plan.folder, progress.step) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / PROGRESS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(plan: TrialPlan) -> tuple[TrainProgress, SlotState]:
    """Read `plan.checkpoint`, as `write_checkpoint` wrote it.

    Raises:
        TrainingError: not a checkpoint of this engine, damaged, or another trial's.
    """
    folder = plan.checkpoint
    assert folder is not None
    try:
        described = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        spec, seed, progress = described["spec"], described["seed"], TrainProgress(**described["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"Cannot resume from {folder}: it is no sound checkpoint of engine multilora ({error}). Use the engine "
            "that wrote it, or start the trial again."
        ) from error
    if (spec, seed) != (asdict(plan.spec), plan.seed):
        raise TrainingError(
            f"Cannot resume {plan.trial} ({plan.spec}, seed {plan.seed}) from {folder}: it is the checkpoint of "
            f"another trial ({spec}, seed {seed}). Start the trial again."
        )
    kinds = [
        {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
        for kind in SlotState._fields
    ]
    return progress, SlotState(*kinds)


# Tensors in PEFT's format --------------------------------------------------------------------------------------------


def fresh_weights(base: BaseModel, plan: TrialPlan, num_labels: int) -> dict[str, Tensor]:
    """Draw {PEFT's name: tensor} of a trial before its first step, by the code that the reference engine uses.

    Raises:
        BudgetError: the built trainable tensors do not count as many as the budget was checked with.
    """
    model = build_model(base, plan.spec, num_labels, plan.seed)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def export_adapter(base: BaseModel, plan: TrialPlan, record: AdapterRecord, weights: Mapping[str, Tensor]) -> Path:
    """Write a trial's adapter in PEFT's format, read it back and recount it; its folder.

    Raises:
        AdapterError: the file does not hold `weights` bit for bit, or does not recount.
    """
    model = build_model(base, plan.spec, len(record.labels), plan.seed)
    set_peft_model_state_dict(model, dict(weights))
    folder = plan.folder / "adapter"
    save_adapter(model, record, folder)
    verify(folder, weights)
    return folder
