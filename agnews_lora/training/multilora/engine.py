"""The multi-LoRA engine: trains K trials at once, each in a slot, with no effect on one another."""

import gc
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from agnews_lora.adapters.adapter_files import load_base, record_of, tensor_shapes
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.families import unknown_to_multilora
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.sources import Corpus
from agnews_lora.errors import AdapterError, BudgetError, ConfigError, StorageError, TrainingError
from agnews_lora.training.checkpoints import folder_of
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
)
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.packing import DeviceTokens, on_device
from agnews_lora.training.multilora.slots import SlotState
from agnews_lora.training.multilora.trial_state import (
    TrainProgress,
    TrialState,
    export_adapter,
    fresh_weights,
    read_checkpoint,
    write_checkpoint,
)

# Errors that end one trial and leave the others sound. Any other is a fault of the program: reported, then raised.
TRIAL_FAULTS = (TrainingError, BudgetError, AdapterError)

MAX_SLOTS = 32
MAX_SLOTS_CPU = 4  # more threads share the batches; a trial that ends sooner teaches the search sooner
HEADROOM = 0.8  # share of the free memory that slots may fill: batches differ, and the allocator leaves gaps
HEAVIEST = TrialSpec("all-linear", rank=32, alpha=1, dropout=0.1, learning_rate=1.0)  # adapts and drops everywhere


class MultiLoraEngine:
    """Trains up to `slots` trials at once on one device; without a number, as many as fit a GPU's memory, or as a CPU
    has threads.

    Raises:
        ConfigError: this engine does not compute such an encoder, or dropout inside it.
        TrainingError: the settings ask for bf16 and the device does not have it.
        BaseModelError: the base's weights do not fit its configuration.
    """

    def __init__(self, base: BaseModel, corpus: Corpus, settings: TrainSettings, slots: int | None = None) -> None:
        model: Any = load_base(base, len(corpus.labels))
        if cause := unknown_to_multilora(base.shape.family, model.config.to_dict(), settings.base_dropout):
            raise ConfigError(f"Cannot train {base.name}: {cause}. Take `engine: trainer`.")
        self.base = base
        self.settings = settings
        self.labels, self.clean = corpus.labels, corpus.clean
        self.device = training_device()
        dtype = torch.bfloat16 if computes_in_bf16(self.device, settings.precision) else torch.float32
        encoder = Encoder(model, base.shape.family, self.device, dtype)
        self.train = DeviceTokens(corpus.train, self.device, encoder.padding_id)
        self.validation = DeviceTokens(corpus.validation, self.device, encoder.padding_id)
        self.monitor = corpus.monitor
        self.lengths = corpus.train.lengths.tolist()
        self.model = MultiLoraModel(encoder, base.shape, slots or 1)
        self.reads_late = self.device.type == "cuda"  # else a step is computed when it has been taken
        if slots is None:
            self.model.resize(choose_slots(self.model, self.train, settings.batch_size))

    def run(self, source: TrialSource, observer: Observer) -> None:
        """Train the trials of `source` until all slots are empty and it gives None, or until a stop is requested.

        Raises:
            StorageError: a checkpoint cannot be written. No trial fails: each resumes from its last checkpoint.
        """
        _Run(self, source, observer).until_done()


def choose_slots(model: MultiLoraModel, tokens: DeviceTokens, batch_size: int) -> int:
    """Count the slots that fit a CUDA device, by the measured peak memory of one slot's step; on a CPU, its threads."""
    if model.threads is not None:
        return min(MAX_SLOTS_CPU, model.threads.number)
    place_heaviest(model)
    heaviest_step(model, tokens, batch_size)  # the first one compiles kernels, which takes memory of its own
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    heaviest_step(model, tokens, batch_size)
    slot_bytes = torch.cuda.max_memory_allocated(model.device) - before
    model.resize(1)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(model.device)
    return fitting_slots(free_bytes, slot_bytes)


def fitting_slots(free_bytes: int, slot_bytes: int) -> int:
    """Count the slots of `slot_bytes` each that fit, between 1 and `MAX_SLOTS`."""
    return max(1, min(MAX_SLOTS, int(HEADROOM * free_bytes) // max(1, slot_bytes)))


def place_heaviest(model: MultiLoraModel) -> None:
    """Put a trial of zeros that adapts every module into the first slot."""
    zeros = {name: torch.zeros(shape) for name, shape in tensor_shapes(HEAVIEST, model.shape).items()}
    model.slots.place(0, HEAVIEST, SlotState.fresh(zeros))


def heaviest_step(model: MultiLoraModel, tokens: DeviceTokens, batch_size: int) -> None:
    """Train the first slot on the longest rows there are, at a learning rate of zero."""
    longest = tokens.lengths.argsort()[-batch_size:]
    model.step(tokens, [SlotBatch(0, longest.tolist(), learning_rate=0.0, step=1, seed=0)], 0.0, 0.0)


class _Stopped(Exception):
    """Leaves an evaluation when a stop is requested."""


class _Waiting(NamedTuple):
    """A trial without a slot, and the tensors that it will put into one."""

    trial: TrialState
    state: SlotState


class _Scores(NamedTuple):
    """Logits [slots, rows, classes] of some slots, the rows' labels, and the seconds that they took."""

    slots: list[int]
    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    seconds: float


class _Step:
    """A step of the trials in some slots, that the device may still be computing.

    Args:
        began: `perf_counter` before its batches were packed.
        values: [2, K] losses and gradient norms, on the device.
    """

    def __init__(self, trials: dict[int, TrialState], began: float, values: torch.Tensor) -> None:
        self.trials, self.began = trials, began
        self.values = values.to("cpu", non_blocking=True)
        self.computed = torch.cuda.Event() if values.is_cuda else None
        if self.computed is not None:
            self.computed.record()

    def read(self) -> tuple[list[float], list[float]]:
        """Wait for the device; ([K] losses, [K] gradient norms)."""
        if self.computed is not None:
            self.computed.synchronize()
        losses, norms = self.values.tolist()
        return losses, norms


class _Run:
    """One call of the engine.

    running: {slot: its trial}. waiting: trials without a slot. unread: the last step, if its trials have not counted it
    yet. read_at: `perf_counter` after the step before it was read. writer: the thread that writes checkpoints.
    """

    def __init__(self, engine: MultiLoraEngine, source: TrialSource, observer: Observer) -> None:
        self.engine, self.source, self.observer = engine, source, observer
        self.settings, self.model = engine.settings, engine.model
        self.running: dict[int, TrialState] = {}
        self.waiting: deque[_Waiting] = deque()
        self.unread: _Step | None = None
        self.read_at = 0.0
        self.writer = ThreadPoolExecutor(1)
        self.ask = True  # after a None, the source is asked again once a slot falls free or an evaluation is over

    def until_done(self) -> None:
        """Take steps and evaluate until no trial is left or a stop is requested; then empty the slots."""
        try:
            while not self.observer.stop_requested():
                short_of_memory = False
                try:
                    if not self._advance():
                        return
                except torch.OutOfMemoryError:
                    short_of_memory = True
                if short_of_memory:  # outside of the handler, whose traceback keeps the failed pass's memory alive
                    self._read()
                    self._halve()
            self._read()
            for trial, state in self._take_all():
                self._checkpointed(trial, self._write(trial, state) if trial.changed else None)
        except StorageError:
            raise
        except Exception as error:
            for trial in [*self.running.values(), *(trial for trial, _ in self.waiting)]:
                self.observer.failed(trial.plan.trial, error)
            raise
        finally:
            self.writer.shutdown(cancel_futures=True)
            self.model.resize(len(self.model.slots))

    def _advance(self) -> bool:
        """Evaluate the trials that are due, else take one step; False when no trial is left."""
        if any(trial.due(self._ahead(slot)) for slot, trial in self.running.items()):
            self._read()
        self._fill()
        if not self.running:
            return False
        due = [slot for slot, trial in self.running.items() if trial.due()]
        if due:
            with suppress(_Stopped):  # still due: evaluated when the trial resumes
                self._evaluate(due)
        else:
            self._step()
        return True

    # Slots -----------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give every free slot to a waiting trial, else to the next trial of the source."""
        for slot in range(len(self.model.slots)):
            if slot in self.running:
                continue
            while not self.waiting and self.ask:
                plan = self.source.next()
                self.ask = plan is not None
                if plan is not None:
                    self._admit(plan)
            if self.waiting:
                first = self.waiting[0]
                self.model.slots.place(slot, first.trial.plan.spec, first.state)
                self.running[slot] = self.waiting.popleft().trial

    def _admit(self, plan: TrialPlan) -> None:
        try:
            plan.folder.mkdir(parents=True, exist_ok=True)
            if plan.checkpoint is None:
                progress = TrainProgress()
                state = SlotState.fresh(fresh_weights(self.engine.base, plan, len(self.engine.labels)))
            else:
                progress, state = read_checkpoint(plan)
        except Exception as error:
            self.observer.failed(plan.trial, error)
            if not isinstance(error, TRIAL_FAULTS):
                raise
        else:
            self.waiting.append(_Waiting(TrialState(plan, self.settings, self.engine.lengths, progress), state))

    def _free(self, slot: int) -> TrialState:
        self.model.slots.clear(slot)
        self.ask = True
        return self.running.pop(slot)

    def _fail(self, slot: int, error: Exception) -> None:
        self.observer.failed(self._free(slot).plan.trial, error)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Take a step of all trials; read late, the device computes it while the next one is packed."""
        began = time.perf_counter()
        batches = [trial.batch(slot, self._ahead(slot)) for slot, trial in self.running.items()]
        values = self.model.step(self.engine.train, batches, self.settings.weight_decay, self.settings.max_grad_norm)
        step = _Step(dict(self.running), began, values)
        self._read()
        self.unread = step
        if not self.engine.reads_late:
            self._read()

    def _ahead(self, slot: int) -> int:
        """Give the number of steps, 0 or 1, that the trial in a slot has taken and not counted."""
        return int(self.unread is not None and self.unread.trials.get(slot) is self.running[slot])

    def _read(self) -> None:
        """Wait for the unread step, if there is one, and let its trials count it."""
        step, self.unread = self.unread, None
        if step is None:
            return
        losses, norms = step.read()
        now = time.perf_counter()
        seconds, self.read_at = now - max(step.began, self.read_at), now
        points: list[TrainPoint] = []
        for slot, trial in step.trials.items():
            if self.running.get(slot) is not trial:
                continue  # it failed in the step before, when this one had been taken
            try:
                trial.advance(losses[slot], norms[slot], seconds)
            except TrainingError as error:
                self._fail(slot, error)
            else:
                points += trial.take_points() if trial.log_due else []
        if points:
            self.observer.logged(points)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _write(self, trial: TrialState, state: SlotState) -> Future[None]:
        return self.writer.submit(write_checkpoint, trial.plan, trial.progress, state)

    def _checkpointed(self, trial: TrialState, write: Future[None] | None) -> None:
        """Report a trial's checkpoint, once it is sealed; without a write, the last one, which is up to date."""
        if write is not None:
            write.result()
            trial.saved = replace(trial.progress)
        plan, step = trial.plan, trial.progress.step
        self.observer.checkpointed(plan.trial, step, folder_of(plan.folder, step))

    # Evaluations -----------------------------------------------------------------------------------------------------

    def _evaluate(self, due: list[int]) -> None:
        """Checkpoint all slots due while they are scored together, and let the observer judge them together."""
        # A trial that has not changed was reported: its evaluation was interrupted, or it starts here.
        changed = [(slot, self.running[slot]) for slot in due if self.running[slot].changed]
        writes = [(trial, self._write(trial, self.model.slots.take(slot))) for slot, trial in changed]
        whole = range(len(self.engine.validation.lengths))
        scores: list[_Scores] = []
        try:
            for rows, ended in ((self.engine.monitor, False), (whole, True)):
                if slots := [slot for slot in due if self.running[slot].ended == ended]:
                    scores.append(self._score(slots, rows))
        finally:
            for trial, write in writes:
                self._checkpointed(trial, write)
        scored = {slot: point for each in scores for slot, point in self._points(each)}
        verdicts = self.observer.evaluated(list(scored.values())) if scored else []
        self.ask = True
        for (slot, point), verdict in zip(scored.items(), verdicts, strict=True):
            trial = self.running[slot]
            trial.progress.evaluated = point.step
            if point.final:
                trial.final = point
                self._finish(slot)
            elif verdict is Verdict.PRUNE:
                if points := trial.take_points():
                    self.observer.logged(points)
                self._end(slot, adapter=None)

    def _score(self, slots: list[int], rows: Sequence[int]) -> _Scores:
        """Score `slots` on `rows` of the validation split. The logits stay on the device until all are computed."""
        began = time.perf_counter()
        engine = self.engine
        logits = torch.empty(len(slots), len(rows), len(engine.labels), device=engine.device)
        for positions, batch in self.model.logits(engine.validation, rows, slots, self.settings.eval_batch_size):
            logits.index_copy_(1, on_device([np.array(positions)], engine.device)[0], batch)
            if self.observer.stop_requested():
                raise _Stopped
        found, labels = logits.cpu().numpy(), engine.validation.labels.cpu().numpy()[np.asarray(rows)]
        return _Scores(slots, found, labels, time.perf_counter() - began)

    def _points(self, scores: _Scores) -> Iterator[tuple[int, EvalPoint]]:
        """Give each slot and its point; a loss that is not finite fails its trial."""
        for slot, logits in zip(scores.slots, scores.logits, strict=True):
            try:
                yield slot, self.running[slot].score(logits, scores.labels, scores.seconds)
            except TrainingError as error:
                self._fail(slot, error)

    # Ends ------------------------------------------------------------------------------------------------------------

    def _finish(self, slot: int) -> None:
        trial, engine = self.running[slot], self.engine
        weights = self.model.slots.take(slot).weights
        try:
            plan, max_length = trial.plan, self.settings.max_length
            record = record_of(plan.trial, plan.spec, engine.base, engine.labels, max_length, engine.clean)
            adapter = export_adapter(engine.base, plan, record, weights)
        except TRIAL_FAULTS as error:
            self._fail(slot, error)
        else:
            self._end(slot, adapter)

    def _end(self, slot: int, adapter: Path | None) -> None:
        trial = self._free(slot)
        self.observer.finished(
            TrialResult(
                trial=trial.plan.trial,
                steps=trial.progress.step,
                total_steps=trial.total_steps,
                final=trial.final,
                adapter=adapter,
                trainable_parameters=trainable_parameters(trial.plan.spec, self.engine.base.shape),
                rows_seen=trial.rows_seen(),
                train_seconds=trial.train_seconds,
                eval_seconds=trial.eval_seconds,
                peak_memory_bytes=peak_memory_bytes(self.engine.device),
            )
        )

    def _take_all(self) -> list[_Waiting]:
        """Copy all trials out of their slots, in the order in which they came, followed by those that wait."""
        running = [_Waiting(trial, self.model.slots.take(slot)) for slot, trial in self.running.items()]
        return [*running, *self.waiting]

    def _halve(self) -> None:
        """Continue with half of the slots; the other trials wait, as they were before the step that failed."""
        self.waiting = deque(self._take_all())
        self.running.clear()
        if len(self.model.slots) == 1:
            trial = self.waiting.popleft().trial
            error = TrainingError(
                f"Cannot train {trial.plan.trial} ({trial.plan.spec}): it does not fit the device even alone. Use a "
                "smaller batch_size, eval_batch_size or max_length."
            )
            self.observer.failed(trial.plan.trial, error)
            self.ask = True
        self.model.resize(max(1, len(self.model.slots) // 2))
        gc.collect()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
