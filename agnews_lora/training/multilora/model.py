"""K adapters over one frozen encoder: one training step of all of them, and the logits of some."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from agnews_lora.adapters.spec import ModelShape
from agnews_lora.training.metrics import by_length
from agnews_lora.training.multilora.dropout import DropoutKey
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.graphs import MOST_TOKENS, StepGraphs
from agnews_lora.training.multilora.kernels import KernelChoice
from agnews_lora.training.multilora.layer import EncoderPass
from agnews_lora.training.multilora.lora import BatchedLora, slot_arrays
from agnews_lora.training.multilora.optimizer import SlotSteps, step_array
from agnews_lora.training.multilora.packing import DeviceTokens, PackedBatch, on_device
from agnews_lora.training.multilora.slots import Slots
from agnews_lora.training.multilora.threads import Threads

Gradients = tuple[torch.Tensor, torch.Tensor]  # mean losses and gradients [..., columns], of slots or segments


@dataclass(frozen=True)
class SlotBatch:
    """One step of a slot: its rows, learning rate, the step's number (from 1), and the seed of its dropout."""

    slot: int
    rows: Sequence[int]
    learning_rate: float
    step: int
    seed: int


Share = tuple[SlotBatch, Sequence[int]]  # a batch, and the rows of it that one pass computes


class MultiLoraModel:
    """Slots over a frozen encoder, in the encoder's precision (weights and moments stay fp32).

    A GPU computes all slots' batches in one pass. On a CPU each thread computes passes of its own, over one slot's
    batch or a share of it: threads that share every product instead spend a third of the time waiting for each other.

    choice: of the kernels that compute the layers. graphs: of steps that are replayed.
    """

    def __init__(self, encoder: Encoder, shape: ModelShape, num_slots: int) -> None:
        self.encoder = encoder
        self.shape = shape
        self.device, self.dtype = encoder.device, encoder.dtype
        self.threads = Threads() if self.device.type == "cpu" else None
        self.choice = KernelChoice(encoder.layers, self.device, self.dtype)
        self.graphs = StepGraphs(self.device)
        self.slots = Slots(num_slots, shape, self.device)

    def resize(self, num_slots: int) -> None:
        """Start again with `num_slots` empty slots."""
        self.graphs.clear()
        self.slots = Slots(num_slots, self.shape, self.device)

    def step(
        self, tokens: DeviceTokens, batches: Sequence[SlotBatch], weight_decay: float, max_grad_norm: float
    ) -> torch.Tensor:
        """Train each slot on its batch; [2, K] mean losses and gradient norms before clipping, on the device.

        On CUDA, this returns before the device has computed them.
        """
        if self.threads is None:
            return self.choice.run(lambda: self._step_at_once(tokens, batches, weight_decay, max_grad_norm))
        keys, cut = self._dropout_keys(batches), self._shares(batches)

        def gradients_of(shares: Sequence[Share]) -> Gradients:
            packed = tokens.pack([(batch.slot, rows) for batch, rows in shares])
            return self.choice.run(lambda: self.gradients(packed, keys))

        def update() -> torch.Tensor:
            losses, gradients = self._of_slots(cut, passes)
            steps, kernels = SlotSteps.of(*self._rates(batches), self.device), self.choice
            norms = kernels.run(
                lambda: kernels.kernels.adamw(self.slots, gradients, steps, weight_decay, max_grad_norm)
            )
            return torch.stack([losses, norms])

        passes = list(self.threads.map(gradients_of, cut))
        return self.threads.alone(update)

    def _step_at_once(
        self, tokens: DeviceTokens, batches: Sequence[SlotBatch], weight_decay: float, max_grad_norm: float
    ) -> torch.Tensor:
        """Compute a step in one pass, of arrays that are copied to the device first: nothing else differs in the next
        one with batches of these sizes."""
        keys, kernels = self._dropout_keys(batches), self.choice.kernels
        most = MOST_TOKENS if kernels.replays and not self.graphs.reason else 0
        layout = tokens.layout([(batch.slot, batch.rows) for batch in batches], most)
        of_slots = slot_arrays(self.slots, layout.slots, keys)
        arrays = [*layout.arrays, *of_slots, step_array(*self._rates(batches))]

        def compute(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            packed = tokens.packed(layout, parts[: len(layout.arrays)])
            passes = [self.gradients(packed, keys, parts[len(layout.arrays) : -1])]
            losses, gradients = self._of_slots([[(batch, batch.rows) for batch in batches]], passes)
            norms = kernels.adamw(self.slots, gradients, SlotSteps(*parts[-1]), weight_decay, max_grad_norm)
            return torch.stack([losses, norms])

        if layout.num_tokens > most:
            return compute(on_device(arrays, self.device))
        sizes = tokens, layout.shape, weight_decay, max_grad_norm
        return self.graphs.run(self.slots.version, sizes, arrays, compute)

    def _shares(self, batches: Sequence[SlotBatch]) -> list[list[Share]]:
        """Cut batches for the threads: passes of one share each."""
        assert self.threads is not None
        shares = self.threads.shares([batch.rows for batch in batches])
        return [[(batch, rows)] for batch, own in zip(batches, shares, strict=True) for rows in own]

    def _of_slots(self, cut: Sequence[Sequence[Share]], passes: Sequence[Gradients]) -> Gradients:
        """The losses and gradients of all slots, from those of the segments of some passes."""
        if len(passes) == 1 and len(cut[0]) == len(self.slots):
            return passes[0]
        losses, gradients = torch.zeros(len(self.slots), device=self.device), torch.zeros_like(self.slots.weights)
        for shares, found in zip(cut, passes, strict=True):
            ordered = sorted(shares, key=lambda share: share[0].slot)  # as their segments are
            for (batch, rows), loss, gradient in zip(ordered, *found, strict=True):
                part = len(rows) / len(batch.rows)
                losses[batch.slot] += loss * part
                gradients[batch.slot].add_(gradient, alpha=part)
        return losses, gradients

    def gradients(
        self, packed: PackedBatch, keys: Mapping[int, DropoutKey], arrays: Sequence[torch.Tensor] | None = None
    ) -> Gradients:
        """Mean cross entropy [S] of each segment and its gradients [S, columns]: its loss reaches its own slot only.

        Args:
            keys: {slot: key of its dropout}; a slot without one drops nothing.
            arrays: those of `slot_arrays`, if they are on the device already.
        """
        with torch.no_grad():
            lora = BatchedLora(self.slots, packed, self.dtype, keys, training=True, arrays=arrays)
            encoded = EncoderPass(self.choice.kernels, self.encoder.layers, lora.layers, packed, training=True)
            x = encoded.forward(self.encoder.embed(packed))
        x.requires_grad_()
        head = {name: part.requires_grad_() for name, part in lora.head().items()}
        logits = lora.logits(self.encoder.pool(x), head)
        num_segments, longest, classes = logits.shape
        labels = logits.new_zeros(num_segments * longest, dtype=torch.int64)
        shares = logits.new_zeros(num_segments * longest)
        labels[packed.places] = packed.labels
        shares[packed.places] = packed.shares
        each = F.cross_entropy(logits.view(-1, classes), labels, reduction="none")
        losses = (each * shares).view(num_segments, longest).sum(dim=1)
        of_x, *of_head = torch.autograd.grad(losses.sum(), [x, *head.values()])
        with torch.no_grad():
            encoded.backward(of_x)
            return losses.detach(), lora.gradients(dict(zip(head, of_head, strict=True)))

    def logits(
        self, tokens: DeviceTokens, rows: Sequence[int], slots: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Score `slots` together: (positions in `rows`, logits [len(slots), positions, classes]) of each batch.

        On CUDA, a batch's logits lie on the device, and are given before it has computed them.
        """
        ids = np.asarray(rows)
        [chosen] = on_device([np.array([sorted(slots).index(slot) for slot in slots])], self.device)
        if self.threads is not None:
            batch_size = max(1, batch_size // len(slots))  # a pass over more rows leaves the caches of a core
        batches = by_length(tokens.lengths[ids], batch_size)

        def scored(positions: list[int]) -> torch.Tensor:
            with torch.no_grad():
                packed = tokens.pack([(slot, ids[positions].tolist()) for slot in slots])
                lora = BatchedLora(self.slots, packed, self.dtype, {}, training=False)
                return self.choice.run(lambda: self._logits(lora)).index_select(0, chosen)

        yield from zip(batches, (self.threads.map if self.threads else map)(scored, batches), strict=True)

    def _logits(self, lora: BatchedLora) -> torch.Tensor:
        encoded = EncoderPass(self.choice.kernels, self.encoder.layers, lora.layers, lora.packed, training=False)
        x = encoded.forward(self.encoder.embed(lora.packed))
        return lora.logits(self.encoder.pool(x), lora.head())

    def _dropout_keys(self, batches: Sequence[SlotBatch]) -> dict[int, DropoutKey]:
        keys = {}
        for batch in batches:
            spec = self.slots.specs[batch.slot]
            if spec is not None and spec.dropout > 0:
                keys[batch.slot] = DropoutKey(spec.dropout, batch.seed, batch.step)
        return keys

    def _rates(self, batches: Sequence[SlotBatch]) -> tuple[list[float], list[int]]:
        """Give learning rate and step number of all slots."""
        rates, numbers = [0.0] * len(self.slots), [1] * len(self.slots)
        for batch in batches:
            rates[batch.slot], numbers[batch.slot] = batch.learning_rate, batch.step
        return rates, numbers
