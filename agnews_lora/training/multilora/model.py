"""The arithmetic of K slots: one training step of all of them, and the logits of some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from agnews_lora.adapters.spec import ModelShape
from agnews_lora.training.evaluation import by_length
from agnews_lora.training.multilora import optimizer
from agnews_lora.training.multilora.compile import Encoding
from agnews_lora.training.multilora.dropout import Draw
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.lora import Adaptation
from agnews_lora.training.multilora.packing import Packing, TokenStore, on_device
from agnews_lora.training.multilora.slots import Slots
from agnews_lora.training.multilora.threads import Threads


@dataclass(frozen=True)
class SlotBatch:
    """What a slot does in one step: rows, learning rate, the step's number (from 1), and the seed of its dropout."""

    slot: int
    rows: Sequence[int]
    learning_rate: float
    step: int
    seed: int


class Core:
    """Slots over a frozen encoder, in the precision that is computed in (weights and moments stay fp32).

    A GPU computes all slots' batches in one pass. On a CPU each thread computes passes of its own, over a share of one
    slot's batch: threads that share every product instead spend a third of the time waiting for each other.
    """

    def __init__(self, encoder: Encoder, shape: ModelShape, num_slots: int) -> None:
        self.encoder = encoder
        self.shape = shape
        self.device, self.dtype = encoder.device, encoder.dtype
        self.threads = Threads() if self.device.type == "cpu" else None
        self.encoding = Encoding(self.device)
        self.slots = Slots(num_slots, shape, self.device)

    def resize(self, num_slots: int) -> None:
        """Start again with `num_slots` empty slots."""
        self.slots = Slots(num_slots, self.shape, self.device)

    def step(
        self, store: TokenStore, batches: Sequence[SlotBatch], weight_decay: float, max_grad_norm: float
    ) -> tuple[list[float], list[float]]:
        """Train each slot on its batch; ([K] mean losses, [K] gradient norms before clipping)."""
        draws = self._draws(batches)

        def update(losses: torch.Tensor, gradients: torch.Tensor) -> tuple[list[float], list[float]]:
            norms = optimizer.clip(self.slots, gradients, max_grad_norm)
            optimizer.step(self.slots, gradients, self._steps(batches), weight_decay)
            [loss_values, norm_values] = torch.stack([losses, norms]).tolist()  # the only wait for the device in a step
            return loss_values, norm_values

        if self.threads is None:
            packing = store.pack([(batch.slot, batch.rows) for batch in batches])
            return update(*self.encoding.run(lambda: self.gradients(packing, draws)))
        shares = [(batch, rows) for batch in batches for rows in self.threads.shares(batch.rows)]
        passes = list(self.threads.map(lambda share: self._pass(store, *share, draws), shares))
        return self.threads.alone(lambda: update(*self._sum(shares, passes)))

    def _pass(
        self, store: TokenStore, batch: SlotBatch, rows: Sequence[int], draws: dict[int, Draw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `gradients` gives of a share of a slot's batch."""
        return self.gradients(store.pack([(batch.slot, rows)]), draws)

    def _sum(
        self, shares: Sequence[tuple[SlotBatch, Sequence[int]]], passes: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `gradients` gives of whole batches, from that of their shares."""
        losses, gradients = torch.zeros(len(self.slots)), torch.zeros_like(self.slots.weights)
        for (batch, rows), (loss, gradient) in zip(shares, passes, strict=True):
            share = len(rows) / len(batch.rows)
            losses[batch.slot] += loss[batch.slot] * share
            gradients[batch.slot] += gradient[batch.slot] * share
        return losses, gradients

    def gradients(self, packing: Packing, draws: dict[int, Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """([K] mean cross entropies, [K, columns] their gradients). A slot's own loss reaches its own columns only."""
        leaf = self.slots.weights.detach().requires_grad_()
        logits = self._logits(Adaptation(self.slots, leaf, packing, self.dtype, draws))
        num_slots, longest, classes = logits.shape
        labels = logits.new_zeros(num_slots * longest, dtype=torch.int64)
        shares = logits.new_zeros(num_slots * longest)
        labels[packing.places] = packing.labels
        shares[packing.places] = packing.shares
        each = F.cross_entropy(logits.view(-1, classes), labels, reduction="none")
        losses = (each * shares).view(num_slots, longest).sum(dim=1)
        [gradients] = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradients

    def logits(
        self, store: TokenStore, rows: Sequence[int], slots: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], npt.NDArray[np.float32]]]:
        """(positions in `rows`, logits [len(slots), positions, classes]) of all `slots` together, batch by batch."""
        ids = np.asarray(rows)
        batches = by_length(store.lengths[ids], batch_size)

        def scored(positions: list[int]) -> npt.NDArray[np.float32]:
            with torch.no_grad():
                packing = store.pack([(slot, ids[positions].tolist()) for slot in slots])
                adaptation = Adaptation(self.slots, self.slots.weights, packing, self.dtype, {})
                logits = self.encoding.run(lambda: self._logits(adaptation))
            return logits.cpu().numpy()[list(slots)]

        yield from zip(batches, (self.threads.map if self.threads else map)(scored, batches), strict=True)

    def _logits(self, adaptation: Adaptation) -> torch.Tensor:
        packing = adaptation.packing
        return adaptation.logits(self.encoder(packing, adaptation.layers, self.encoding.of(packing.flat)))

    def _draws(self, batches: Sequence[SlotBatch]) -> dict[int, Draw]:
        draws = {}
        for batch in batches:
            spec = self.slots.specs[batch.slot]
            if spec is not None and spec.dropout > 0:
                draws[batch.slot] = Draw(spec.dropout, batch.seed, batch.step)
        return draws

    def _steps(self, batches: Sequence[SlotBatch]) -> optimizer.SlotSteps:
        rates, numbers = [0.0] * len(self.slots), [1] * len(self.slots)
        for batch in batches:
            rates[batch.slot], numbers[batch.slot] = batch.learning_rate, batch.step
        steps = optimizer.SlotSteps.of(rates, numbers, torch.device("cpu"))
        values = (steps.learning_rates, steps.first_corrections, steps.second_corrections)
        return optimizer.SlotSteps(*on_device([value.numpy() for value in values], self.device))
