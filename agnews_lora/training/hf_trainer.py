"""The reference engine: Hugging Face Trainer + PEFT, one trial after another.

The other engine is measured and tested against it. Data order, evaluations, pruning, checkpoints and the adapter's
files follow the contracts of `interface`; the arithmetic is Trainer's own.
"""

import gc
import json
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from agnews_lora import unset
from agnews_lora.adapters.adapter_files import record_of, save_adapter
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import AdapterError, BudgetError, StorageError, TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.data_order import WIDTH_STEP, batches
from agnews_lora.training.device import computes_in_bf16, peak_memory_bytes, training_device
from agnews_lora.training.interface import (
    EvalPoint,
    Observer,
    TrainPoint,
    TrainSettings,
    TrialPlan,
    TrialResult,
    TrialSource,
    Verdict,
    timestamp,
)
from agnews_lora.training.metrics import accuracy, by_length, macro_f1, mean_cross_entropy, packed, require_finite
from agnews_lora.training.model import build_model, recount

# Errors that end one trial and leave the sweep sound. Any other is a fault of the program: reported, then raised.
TRIAL_FAULTS = (TrainingError, BudgetError, AdapterError, torch.OutOfMemoryError)

WINDOW = "window.json"

# Variables of launchers (torchrun, accelerate, MPI, SLURM). Trainer would wait for processes that nobody started, or
# train in another precision, on another device, with other batches.
_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_|CROSS_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)|FORK_LAUNCHED|"
    r"KUBEFLOW_TRAINER_SERVER_URL|"
    r"(ACCELERATE|DEEPSPEED|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|TORCHELASTIC|OMPI|PMI|PMIX|MPI|MV2|SLURM)_.*"
)


def _of_a_launcher(variable: str) -> bool:
    return _LAUNCHERS.fullmatch(variable) is not None


class TrainerEngine:
    """Trains one trial at a time on one device.

    Raises:
        TrainingError: bf16 was asked for and the device does not have it.
    """

    def __init__(self, base: BaseModel, corpus: Corpus, settings: TrainSettings) -> None:
        self.base = base
        self.corpus = corpus
        self.settings = settings
        self.labels, self.clean = corpus.labels, corpus.clean
        self.device = training_device()
        self.bf16 = computes_in_bf16(self.device, settings.precision)

    def run(self, source: TrialSource, observer: Observer) -> None:
        """Train the trials of `source`, until it gives None or the observer asks to stop.

        Raises:
            StorageError: a checkpoint cannot be written. The trial does not fail: it resumes from its last checkpoint.
        """
        while not observer.stop_requested() and (plan := source.next()) is not None:
            try:
                with unset(_of_a_launcher):
                    result = _TrialTraining(self, plan, observer).run()
            except StorageError:
                raise
            except Exception as error:
                observer.failed(plan.trial, error)
                if not isinstance(error, TRIAL_FAULTS):
                    raise
            else:
                if result is not None:
                    observer.finished(result)
            finally:
                gc.collect()  # Trainer and model hold each other: without this, two models could be on the device


# Trainer with the project's data order and checkpoints ----------------------------------------------------------------


class AccuracyAndMacroF1(evaluate.Metric):
    """Computes `{"accuracy", "macro_f1"}` of class ids. It comes with the package, so that no hub is asked for it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy and unweighted mean F1 over the classes.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), np.asarray(references)
        return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}


class TableRows(Dataset[Any]):
    """Some rows of a token table. Positions are those in `rows`, not the table's. max_length: of a padded row."""

    def __init__(self, table: TokenTable, rows: Sequence[int], max_length: int) -> None:
        self.table, self.max_length = table, max_length
        self.rows = np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Give a whole batch: input_ids and attention_mask (b, longest), labels (b,)."""
        arrays = self.table.padded(self.rows[positions].tolist(), WIDTH_STEP, self.max_length)
        names = ("input_ids", "attention_mask", "labels")
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


@dataclass(frozen=True)
class LossWindow:
    """The training loss since its last point, which Trainer's own checkpoint does not hold.

    Args:
        loss_sum: of the steps after `logged`, the step of that point.
        learning_rate: of the last step.
    """

    loss_sum: float
    logged: int
    learning_rate: float

    @classmethod
    def read(cls, checkpoint: Path) -> "LossWindow":
        """Read the window that `CheckpointingTrainer` wrote into a checkpoint.

        Raises:
            TrainingError: not a checkpoint of this engine, or damaged.
        """
        try:
            return cls(**json.loads((checkpoint / WINDOW).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(
                f"Cannot resume from {checkpoint}: it is no sound checkpoint of engine trainer ({error}). Use the "
                "engine that wrote it, or start the trial again."
            ) from error


class CheckpointingTrainer(Trainer):
    """Trainer over batches of the shared data order, whose checkpoints are sealed and hold the training loss's window.

    learning_rate: of the last step. save_seconds: wall time inside checkpoints.
    """

    def __init__(self, *args: Any, plan: TrialPlan, train_batches: list[list[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.train_batches = train_batches
        self.learning_rate = self.save_seconds = 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_dataset, self.train_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        lengths = eval_dataset.table.lengths[eval_dataset.rows]
        return self._loader(eval_dataset, by_length(lengths, self.args.per_device_eval_batch_size))

    def _loader(self, dataset: Any, cut: list[list[int]]) -> DataLoader[Any]:
        # A generator of its own: a loader draws a number at each start, and dropout must not depend on how often.
        return DataLoader(dataset, batch_sampler=cut, collate_fn=lambda batch: batch, generator=torch.Generator())

    @property
    def window(self) -> LossWindow:
        """The window at this moment; set when a resumed training begins."""
        return LossWindow(self._tr_loss.item(), self._globalstep_last_logged, self.learning_rate)

    @window.setter
    def window(self, window: LossWindow) -> None:
        self._tr_loss.fill_(window.loss_sum)
        self._globalstep_last_logged, self.learning_rate = window.logged, window.learning_rate

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.partial_of(self.plan.folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        with checkpoints.written(self.plan.trial, self.plan.folder, self.state.global_step) as folder:
            super()._save_checkpoint(model, trial)
            (folder / WINDOW).write_text(json.dumps(asdict(self.window)) + "\n", encoding="utf-8")
        self.save_seconds += time.perf_counter() - began


# A trial -------------------------------------------------------------------------------------------------------------


class _Left(Exception):
    """Leaves an evaluation when a stop is requested, or Trainer when a trial ends at the step it resumes from."""


class _TrialTraining(TrainerCallback):
    """Trains one trial by Trainer; as its callback it reports, evaluates and stops."""

    def __init__(self, engine: TrainerEngine, plan: TrialPlan, observer: Observer) -> None:
        self.engine, self.plan, self.observer = engine, plan, observer
        self.settings, self.corpus = engine.settings, engine.corpus
        self.train_batches = [
            batch
            for epoch in range(self.settings.epochs)
            for batch in batches(self.corpus.train.lengths.tolist(), self.settings.batch_size, plan.seed, epoch)
        ]
        self.metric = AccuracyAndMacroF1(
            keep_in_memory=True, cache_dir=tempfile.gettempdir()
        )  # HOME need not be writable
        self.final: EvalPoint | None = None
        self.checkpoint = plan.checkpoint
        self.window = LossWindow.read(plan.checkpoint) if plan.checkpoint else None
        self.right = np.empty(0, dtype=np.bool_)  # of the last evaluation, in the loader's order
        self.pruned = self.stopped = False
        self.train_seconds = self.eval_seconds = 0.0

    def run(self) -> TrialResult | None:
        """Train to the last step; None if stopped before it (a checkpoint was reported)."""
        plan, engine = self.plan, self.engine
        plan.folder.mkdir(parents=True, exist_ok=True)
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        self.model = build_model(engine.base, plan.spec, len(engine.labels), plan.seed, self.settings.base_dropout)
        self.trainer = CheckpointingTrainer(
            self.model,
            self._arguments(),
            train_dataset=TableRows(self.corpus.train, range(len(self.corpus.train)), self.settings.max_length),
            train_batches=self.train_batches,
            compute_metrics=self._metrics,
            callbacks=[self],
            plan=plan,
        )
        self.trainer.remove_callback(PrinterCallback)  # the observer reports instead
        began = time.perf_counter()
        with suppress(_Left):
            self.trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
        self.train_seconds = time.perf_counter() - began - self.eval_seconds - self.trainer.save_seconds
        if self.stopped:
            assert self.checkpoint is not None, "Trainer stops only at a step that has a checkpoint"
            self.observer.checkpointed(plan.trial, self.trainer.state.global_step, self.checkpoint)
            return None
        return self._result()

    def _arguments(self) -> TrainingArguments:
        settings, device = self.settings, self.engine.device
        arguments = TrainingArguments(
            output_dir=str(self.plan.folder),
            num_train_epochs=1,  # the batches of all epochs lie one after another
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            learning_rate=self.plan.spec.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="linear",
            warmup_steps=round(settings.warmup * len(self.train_batches)),
            bf16=self.engine.bf16,
            use_cpu=device.type == "cpu",
            seed=self.plan.seed,
            logging_strategy="no",  # logged and saved as `on_step_end` says, evaluated as `on_save` does
            logging_nan_inf_filter=False,  # a loss that is not finite ends the trial
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would spread one small trial over every GPU it sees
        return arguments

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        predicted = logits.argmax(axis=-1)
        scores: dict[str, float] = self.metric.compute(predictions=predicted, references=labels)
        self.right = predicted == labels
        # Trainer's own `eval_loss` is the mean over batches, whatever their size.
        return {**scores, "cross_entropy": mean_cross_entropy(logits, labels)}

    # Trainer's callbacks ---------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the step of the checkpoint that the trial resumes from: it was written before that evaluation."""
        if self.window is None:
            return
        self.trainer.window = self.window
        if self._is_due(state.global_step):
            self._evaluate_and_judge(state.global_step)
        if self.pruned and (steps := state.global_step - self.window.logged):
            self._log(state.global_step, self.window.loss_sum / steps, self.window.learning_rate)
        if self.stopped or self.pruned:
            raise _Left

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        [self.trainer.learning_rate, *_] = lr_scheduler.get_last_lr()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell Trainer to log, save or stop. It logs before it saves, and saves before its step's evaluation."""
        step, last = state.global_step, state.global_step == len(self.train_batches)
        self.stopped = self.observer.stop_requested()
        control.should_training_stop = self.stopped or last
        control.should_log = last or step % self.settings.log_every == 0
        control.should_save = self.stopped or self._is_due(step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._log(state.global_step, logs["loss"], logs["learning_rate"])

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        self.checkpoint = checkpoints.folder_of(self.plan.folder, step)
        if self.stopped:  # reported when Trainer is left
            return
        self.observer.checkpointed(self.plan.trial, step, self.checkpoint)
        self._evaluate_and_judge(step)
        control.should_training_stop |= self.stopped or self.pruned
        control.should_log = self.pruned  # its last point: Trainer looks once more when it leaves the epoch

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.observer.stop_requested():
            raise _Left

    # -----------------------------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        return step == len(self.train_batches) or step % self.settings.eval_every == 0

    def _log(self, step: int, loss: float, learning_rate: float) -> None:
        require_finite("training loss", loss, step, self.plan.spec)
        self.observer.logged([TrainPoint(self.plan.trial, step, loss, learning_rate, timestamp())])

    def _evaluate_and_judge(self, step: int) -> None:
        last = step == len(self.train_batches)
        try:
            point = self._evaluate(step, last)
        except _Left:
            self.stopped = True
            return
        [verdict] = self.observer.evaluated([point])
        if last:
            self.final = point
        else:
            self.pruned = verdict is Verdict.PRUNE

    def _evaluate(self, step: int, last: bool) -> EvalPoint:
        validation = self.corpus.validation
        rows = range(len(validation)) if last else self.corpus.monitor
        began = time.perf_counter()
        try:
            metrics = self.trainer.evaluate(TableRows(validation, rows, self.settings.max_length))
        finally:
            self.eval_seconds += time.perf_counter() - began
        require_finite("validation loss", metrics["eval_cross_entropy"], step, self.plan.spec)
        right = np.empty_like(self.right)
        lengths = validation.lengths[np.asarray(rows)]
        right[np.concatenate(by_length(lengths, self.settings.eval_batch_size))] = self.right
        return EvalPoint(
            trial=self.plan.trial,
            step=step,
            accuracy=metrics["eval_accuracy"],
            macro_f1=metrics["eval_macro_f1"],
            loss=metrics["eval_cross_entropy"],
            rows=len(rows),
            final=last,
            timestamp=timestamp(),
            right=packed(right),
        )

    def _result(self) -> TrialResult:
        plan, engine, steps, adapter = self.plan, self.engine, self.trainer.state.global_step, None
        base = engine.base
        if not self.pruned:
            adapter = plan.folder / "adapter"
            record = record_of(plan.trial, plan.spec, base, engine.labels, self.settings.max_length, engine.clean)
            save_adapter(self.model, record, adapter)
        return TrialResult(
            trial=plan.trial,
            steps=steps,
            total_steps=len(self.train_batches),
            final=self.final,
            adapter=adapter,
            trainable_parameters=recount(self.model, plan.spec, base),
            rows_seen=sum(len(batch) for batch in self.train_batches[:steps]),
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            peak_memory_bytes=peak_memory_bytes(self.engine.device),
        )
