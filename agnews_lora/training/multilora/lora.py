"""The slots' part of a pass: the low-rank updates of all layers, one head per slot, and the gradients of both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agnews_lora.adapters.families import ATTENTION_OUTPUT, FFN_IN, FFN_OUT, KEY, QUERY, VALUE
from agnews_lora.training.multilora.dropout import Dropout, DropoutKey, key_arrays
from agnews_lora.training.multilora.kernels.reference import Lora
from agnews_lora.training.multilora.layer import LayerUpdates
from agnews_lora.training.multilora.packing import PackedBatch, on_device
from agnews_lora.training.multilora.slots import MODULES, Slots

# Modules that read one input, in the order of `LayerUpdates`.
GROUPS = ((QUERY, KEY, VALUE), (ATTENTION_OUTPUT,), (FFN_IN,), (FFN_OUT,))
# Between the layers of the head.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


def slot_arrays(slots: Slots, chosen: Sequence[int], keys: Mapping[int, DropoutKey]) -> list[npt.NDArray[Any]]:
    """List what a pass over some slots is told of them: their numbers, the modules that they adapt, their dropout."""
    flags = [np.array(each, dtype=np.int32) for each in _adapts(slots, chosen)]
    drops = any(slot in keys for slot in chosen)
    return [np.array(chosen), *flags, *(key_arrays(chosen, keys) if drops else [])]


def _adapts(slots: Slots, chosen: Sequence[int]) -> list[list[list[bool]]]:
    return [[[slots.targets(slot, module) for slot in chosen] for module in modules] for modules in GROUPS]


class BatchedLora:
    """The LoRA modules and heads of a pass's slots.

    layers: the updates that they add to each layer.

    Args:
        keys: {slot: key of its dropout} of the slots that drop anything.
        training: whether gradients will be written.
        arrays: those of `slot_arrays`, if they are on the device already.
    """

    def __init__(
        self,
        slots: Slots,
        packed: PackedBatch,
        dtype: torch.dtype,
        keys: Mapping[int, DropoutKey],
        training: bool,
        arrays: Sequence[Tensor] | None = None,
    ) -> None:
        self.slots, self.packed = slots, packed
        chosen, *rest = arrays or on_device(slot_arrays(slots, packed.slots, keys), slots.device)
        flags, of_keys = rest[: len(GROUPS)], rest[len(GROUPS) :]
        first, last = packed.slots[0], packed.slots[-1]
        are_neighbours = last - first + 1 == len(packed.slots)
        self.chosen = slice(first, last + 1) if are_neighbours else chosen
        self.weights = self._of_segments(slots.weights)
        self.dropout = Dropout(packed, keys, of_keys) if of_keys else None
        adapts = _adapts(slots, packed.slots)
        groups = [self._group(*each, dtype, training) for each in zip(GROUPS, adapts, flags, strict=True)]
        self.groups = [(modules, group) for modules, group in zip(GROUPS, groups, strict=True) if group is not None]
        self.layers = [
            LayerUpdates(
                self.dropout.layer(number) if self.dropout else None,
                *(None if group is None else _layer(group, number) for group in groups),
            )
            for number in range(slots.shape.num_layers)
        ]

    def head(self) -> dict[str, Tensor]:
        """View {name: tensor [S, ...]} of the classifiers."""
        return {name: self._part(self.weights, name) for name in self.slots.shape.layout.head}

    def logits(self, features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """Compute fp32 logits [S, longest, classes] of `features` [rows, hidden]; a segment's rows lie at its start."""
        num_segments, longest = len(self.packed.slots), max(self.packed.firsts.sizes)
        padded = features.new_zeros(num_segments * longest, features.shape[1], dtype=torch.float32)
        x = padded.index_copy(0, self.packed.places, features.float()).view(num_segments, longest, -1)
        layout = self.slots.shape.layout
        first, last = next(iter(layout.head)).removesuffix(".weight"), layout.last_layer
        if first != last:
            x = ACTIVATIONS[layout.activation](_affine(x, head, first))
        return _affine(x, head, last)

    def gradients(self, of_head: Mapping[str, Tensor]) -> Tensor:
        """Collect the gradients [S, columns] of all weights, of those of the heads and those in `layers`."""
        gradients = torch.zeros_like(self.weights)
        for modules, lora in self.groups:
            assert lora.of_a is not None and lora.of_b is not None
            for m, module in enumerate(modules):
                if rank := self.slots.ranks.get(module, 0):
                    of_a, of_b = (of[:, m, :, :rank].transpose(0, 1) for of in (lora.of_a, lora.of_b))
                    self._part(gradients, f"{module}.A").copy_(of_a)
                    torch.mul(of_b.transpose(2, 3), self._scale(module), out=self._part(gradients, f"{module}.B"))
        for name, of_part in of_head.items():
            self._part(gradients, name).copy_(of_part)
        return gradients

    def _of_segments(self, of_slots: Tensor) -> Tensor:
        """Give the rows of the segments' slots, of those of all slots."""
        return of_slots[self.chosen] if isinstance(self.chosen, slice) else of_slots.index_select(0, self.chosen)

    def _part(self, matrix: Tensor, name: str) -> Tensor:
        """View a block's tensors [S, ...] in a matrix [S, columns]."""
        block = self.slots.blocks[name]
        return matrix[:, block.start : block.stop].view(-1, *block.shape)

    def _scale(self, module: str) -> Tensor:
        """Compute [S, 1, 1, 1] alpha / rank, times dropout's factor; 0 where a slot does not adapt the module."""
        scale = self._of_segments(self.slots.scales[module])
        if self.dropout:
            scale = scale * self.dropout.factors
        return scale[:, None, None, None]

    def _group(
        self,
        modules: Sequence[str],
        adapts: Sequence[Sequence[bool]],
        flags: Tensor,
        dtype: torch.dtype,
        training: bool,
    ) -> Lora | None:
        """Stack the updates of some modules of all layers: tensors [layers, M, S, ...]."""
        if not any(map(any, adapts)):
            return None
        slots, device = self.slots, self.slots.device
        sizes = (slots.shape.num_layers, *flags.shape)
        rank = max(slots.ranks.get(module, 0) for module in modules)
        known = [(m, module) for m, module in enumerate(modules) if module in slots.ranks]
        (in_features,) = {self._part(self.weights, f"{module}.A").shape[3] for _, module in known}
        (out_features,) = {self._part(self.weights, f"{module}.B").shape[2] for _, module in known}
        a, b = (torch.zeros(*sizes, rank, width, dtype=dtype, device=device) for width in (in_features, out_features))
        for m, module in known:
            # The scale goes into B, which is small.
            scaled = self._part(self.weights, f"{module}.B") * self._scale(module)
            a[:, m, :, : slots.ranks[module]] = self._part(self.weights, f"{module}.A").transpose(0, 1)
            b[:, m, :, : slots.ranks[module]] = scaled.permute(1, 0, 3, 2)
        of_a, of_b = (torch.zeros(each.shape, device=device) if training else None for each in (a, b))
        return Lora(a, b, of_a, of_b, tuple(map(tuple, adapts)), flags, tuple(map(MODULES.index, modules)))


def _layer(group: Lora, number: int) -> Lora:
    """View one layer of stacked updates."""
    of_a, of_b = (None if of is None else of[number] for of in (group.of_a, group.of_b))
    return Lora(group.a[number], group.b[number], of_a, of_b, group.adapts, group.flags, group.modules)


def _affine(x: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.baddbmm(parts[f"{name}.bias"][:, None], x, parts[f"{name}.weight"].transpose(1, 2))
