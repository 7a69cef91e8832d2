"""The multi-LoRA engine: K trials at once, each in a slot, that come and go without the others noticing."""

import gc
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.budget import trainable_parameters
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
    TrialSource,
    Verdict,
)
from agnews_lora.training.multilora.checkpoint import read_checkpoint, write_checkpoint
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.export import export_adapter, fresh_weights
from agnews_lora.training.multilora.memory import choose_slots
from agnews_lora.training.multilora.model import Core
from agnews_lora.training.multilora.packing import TokenStore
from agnews_lora.training.multilora.slots import SlotState
from agnews_lora.training.multilora.trial_state import Progress, Trial

# What ends one trial and leaves the others sound. Everything else is a fault of the program: reported, then raised.
TRIAL_FAULTS = (TrainingError, BudgetError, AdapterError)


class MultiLoraEngine:
    """Trains up to `slots` trials at once on one device; without a number, as many as fit it.

    Owns the device, the frozen encoder, the token tables on the device and the settings that all trials share.

    Raises:
        ConfigError: dropout inside the base was asked for.
        TrainingError: bf16 was asked for and the device does not have it.
        BaseModelError: an encoder that this engine does not compute.
    """

    def __init__(
        self, base: BaseModel, corpus: Corpus, settings: TrainSettings, labels: Sequence[str], slots: int | None = None
    ) -> None:
        if settings.base_dropout > 0:
            raise ConfigError(
                f"engine multilora trains without dropout inside the base, but base_dropout is "
                f"{settings.base_dropout}; set it to 0, or take `engine: trainer`"
            )
        self.base = base
        self.settings = settings
        self.labels = tuple(labels)
        self.device = training_device()
        dtype = torch.bfloat16 if computes_in_bf16(self.device, settings.precision) else torch.float32
        encoder = Encoder(load_base(base, len(self.labels)), base.shape.family, self.device, dtype)
        flat = self.device.type == "cuda" and dtype == torch.bfloat16  # what flash attention computes
        self.train = TokenStore(corpus.train, self.device, flat)
        self.validation = TokenStore(corpus.validation, self.device, flat)
        self.monitor = corpus.monitor
        self.lengths = corpus.train.lengths.tolist()
        self.core = Core(encoder, base.shape, slots or 1)
        if slots is None:
            self.core.resize(choose_slots(self.core, self.train, settings.batch_size))

    def run(self, source: TrialSource, observer: Observer) -> None:
        """Train what `source` gives until all slots are empty and it gives None, or until a stop is requested.

        Raises:
            StorageError: a checkpoint cannot be written. No trial fails of it: each goes on from its last one.
        """
        _Run(self, source, observer).until_done()


class _Stopped(Exception):
    """Leaves an evaluation that a stop breaks off."""


@dataclass
class _Waiting:
    """A trial without a slot, and what it will put into one."""

    trial: Trial
    state: SlotState


class _Run:
    """One call of the engine: who is in which slot, and who waits for one."""

    def __init__(self, engine: MultiLoraEngine, source: TrialSource, observer: Observer) -> None:
        self.engine, self.source, self.observer = engine, source, observer
        self.settings, self.core = engine.settings, engine.core
        self.running: dict[int, Trial] = {}
        self.waiting: deque[_Waiting] = deque()
        self.ask = True  # a None holds until a place falls free or an evaluation is over

    def until_done(self) -> None:
        """Steps and evaluations, until nothing is left or a stop is requested; the slots are empty then."""
        try:
            while not self.observer.stop_requested():
                short_of_memory = False
                try:
                    if not self._advance():
                        return
                except torch.OutOfMemoryError:
                    short_of_memory = True
                if short_of_memory:  # outside of the handler, whose traceback holds the failed pass's memory
                    self._halve()
            for each in self._take_all():
                self._checkpoint(each.trial, each.state)
        except StorageError:
            raise
        except Exception as error:
            for trial in [*self.running.values(), *(each.trial for each in self.waiting)]:
                self.observer.failed(trial.plan.trial, error)
            raise
        finally:
            self.core.resize(len(self.core.slots))

    def _advance(self) -> bool:
        """One evaluation where any is due, else one step; False when nothing is left to train."""
        self._fill()
        if not self.running:
            return False
        due = [slot for slot, trial in self.running.items() if trial.due]
        if due:
            with suppress(_Stopped):  # still due: evaluated when the trial goes on
                self._evaluate(due)
        else:
            self._step()
        return True

    # Places ----------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give every free slot to a trial that waits, else to the next that the source has."""
        for slot in range(len(self.core.slots)):
            if slot in self.running:
                continue
            while not self.waiting and self.ask:
                plan = self.source.next()
                self.ask = plan is not None
                if plan is not None:
                    self._admit(plan)
            if self.waiting:
                first = self.waiting[0]
                self.core.slots.place(slot, first.trial.plan.spec, first.state)
                self.running[slot] = self.waiting.popleft().trial

    def _admit(self, plan: TrialPlan) -> None:
        try:
            plan.folder.mkdir(parents=True, exist_ok=True)
            if plan.checkpoint is None:
                progress = Progress()
                state = SlotState.fresh(fresh_weights(self.engine.base, plan, len(self.engine.labels)))
            else:
                progress, state = read_checkpoint(plan)
        except TRIAL_FAULTS as error:
            self.observer.failed(plan.trial, error)
        except Exception as error:
            self.observer.failed(plan.trial, error)
            raise
        else:
            self.waiting.append(_Waiting(Trial(plan, self.settings, self.engine.lengths, progress), state))

    def _free(self, slot: int) -> Trial:
        self.core.slots.clear(slot)
        self.ask = True
        return self.running.pop(slot)

    def _fail(self, slot: int, error: Exception) -> None:
        self.observer.failed(self._free(slot).plan.trial, error)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        began = time.perf_counter()
        batches = [trial.batch(slot) for slot, trial in self.running.items()]
        losses, norms = self.core.step(
            self.engine.train, batches, self.settings.weight_decay, self.settings.max_grad_norm
        )
        seconds = time.perf_counter() - began
        points = []
        for slot, trial in list(self.running.items()):
            try:
                trial.advance(losses[slot], norms[slot], seconds)
            except TrainingError as error:
                self._fail(slot, error)
            else:
                points.append(trial.point_if_due())
        self._log(points)

    def _log(self, points: Iterable[TrainPoint | None]) -> None:
        if due := [point for point in points if point is not None]:
            self.observer.logged(due)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _checkpoint(self, trial: Trial, state: SlotState) -> None:
        """Write the trial's checkpoint, where it has none that says the same, and report it."""
        if trial.changed:
            write_checkpoint(trial.plan, trial.progress, state)
            trial.saved = replace(trial.progress)
        plan, step = trial.plan, trial.progress.step
        self.observer.checkpointed(plan.trial, step, folder_of(plan.folder, step))

    # Evaluations -----------------------------------------------------------------------------------------------------

    def _evaluate(self, due: list[int]) -> None:
        """Checkpoint all slots due, score them together, and let the observer judge them together."""
        for slot in due:
            if self.running[slot].changed:  # else it is known: the evaluation was broken off, or goes on here
                self._checkpoint(self.running[slot], self.core.slots.take(slot))
        whole = range(len(self.engine.validation.lengths))
        scored: dict[int, EvalPoint] = {}
        for rows, ended in ((self.engine.monitor, False), (whole, True)):
            if slots := [slot for slot in due if self.running[slot].ended == ended]:
                scored |= self._score(slots, rows)
        verdicts = self.observer.evaluated(list(scored.values())) if scored else []
        self.ask = True
        for (slot, point), verdict in zip(scored.items(), verdicts, strict=True):
            trial = self.running[slot]
            trial.progress.evaluated = point.step
            if point.final:
                trial.final = point
                self._finish(slot)
            elif verdict is Verdict.PRUNE:
                self._log([trial.point()])
                self._end(slot, adapter=None)

    def _score(self, slots: list[int], rows: Sequence[int]) -> dict[int, EvalPoint]:
        """{slot: its point} over `rows` of the validation split; a slot whose loss is not finite fails and has none."""
        began = time.perf_counter()
        validation = self.engine.validation
        logits = np.empty((len(slots), len(rows), len(self.engine.labels)), dtype=np.float32)
        for positions, batch in self.core.logits(validation, rows, slots, self.settings.eval_batch_size):
            logits[:, positions] = batch
            if self.observer.stop_requested():
                raise _Stopped
        labels = validation.labels.cpu().numpy()[np.asarray(rows)]
        seconds = time.perf_counter() - began
        points = {}
        for slot, own in zip(slots, logits, strict=True):
            try:
                points[slot] = self.running[slot].score(own, labels, seconds)
            except TrainingError as error:
                self._fail(slot, error)
        return points

    # Ends ------------------------------------------------------------------------------------------------------------

    def _finish(self, slot: int) -> None:
        trial, engine = self.running[slot], self.engine
        weights = self.core.slots.take(slot).weights
        try:
            adapter = export_adapter(engine.base, trial.plan, engine.labels, self.settings.max_length, weights)
        except TRIAL_FAULTS as error:
            self._fail(slot, error)
        else:
            self._end(slot, adapter)

    def _end(self, slot: int, adapter: Path | None) -> None:
        trial = self._free(slot)
        counted = trainable_parameters(trial.plan.spec, self.engine.base.shape)
        self.observer.finished(trial.result(adapter, counted, peak_memory_bytes(self.engine.device)))

    def _take_all(self) -> list[_Waiting]:
        """Everyone, out of the slots and of the queue, the longest in place first."""
        running = [_Waiting(trial, self.core.slots.take(slot)) for slot, trial in self.running.items()]
        return [*running, *self.waiting]

    def _halve(self) -> None:
        """Go on with half of the slots; whoever has none left waits, as it stood before the step that failed."""
        self.waiting = deque(self._take_all())
        self.running.clear()
        if len(self.core.slots) == 1:
            trial = self.waiting.popleft().trial
            error = TrainingError(
                f"trial {trial.plan.trial} ({trial.plan.spec}) does not fit the device even alone; use a smaller "
                "batch_size, eval_batch_size or max_length"
            )
            self.observer.failed(trial.plan.trial, error)
            self.ask = True
        self.core.resize(max(1, len(self.core.slots) // 2))
        gc.collect()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
