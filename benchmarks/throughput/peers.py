"""The ways to train trials that are measured.

Trainer + PEFT as a user would write it, one trial after another: shuffled rows, padded to the longest of their batch.
And the multi-LoRA engine. The reference engine (`training/trainer.py`) is no peer here, since it needs `evaluate`.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import get_peft_model
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from agnews_lora.adapters.adapter_files import load_base, lora_config
from agnews_lora.data.rows import LABELS
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import TrainingError
from agnews_lora.training.data_order import batches
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from agnews_lora.training.multilora.engine import MultiLoraEngine
from benchmarks.throughput.lab import Lab
from benchmarks.throughput.measurement import Peer


@dataclass(frozen=True)
class Span:
    """A trial's training after its warm-up steps: in s of `perf_counter`, and the rows and tokens trained."""

    began: float
    ended: float
    rows: int
    tokens: int


class Trials(Protocol):
    """A way to train trials."""

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Build, train, evaluate and export each of them."""
        ...


def trials_of(peer: Peer, lab: Lab) -> Trials:
    """The way in which a peer trains."""
    return TrainerTrials(lab, peer.bf16) if peer.kind == "trainer" else MultiLoraTrials(lab, peer.slots)


def now(device: torch.device) -> float:
    """`perf_counter`, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Trainer + PEFT -------------------------------------------------------------------------------------------------------


class StepClock(TrainerCallback):
    """Takes the time after the warm-up steps and after the last step."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.times: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.lab.warmup_steps, self.lab.steps):
            self.times[state.global_step] = now(self.lab.device)


class Padding:
    """Pads rows to the longest of their batch, as `DataCollatorWithPadding` does.

    tokens: real ones of every batch so far, those of the training steps first.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        self.tokens.append(sum(lengths))
        input_ids = torch.full((len(rows), max(lengths)), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[place, :length] = row["input_ids"]
            attention_mask[place, :length] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class TrainerTrials:
    """Trainer + PEFT, a new model for each trial."""

    def __init__(self, lab: Lab, bf16: bool) -> None:
        self.lab, self.bf16 = lab, bf16
        self.train_rows, self.validation_rows = _as_rows(lab.corpus.train), _as_rows(lab.corpus.validation)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        return [self._train(plan) for plan in plans]

    def _train(self, plan: TrialPlan) -> Span:
        lab = self.lab
        set_seed(plan.seed)
        model = get_peft_model(load_base(lab.base, len(LABELS)), lora_config(plan.spec, lab.base))
        clock, padding = StepClock(lab), Padding(lab.corpus.train.pad_id)
        trainer = Trainer(
            model,
            self._arguments(plan),
            data_collator=padding,
            train_dataset=self.train_rows,
            compute_metrics=_accuracy,
            callbacks=[clock],
        )
        trainer.train()
        trainer.evaluate(self.validation_rows)  # type: ignore[arg-type]
        model.save_pretrained(str(plan.folder), save_embedding_layers=False)
        del trainer, model
        gc.collect()  # Trainer and model hold each other: without this, two models could be on the device
        steps, warmup_steps = lab.steps, lab.warmup_steps
        rows = (steps - warmup_steps) * lab.settings.batch_size
        return Span(clock.times[warmup_steps], clock.times[steps], rows, sum(padding.tokens[warmup_steps:steps]))

    def _arguments(self, plan: TrialPlan) -> TrainingArguments:
        settings = self.lab.settings
        arguments = TrainingArguments(
            output_dir=str(plan.folder),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            learning_rate=plan.spec.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=self.bf16,
            use_cpu=self.lab.device.type == "cpu",
            seed=plan.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would spread one small trial over every GPU it sees
        return arguments


def _as_rows(table: TokenTable) -> list[dict[str, Any]]:
    return [
        {"input_ids": torch.from_numpy(table.row(row).astype(np.int64)), "labels": int(table.labels[row])}
        for row in range(len(table))
    ]


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float(np.mean(logits.argmax(axis=-1) == labels))}


# Multi-LoRA -----------------------------------------------------------------------------------------------------------


class Plans:
    """A source of some plans."""

    def __init__(self, plans: Iterable[TrialPlan]) -> None:
        self.plans = list(plans)

    def next(self) -> TrialPlan | None:
        return self.plans.pop(0) if self.plans else None


class PointClock:
    """An observer that takes the time of every trial's points after the warm-up steps and after the last step."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.times: dict[tuple[str, int], float] = {}
        self.results: list[TrialResult] = []
        self.errors: list[Exception] = []

    def logged(self, points: Sequence[TrainPoint]) -> None:
        marked = [point for point in points if point.step in (self.lab.warmup_steps, self.lab.steps)]
        if marked:
            at = now(self.lab.device)
            self.times |= {(point.trial, point.step): at for point in marked}

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return [Verdict.CONTINUE] * len(points)

    def checkpointed(self, trial: str, step: int, path: Path) -> None: ...

    def finished(self, result: TrialResult) -> None:
        self.results.append(result)

    def failed(self, trial: str, error: Exception) -> None:
        self.errors.append(error)

    def stop_requested(self) -> bool:
        return False


class MultiLoraTrials:
    """The multi-LoRA engine, its base read once for all trials."""

    def __init__(self, lab: Lab, slots: int) -> None:
        self.lab, self.slots = lab, slots
        self.engine = MultiLoraEngine(lab.base, lab.corpus, lab.settings, LABELS, slots)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Raises:
        TrainingError: a trial failed, or fewer trained at once than there are slots.
        """
        clock = PointClock(self.lab)
        self.engine.run(Plans(plans), clock)
        if clock.errors:
            raise clock.errors[0]
        assert len(clock.results) == len(plans)
        spans = [self._span(clock, plan) for plan in plans]
        together = max(Counter(span.began for span in spans).values())
        if together != min(self.slots, len(plans)):
            raise TrainingError(f"{self.slots} trials must train at once, but {together} did; give fewer --slots")
        return spans

    def _span(self, clock: PointClock, plan: TrialPlan) -> Span:
        settings, lengths = self.lab.settings, self.lab.corpus.train.lengths
        trained = batches(lengths.tolist(), settings.batch_size, plan.seed, epoch=0)[self.lab.warmup_steps :]
        began, ended = (clock.times[plan.trial, step] for step in (self.lab.warmup_steps, self.lab.steps))
        return Span(began, ended, sum(map(len, trained)), sum(int(lengths[rows].sum()) for rows in trained))
