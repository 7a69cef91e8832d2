"""The reference engine: Hugging Face Trainer + PEFT, one trial after another.

What other engines are measured and tested against. Data order, evaluations, pruning, checkpoints and the adapter's
files follow the contracts; the arithmetic is Trainer's own.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from agnews_lora.adapters.bases import BaseModel
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.checkpoint import AdapterRecord, load_base, lora_config, save_adapter, without_path
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.corpus import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import AdapterError, BudgetError, TrainingError
from agnews_lora.training.batches import batches
from agnews_lora.training.contracts import (
    EvalPoint,
    Observer,
    TrainPoint,
    TrainSettings,
    TrialPlan,
    TrialResult,
    TrialSource,
    Verdict,
)
from agnews_lora.training.device import computes_in_bf16, training_device
from agnews_lora.training.evaluation import by_length
from agnews_lora.training.metric import AccuracyAndMacroF1

Batch = dict[str, torch.Tensor]

# What ends one trial and leaves the sweep sound. Everything else is a fault of the program: reported, then raised.
TRIAL_FAULTS = (TrainingError, BudgetError, AdapterError, torch.OutOfMemoryError)


class TrainerEngine:
    """Trains one trial at a time on one device.

    Owns the base model's files, the token tables and the settings that all trials share.
    """

    def __init__(self, base: BaseModel, corpus: Corpus, settings: TrainSettings, labels: Sequence[str]) -> None:
        self.base = base
        self.corpus = corpus
        self.settings = settings
        self.labels = tuple(labels)

    def run(self, source: TrialSource, observer: Observer) -> None:
        """Train what `source` gives, until it gives None or the observer asks to stop."""
        while not observer.stop_requested() and (plan := source.next()) is not None:
            try:
                result = _TrialTraining(self, plan, observer).run()
            except TRIAL_FAULTS as error:
                observer.failed(plan.trial, error)
            except Exception as error:
                observer.failed(plan.trial, error)
                raise
            else:
                if result is not None:
                    observer.finished(result)


def build_model(base: BaseModel, spec: TrialSpec, num_labels: int, seed: int, base_dropout: float = 0.0) -> PeftModel:
    """The base with the trial's adapters and a fresh head, all initialised from `seed`, in training mode.

    Raises:
        BudgetError: the built trainable tensors do not count what the budget was checked with.
    """
    set_seed(seed)
    model = get_peft_model(load_base(base, num_labels, base_dropout), lora_config(spec, base))
    freeze_head(model, spec)
    recount(model, spec, base)
    return model


def freeze_head(model: PeftModel, spec: TrialSpec) -> None:
    """Leave only the last layer of the classifier trainable, where the specification says so."""
    if spec.head != "out_proj":
        return
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and ".dense." in name:
            parameter.requires_grad_(False)


def recount(model: PeftModel, spec: TrialSpec, base: BaseModel) -> int:
    """Trainable parameters, counted on the built tensors.

    Raises:
        BudgetError: another number than the one that the budget was checked with.
    """
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    expected = trainable_parameters(spec, base.shape)
    if counted != expected:
        raise BudgetError(
            f"the built model has {counted:,} trainable parameters, its specification ({spec}) stands for "
            f"{expected:,}; the base {base.name} is not of the shape {base.shape}"
        )
    return counted


class _Interrupted(Exception):
    """Leaves an evaluation when a stop is requested in the middle of it."""


class _Rows(Dataset[Any]):
    """Rows of a token table, handed out as whole padded batches."""

    def __init__(self, table: TokenTable, rows: Sequence[int]) -> None:
        self.table = table
        self.rows = np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        input_ids, attention_mask, labels = self.table.padded(self.rows[positions].tolist())
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
        }


class _Trainer(Trainer):
    """Trainer over batches that are cut already: the shared data order in training, like lengths in evaluation."""

    def __init__(self, *args: Any, train_batches: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_batches = train_batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_dataset, self.train_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        lengths = eval_dataset.table.lengths[eval_dataset.rows]
        return self._loader(eval_dataset, by_length(lengths, self.args.per_device_eval_batch_size))

    def _loader(self, dataset: Any, cut: list[list[int]]) -> DataLoader[Any]:
        # A generator of its own: a loader draws a number at each start, and dropout must not depend on how often.
        return DataLoader(dataset, batch_sampler=cut, collate_fn=lambda batch: batch, generator=torch.Generator())


class _TrialTraining(TrainerCallback):
    """One trial's way through Trainer; as its callback it reports, evaluates and stops."""

    def __init__(self, engine: TrainerEngine, plan: TrialPlan, observer: Observer) -> None:
        self.engine, self.plan, self.observer = engine, plan, observer
        self.settings, self.corpus = engine.settings, engine.corpus
        self.train_batches = [
            batch
            for epoch in range(self.settings.epochs)
            for batch in batches(self.corpus.train.lengths.tolist(), self.settings.batch_size, plan.seed, epoch)
        ]
        self.metric = AccuracyAndMacroF1(keep_in_memory=True)
        self.final: EvalPoint | None = None
        self.pruned = self.stopped = False
        self.train_seconds = self.eval_seconds = 0.0

    def run(self) -> TrialResult | None:
        """Train to the last step; None when stopped on the way (a checkpoint was reported)."""
        plan, base = self.plan, self.engine.base
        plan.folder.mkdir(parents=True, exist_ok=True)
        device = training_device()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.model = model = build_model(base, plan.spec, len(self.engine.labels), plan.seed, self.settings.base_dropout)
        self.trainer = _Trainer(
            model,
            self._arguments(device),
            train_dataset=_Rows(self.corpus.train, range(len(self.corpus.train))),
            train_batches=self.train_batches,
            compute_metrics=self._metrics,
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)  # the observer shows what there is to see
        began = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
        self.train_seconds = time.perf_counter() - began - self.eval_seconds
        if self.stopped:
            step = self.trainer.state.global_step
            self.observer.checkpointed(plan.trial, step, plan.folder / f"checkpoint-{step}")
            return None
        adapter = None if self.pruned else self._save(model)
        return self._result(adapter, recount(model, plan.spec, base), device)

    def _arguments(self, device: torch.device) -> TrainingArguments:
        settings, steps = self.settings, len(self.train_batches)
        arguments = TrainingArguments(
            output_dir=str(self.plan.folder),
            num_train_epochs=1,  # the batches of all epochs lie one after another
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            learning_rate=self.plan.spec.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="linear",
            warmup_steps=round(settings.warmup * steps),
            bf16=computes_in_bf16(device, settings.precision),
            use_cpu=device.type == "cpu",
            seed=self.plan.seed,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,  # a loss that is not finite ends the trial, see `on_log`
            eval_strategy="no",  # evaluated in `on_step_end`, so that a stop can break it off
            save_strategy="no",  # saved in `on_step_end`, when a stop is requested
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would spread one small trial over every GPU it sees
        return arguments

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.asarray(prediction.predictions).argmax(axis=-1)
        scores: dict[str, float] = self.metric.compute(predictions=predicted, references=prediction.label_ids)
        return scores

    # What Trainer calls ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Going on from a checkpoint: the evaluation of its step may have been broken off by the stop."""
        recount(self.model, self.plan.spec, self.engine.base)
        if state.global_step > 0:
            self._evaluate_if_due(state, control)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not np.isfinite(logs["loss"]):
            raise TrainingError(
                f"the training loss became {logs['loss']} by step {state.global_step} ({self.plan.spec}); "
                "a lower learning rate or alpha keeps it finite"
            )
        point = TrainPoint(self.plan.trial, state.global_step, logs["loss"], logs["learning_rate"], _now())
        self.observer.logged([point])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.observer.stop_requested():
            self._stop(control)
        else:
            self._evaluate_if_due(state, control)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.observer.stop_requested():
            raise _Interrupted

    # -----------------------------------------------------------------------------------------------------------------

    def _stop(self, control: TrainerControl) -> None:
        self.stopped = control.should_save = control.should_training_stop = control.should_epoch_stop = True

    def _evaluate_if_due(self, state: TrainerState, control: TrainerControl) -> None:
        last = state.global_step == len(self.train_batches)
        if not last and state.global_step % self.settings.eval_every:
            return
        try:
            point = self._evaluate(state.global_step, last)
        except _Interrupted:
            self._stop(control)
            return
        [verdict] = self.observer.evaluated([point])
        if last:
            self.final = point
        elif verdict is Verdict.PRUNE:
            self.pruned = control.should_training_stop = control.should_epoch_stop = True

    def _evaluate(self, step: int, last: bool) -> EvalPoint:
        validation = self.corpus.validation
        rows = range(len(validation)) if last else self.corpus.monitor
        with self._timed_evaluation():
            metrics = self.trainer.evaluate(_Rows(validation, rows))
        return EvalPoint(
            trial=self.plan.trial,
            step=step,
            accuracy=metrics["eval_accuracy"],
            macro_f1=metrics["eval_macro_f1"],
            loss=metrics["eval_loss"],
            rows=len(rows),
            final=last,
            timestamp=_now(),
        )

    @contextmanager
    def _timed_evaluation(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.eval_seconds += time.perf_counter() - began

    def _save(self, model: PeftModel) -> Path:
        plan, base = self.plan, self.engine.base
        record = AdapterRecord(
            trial=plan.trial,
            spec=plan.spec,
            shape=base.shape,
            base=base.name,
            hub_id=base.hub_id,
            revision=base.revision,
            weights_sha256=base.weights_sha256,
            labels=self.engine.labels,
            max_length=self.settings.max_length,
            trainable_parameters=trainable_parameters(plan.spec, base.shape),
        )
        folder = plan.folder / "adapter"
        save_adapter(model, without_path(record), folder)
        return folder

    def _result(self, adapter: Path | None, trainable: int, device: torch.device) -> TrialResult:
        steps = self.trainer.state.global_step
        return TrialResult(
            trial=self.plan.trial,
            steps=steps,
            total_steps=len(self.train_batches),
            final=self.final,
            adapter=adapter,
            trainable_parameters=trainable,
            rows_seen=sum(len(batch) for batch in self.train_batches[:steps]),
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            peak_memory_bytes=_peak_memory_bytes(device),
        )


def _now() -> int:
    return time.time_ns() // 1_000_000


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
