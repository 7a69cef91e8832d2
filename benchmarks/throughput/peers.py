"""The two ways to train trials that are measured, and the process that measures one of them.

Trainer + PEFT as a user would write it, one trial after another: shuffled rows, padded to the longest of their batch.
And the multi-LoRA engine. The reference engine (`training/hf_trainer.py`) is no peer here, since it needs `evaluate`.

`python -m benchmarks.throughput.peers TASK ANSWER` measures one peer (JSON files).
"""

import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from agnews_lora.adapters.adapter_files import load_base, lora_config
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import TrainingError
from agnews_lora.training.data_order import batches
from agnews_lora.training.device import peak_memory_bytes, training_device
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from agnews_lora.training.multilora.engine import MultiLoraEngine
from benchmarks.throughput.results import NUM_SPECS, Environment, Measurement, Peer, Task
from benchmarks.throughput.setup import BenchmarkSetup, plans


@dataclass(frozen=True)
class Span:
    """A trial's training after its warm-up steps: in s of `perf_counter`, and the rows and tokens trained."""

    began: float
    ended: float
    rows: int
    tokens: int


def now(device: torch.device) -> float:
    """Read `perf_counter` once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Trainer + PEFT -------------------------------------------------------------------------------------------------------


class StepClock(TrainerCallback):
    """Takes the time after the warm-up steps and after the last step."""

    def __init__(self, setup: BenchmarkSetup) -> None:
        self.setup = setup
        self.times: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.setup.warmup_steps, self.setup.steps):
            self.times[state.global_step] = now(self.setup.device)


class Padding:
    """Pads rows to the longest of their batch, as `DataCollatorWithPadding` does.

    tokens: real ones of every batch so far, those of the training steps first.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        self.tokens.append(sum(map(len, ids)))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


class TrainerTrials:
    """Trainer + PEFT, a new model for each trial."""

    def __init__(self, setup: BenchmarkSetup, bf16: bool) -> None:
        self.setup, self.bf16 = setup, bf16
        self.train_rows, self.validation_rows = _as_rows(setup.corpus.train), _as_rows(setup.corpus.validation)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Build, train, evaluate and export each trial."""
        return [self._train(plan) for plan in plans]

    def _train(self, plan: TrialPlan) -> Span:
        setup = self.setup
        set_seed(plan.seed)
        model = get_peft_model(load_base(setup.base, len(LABELS)), lora_config(plan.spec, setup.base))
        clock, padding = StepClock(setup), Padding(setup.corpus.train.pad_id)
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
        steps, warmup_steps = setup.steps, setup.warmup_steps
        rows = (steps - warmup_steps) * setup.settings.batch_size
        return Span(clock.times[warmup_steps], clock.times[steps], rows, sum(padding.tokens[warmup_steps:steps]))

    def _arguments(self, plan: TrialPlan) -> TrainingArguments:
        settings = self.setup.settings
        arguments = TrainingArguments(
            output_dir=str(plan.folder),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.eval_batch_size,
            learning_rate=plan.spec.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=self.bf16,
            use_cpu=self.setup.device.type == "cpu",
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


class TimedTrials:
    """A source of plans and an observer: takes the time of each trial's points after the warm-up and the last step."""

    def __init__(self, setup: BenchmarkSetup, plans: Iterable[TrialPlan]) -> None:
        self.setup, self.plans = setup, list(plans)
        self.times: dict[tuple[str, int], float] = {}

    def next(self) -> TrialPlan | None:
        return self.plans.pop(0) if self.plans else None

    def logged(self, points: Sequence[TrainPoint]) -> None:
        marked = [point for point in points if point.step in (self.setup.warmup_steps, self.setup.steps)]
        if marked:
            at = now(self.setup.device)
            self.times |= {(point.trial, point.step): at for point in marked}

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return [Verdict.CONTINUE] * len(points)

    def checkpointed(self, trial: str, step: int, path: Path) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def failed(self, trial: str, error: Exception) -> None:
        raise error

    def stop_requested(self) -> bool:
        return False


class MultiLoraTrials:
    """The multi-LoRA engine, its base read once for all trials."""

    def __init__(self, setup: BenchmarkSetup, slots: int) -> None:
        self.setup, self.slots = setup, slots
        self.engine = MultiLoraEngine(setup.base, setup.corpus, setup.settings, slots)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Build, train, evaluate and export the trials.

        Raises:
            TrainingError: a trial failed, or fewer trained at once than there are slots.
        """
        timed = TimedTrials(self.setup, plans)
        self.engine.run(timed, timed)
        spans = [self._span(timed, plan) for plan in plans]
        together = max(Counter(span.began for span in spans).values())
        if together != min(self.slots, len(plans)):
            raise TrainingError(f"{self.slots} trials must train at once, but {together} did; give fewer --slots")
        return spans

    def _span(self, timed: TimedTrials, plan: TrialPlan) -> Span:
        setup, lengths = self.setup, self.setup.corpus.train.lengths
        trained = batches(lengths.tolist(), setup.settings.batch_size, plan.seed, epoch=0)[setup.warmup_steps :]
        began, ended = (timed.times[plan.trial, step] for step in (setup.warmup_steps, setup.steps))
        return Span(began, ended, sum(map(len, trained)), sum(int(lengths[rows].sum()) for rows in trained))


# The process of one peer ---------------------------------------------------------------------------------------------


def trials_of(peer: Peer, setup: BenchmarkSetup) -> TrainerTrials | MultiLoraTrials:
    """Choose a peer's way to train."""
    return TrainerTrials(setup, peer.bf16) if peer.kind == "trainer" else MultiLoraTrials(setup, peer.slots)


def covered_seconds(spans: Iterable[Span]) -> float:
    """Sum the time in which at least one trial was training."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        total += max(0.0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return total


def product_rate(device: torch.device) -> float:
    """Measure a bf16 matrix product in FLOP/s, median of repeats: 4096 cubed on CUDA, 1024 x 1536² on a CPU."""
    m, k, n, products = (4096, 4096, 4096, 20) if device.type == "cuda" else (1024, 1536, 1536, 1)
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    seconds = []
    for _ in range(30):
        began = now(device)
        for _ in range(products):
            torch.matmul(left, right)
        seconds.append((now(device) - began) / products)
    return 2 * m * k * n / float(np.median(seconds[10:]))  # the first ones raise the clock


def measure(task: Task, work: Path) -> Measurement:
    """Train short trials, then the measured ones, below the folder `work`."""
    device = training_device()
    setup, peer = BenchmarkSetup.of(task, device), task.peer
    trials_of(peer, setup.shortened(2)).train(plans(work / "short", min(peer.slots, NUM_SPECS)))
    gc.collect()
    trials = trials_of(peer, setup)
    start_up_seconds = time.time() - task.started
    before = product_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    spans = trials.train(plans(work / "measured", peer.num_trials))
    ended = now(device)
    peak = peak_memory_bytes(device)
    return Measurement(
        rows=sum(span.rows for span in spans),
        tokens=sum(span.tokens for span in spans),
        train_seconds=covered_seconds(spans),
        product_before=before,
        product_after=product_rate(device),
        num_trials=len(spans),
        wall_seconds=ended - began,
        peak_memory_bytes=peak,
        start_up_seconds=start_up_seconds,
    )


def main(task_file: Path, answer_file: Path) -> None:
    """Read a `Task`, write its `Measurement`."""
    fields = json.loads(task_file.read_text(encoding="utf-8"))
    nested = {"peer": Peer(**fields["peer"]), "environment": Environment(**fields["environment"])}
    with tempfile.TemporaryDirectory(dir=task_file.parent) as work:
        measurement = measure(Task(**fields | nested), Path(work))
    answer_file.write_text(json.dumps(asdict(measurement)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
