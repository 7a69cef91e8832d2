"""The ways to train trials that are measured, and the measurement of one of them, in a process of its own.

Trainer + PEFT as a user would write it, one trial after another: shuffled rows, padded to the longest of their batch;
with its encoder layers compiled or not. And the multi-LoRA engine. The reference engine (`training/hf_trainer.py`) is
no peer here, since it needs `evaluate`.
"""

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from agnews_lora.adapters.adapter_files import load_base, lora_config
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import TrainingError
from agnews_lora.training.data_order import batches
from agnews_lora.training.device import peak_memory_bytes, training_device
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from agnews_lora.training.multilora.engine import MultiLoraEngine
from benchmarks.throughput.results import NUM_SPECS, Measurement, Peer, Task
from benchmarks.throughput.setup import BenchmarkSetup, plans

BACKEND = "inductor"  # of torch.compile
MAX_COMPILED = 64  # each trial's modules differ, and they train or score


class Moment(NamedTuple):
    """A reading of wall clock and CPU time, in s."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Span:
    """A trial's training after its warm-up steps, and the rows and tokens trained."""

    began: Moment
    ended: Moment
    rows: int
    tokens: int


class Clock:
    """The time of a process, which stands still while other peers have their turn.

    Args:
        wait: ends this peer's turn, and waits for its next one; None where peers do not take turns.
    """

    def __init__(self, device: torch.device, wait: Callable[[], None] | None = None) -> None:
        self.device, self.wait = device, wait
        self.paused = Moment(0.0, 0.0)

    def now(self, synchronize: bool = True) -> Moment:
        """Read the time, once the device has finished its work."""
        if synchronize and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Moment(time.perf_counter() - self.paused.wall, time.process_time() - self.paused.cpu)

    def end_turn(self) -> None:
        """Let the other peers take a step each."""
        if self.wait is not None:
            began = self.now()
            self.wait()
            ended = self.now()
            self.paused = Moment(*(old + b - a for old, a, b in zip(self.paused, began, ended, strict=True)))


# Trainer + PEFT -------------------------------------------------------------------------------------------------------


class StepTimes(TrainerCallback):
    """Takes the time after the warm-up steps and after the last step; a step is a turn."""

    def __init__(self, setup: BenchmarkSetup, clock: Clock) -> None:
        self.setup, self.clock = setup, clock
        self.times: dict[int, Moment] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.setup.warmup_steps, self.setup.steps):
            self.times[state.global_step] = self.clock.now()
        self.clock.end_turn()


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

    def __init__(self, setup: BenchmarkSetup, clock: Clock, bf16: bool, compiled: bool) -> None:
        self.setup, self.clock, self.bf16, self.compiled = setup, clock, bf16, compiled
        self.train_rows, self.validation_rows = _as_rows(setup.corpus.train), _as_rows(setup.corpus.validation)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Build, train, evaluate and export each trial."""
        return [self._train(plan) for plan in plans]

    def _train(self, plan: TrialPlan) -> Span:
        setup = self.setup
        set_seed(plan.seed)
        model = get_peft_model(load_base(setup.base, len(LABELS)), lora_config(plan.spec, setup.base))
        if self.compiled:
            compile_layers(model, setup.base.shape.family)
        times, padding = StepTimes(setup, self.clock), Padding(setup.corpus.train.pad_id)
        trainer = Trainer(
            model,
            self._arguments(plan),
            data_collator=padding,
            train_dataset=self.train_rows,
            compute_metrics=_accuracy,
            callbacks=[times],
        )
        trainer.train()
        trainer.evaluate(self.validation_rows)  # type: ignore[arg-type]
        model.save_pretrained(str(plan.folder), save_embedding_layers=False)
        del trainer, model
        gc.collect()  # Trainer and model hold each other: without this, two models could be on the device
        steps, warmup_steps = setup.steps, setup.warmup_steps
        rows = (steps - warmup_steps) * setup.settings.batch_size
        return Span(times.times[warmup_steps], times.times[steps], rows, sum(padding.tokens[warmup_steps:steps]))

    def computed_by(self) -> str:
        """Say what computes the layers."""
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return f"torch.compile ({graphs} graphs)" if self.compiled else "torch"

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


def compile_layers(model: torch.nn.Module, family: Family) -> None:
    """Compile every encoder layer, for any batch: they are alike, and one compilation serves all of them.

    Where the compiler gives up, it raises: a layer that it left uncompiled would be measured as a compiled one.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = MAX_COMPILED
    layout = LAYOUTS[family]
    for layer in model.get_submodule(f"base_model.model.{layout.encoder}.{layout.layers}").children():
        layer.compile(dynamic=True, backend=BACKEND)


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
    """A source of plans and an observer: takes the time of each trial's points after the warm-up and the last step.

    A step is a turn. The engine has waited for the device to finish the step that it reports (not for the next one).
    """

    def __init__(self, setup: BenchmarkSetup, clock: Clock, plans: Iterable[TrialPlan]) -> None:
        self.setup, self.clock, self.plans = setup, clock, list(plans)
        self.times: dict[tuple[str, int], Moment] = {}

    def next(self) -> TrialPlan | None:
        return self.plans.pop(0) if self.plans else None

    def logged(self, points: Sequence[TrainPoint]) -> None:
        marked = [point for point in points if point.step in (self.setup.warmup_steps, self.setup.steps)]
        if marked:
            at = self.clock.now(synchronize=False)
            self.times |= {(point.trial, point.step): at for point in marked}

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return [Verdict.CONTINUE] * len(points)

    def checkpointed(self, trial: str, step: int, path: Path) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def failed(self, trial: str, error: Exception) -> None:
        raise error

    def stop_requested(self) -> bool:
        self.clock.end_turn()
        return False


class MultiLoraTrials:
    """The multi-LoRA engine, its base read once for all trials."""

    def __init__(self, setup: BenchmarkSetup, clock: Clock, slots: int) -> None:
        self.setup, self.clock, self.slots = setup, clock, slots
        self.engine = MultiLoraEngine(setup.base, setup.corpus, setup.settings, slots)

    def train(self, plans: Sequence[TrialPlan]) -> list[Span]:
        """Build, train, evaluate and export the trials.

        Raises:
            TrainingError: a trial failed, or fewer trained at once than there are slots.
        """
        timed = TimedTrials(self.setup, self.clock, plans)
        self.engine.run(timed, timed)
        spans = [self._span(timed, plan) for plan in plans]
        together = max(Counter(span.began for span in spans).values())
        if together != min(self.slots, len(plans)):
            raise TrainingError(f"{self.slots} trials must train at once, but {together} did; give fewer --slots")
        return spans

    def computed_by(self) -> str:
        """Say which kernels compute the layers and why those, and on a GPU whether steps are replayed."""
        # An earlier engine has neither.
        choice, graphs = (getattr(self.engine.model, name, None) for name in ("choice", "graphs"))
        computed = f"{choice.kernels.name} ({choice.reason})" if choice else "torch"
        return f"{computed}; {graphs}" if graphs and self.engine.device.type == "cuda" else computed

    def _span(self, timed: TimedTrials, plan: TrialPlan) -> Span:
        setup, lengths = self.setup, self.setup.corpus.train.lengths
        # Where steps are read late, the next one has been launched when the time is taken: it is not counted.
        first = setup.warmup_steps + getattr(self.engine, "reads_late", False)
        trained = batches(lengths.tolist(), setup.settings.batch_size, plan.seed, epoch=0)[first:]
        began, ended = (timed.times[plan.trial, step] for step in (setup.warmup_steps, setup.steps))
        return Span(began, ended, sum(map(len, trained)), sum(int(lengths[rows].sum()) for rows in trained))


# The process of one peer ---------------------------------------------------------------------------------------------


def trials_of(peer: Peer, setup: BenchmarkSetup, clock: Clock) -> TrainerTrials | MultiLoraTrials:
    """Choose a peer's way to train."""
    if peer.kind == "multilora":
        return MultiLoraTrials(setup, clock, peer.slots)
    return TrainerTrials(setup, clock, peer.bf16, peer.kind == "compiled")


def covered(parts: Iterable[tuple[float, float]]) -> float:
    """Sum the time of parts from a beginning to an end, in which at least one trial was training."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted(parts):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def product_rate(clock: Clock) -> float:
    """Measure a bf16 matrix product in FLOP/s, median of repeats: 4096 cubed on CUDA, 1024 x 1536² on a CPU."""
    device = clock.device
    m, k, n, products = (4096, 4096, 4096, 20) if device.type == "cuda" else (1024, 1536, 1536, 1)
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    seconds = []
    for _ in range(30):
        began = clock.now().wall
        for _ in range(products):
            torch.matmul(left, right)
        seconds.append((clock.now().wall - began) / products)
    return 2 * m * k * n / float(np.median(seconds[10:]))  # the first ones raise the clock


def measure(task: Task, wait: Callable[[], None]) -> Measurement:
    """Train short trials, wait for the first turn, then train the measured trials.

    Args:
        wait: ends a turn and waits for the next one. On CUDA, the first turn is the only one: peers do not share it.
    """
    device = training_device()
    setup, peer = BenchmarkSetup.of(task, device), task.peer
    clock = Clock(device)
    with tempfile.TemporaryDirectory(dir=task.folder) as work:
        short = min(peer.slots, NUM_SPECS)
        trials_of(peer, setup.shortened(2), clock).train(plans(Path(work, "short"), short))
        gc.collect()
        trials = trials_of(peer, setup, clock)
        start_up_seconds = time.time() - task.started
        wait()
        before = product_rate(clock)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            clock.wait = wait
        began = clock.now()
        spans = trials.train(plans(Path(work, "measured"), peer.num_trials))
        ended = clock.now()
    return Measurement(
        rows=sum(span.rows for span in spans),
        tokens=sum(span.tokens for span in spans),
        train_seconds=covered((span.began.wall, span.ended.wall) for span in spans),
        cpu_seconds=covered((span.began.cpu, span.ended.cpu) for span in spans),
        product_before=before,
        product_after=product_rate(clock),
        num_trials=len(spans),
        wall_seconds=ended.wall - began.wall,
        peak_memory_bytes=peak_memory_bytes(device),
        start_up_seconds=start_up_seconds,
        computed_by=trials.computed_by(),
    )
