"""K adapters over one frozen encoder: one training step of all of them, and the logits of some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from agnews_lora.adapters.spec import ModelShape
from agnews_lora.training.metrics import by_length
from agnews_lora.training.multilora import optimizer
from agnews_lora.training.multilora.compile import LayerCompiler
from agnews_lora.training.multilora.dropout import DropoutKey
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.lora import BatchedLora
from agnews_lora.training.multilora.packing import DeviceTokens, PackedBatch, on_device
from agnews_lora.training.multilora.slots import Slots
from agnews_lora.training.multilora.threads import Threads

Gradients = tuple[torch.Tensor, torch.Tensor]  # ([K] mean losses, [K, columns] gradients)


@dataclass(frozen=True)
class SlotBatch:
    """One step of a slot: its rows, learning rate, the step's number (from 1), and the seed of its dropout."""

    slot: int
    rows: Sequence[int]
    learning_rate: float
    step: int
    seed: int


class MultiLoraModel:
    """Slots over a frozen encoder, in the encoder's precision (weights and moments stay fp32).

    A GPU computes all slots' batches in one pass. On a CPU each thread computes passes of its own, over a share of one
    slot's batch: threads that share every product instead spend a third of the time waiting for each other.
    """

    def __init__(self, encoder: Encoder, shape: ModelShape, num_slots: int) -> None:
        self.encoder = encoder
        self.shape = shape
        self.device, self.dtype = encoder.device, encoder.dtype
        self.threads = Threads() if self.device.type == "cpu" else None
        self.compiler = LayerCompiler(self.device)
        self.slots = Slots(num_slots, shape, self.device)

    def resize(self, num_slots: int) -> None:
        """Start again with `num_slots` empty slots."""
        self.slots = Slots(num_slots, self.shape, self.device)

    def step(
        self, tokens: DeviceTokens, batches: Sequence[SlotBatch], weight_decay: float, max_grad_norm: float
    ) -> torch.Tensor:
        """Train each slot on its batch; [2, K] mean losses and gradient norms before clipping, on the device.

        On CUDA, this returns before the device has computed them.
        """
        keys = self._dropout_keys(batches)

        def update(losses: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
            norms = optimizer.clip(self.slots, gradients, max_grad_norm)
            optimizer.step(self.slots, gradients, self._steps(batches), weight_decay)
            return torch.stack([losses, norms])

        if self.threads is None:
            packed = tokens.pack([(batch.slot, batch.rows) for batch in batches])
            return update(*self.compiler.run(lambda: self.gradients(packed, keys)))
        shares = [(batch, rows) for batch in batches for rows in self.threads.shares(batch.rows)]

        def gradients_of(share: tuple[SlotBatch, Sequence[int]]) -> Gradients:
            batch, rows = share
            return self.gradients(tokens.pack([(batch.slot, rows)]), keys)

        passes = list(self.threads.map(gradients_of, shares))
        return self.threads.alone(lambda: update(*self._sum(shares, passes)))

    def _sum(self, shares: Sequence[tuple[SlotBatch, Sequence[int]]], passes: Sequence[Gradients]) -> Gradients:
        """The gradients of whole batches, from those of their shares."""
        losses, gradients = torch.zeros(len(self.slots)), torch.zeros_like(self.slots.weights)
        for (batch, rows), (loss, gradient) in zip(shares, passes, strict=True):
            share = len(rows) / len(batch.rows)
            losses[batch.slot] += loss[batch.slot] * share
            gradients[batch.slot] += gradient[batch.slot] * share
        return losses, gradients

    def gradients(self, packed: PackedBatch, keys: dict[int, DropoutKey]) -> Gradients:
        """Mean cross entropy of each slot and its gradients: a slot's own loss reaches its own columns only.

        Args:
            keys: {slot: key of its dropout}; a slot without one drops nothing.
        """
        leaf = self.slots.weights.detach().requires_grad_()
        logits = self._logits(BatchedLora(self.slots, leaf, packed, self.dtype, keys))
        num_slots, longest, classes = logits.shape
        labels = logits.new_zeros(num_slots * longest, dtype=torch.int64)
        shares = logits.new_zeros(num_slots * longest)
        labels[packed.places] = packed.labels
        shares[packed.places] = packed.shares
        each = F.cross_entropy(logits.view(-1, classes), labels, reduction="none")
        losses = (each * shares).view(num_slots, longest).sum(dim=1)
        [gradients] = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradients

    def logits(
        self, tokens: DeviceTokens, rows: Sequence[int], slots: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Score `slots` together: (positions in `rows`, logits [len(slots), positions, classes]) of each batch.

        On CUDA, a batch's logits lie on the device, and are given before it has computed them.
        """
        ids = np.asarray(rows)
        [chosen] = on_device([np.asarray(slots)], self.device)
        batches = by_length(tokens.lengths[ids], batch_size)

        def scored(positions: list[int]) -> torch.Tensor:
            with torch.no_grad():
                packed = tokens.pack([(slot, ids[positions].tolist()) for slot in slots])
                lora = BatchedLora(self.slots, self.slots.weights, packed, self.dtype, {})
                return self.compiler.run(lambda: self._logits(lora)).index_select(0, chosen)

        yield from zip(batches, (self.threads.map if self.threads else map)(scored, batches), strict=True)

    def _logits(self, lora: BatchedLora) -> torch.Tensor:
        packed = lora.packed
        return lora.logits(self.encoder(packed, lora.layers, self.compiler.layer_function(packed.flat)))

    def _dropout_keys(self, batches: Sequence[SlotBatch]) -> dict[int, DropoutKey]:
        keys = {}
        for batch in batches:
            spec = self.slots.specs[batch.slot]
            if spec is not None and spec.dropout > 0:
                keys[batch.slot] = DropoutKey(spec.dropout, batch.seed, batch.step)
        return keys

    def _steps(self, batches: Sequence[SlotBatch]) -> optimizer.SlotSteps:
        rates, numbers = [0.0] * len(self.slots), [1] * len(self.slots)
        for batch in batches:
            rates[batch.slot], numbers[batch.slot] = batch.learning_rate, batch.step
        return optimizer.SlotSteps.of(rates, numbers, self.device)
