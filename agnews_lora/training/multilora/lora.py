"""The slots' part of a forward pass: low-rank updates beside the frozen products, and one head a slot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from agnews_lora.training.multilora.dropout import Dropout, DropoutKey, LayerDropout
from agnews_lora.training.multilora.encoder import LayerUpdates
from agnews_lora.training.multilora.packing import PackedBatch, on_device
from agnews_lora.training.multilora.slots import MODULES, Slots

# Between the layers of the head.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}
NUMBERS = {module: number for number, module in enumerate(MODULES)}


class BatchedLora:
    """The slots' LoRA modules and heads in one forward pass.

    layers: the updates that the slots add to each layer.

    Args:
        weights: [K, columns], the tensor whose gradients the caller asks for.
        keys: {slot: key of its dropout} of the slots that drop anything in this pass.
    """

    def __init__(
        self, slots: Slots, weights: Tensor, packed: PackedBatch, dtype: torch.dtype, keys: Mapping[int, DropoutKey]
    ) -> None:
        self.slots, self.packed, self.dtype = slots, packed, dtype
        self.dropout = Dropout(packed, keys, len(slots)) if keys else None
        sizes = [block.stop - block.start for block in slots.blocks.values()]
        columns = zip(slots.blocks.values(), weights.split(sizes, dim=1), strict=True)
        # Split once: its gradient is one concatenation, where a slice's own would be a whole matrix of zeros.
        self.parts = {block.name: part.view(-1, *block.shape) for block, part in columns}
        self.layers: Sequence[LayerUpdates] = self._grouped() if packed.flat else self._by_segment()

    def logits(self, features: Tensor) -> Tensor:
        """Compute fp32 logits [K, longest, classes] of `features` [rows, hidden]; a slot's rows lie at its start."""
        longest = max(self.packed.row_sizes)
        padded = features.new_zeros(len(self.slots) * longest, features.shape[1], dtype=torch.float32)
        x = padded.index_copy(0, self.packed.places, features.float()).view(len(self.slots), longest, -1)
        layout = self.slots.shape.layout
        first, last = next(iter(layout.head)).removesuffix(".weight"), layout.last_layer
        if first != last:
            x = ACTIVATIONS[layout.activation](_affine(x, self.parts, first))
        return _affine(x, self.parts, last)

    def _pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Give A [K, layers, r, in] and scaled B [K, layers, out, r] of a module."""
        # The scale goes into B, which is small: alpha / rank, and 0 for a slot that does not adapt the module.
        scale = self.slots.scales[module]
        if self.dropout:
            scale = scale * self.dropout.factors
        b = self.parts[f"{module}.B"] * scale[:, None, None, None]
        return self.parts[f"{module}.A"].to(self.dtype), b.to(self.dtype)

    def _grouped(self) -> "list[GroupedUpdates]":
        """Cover all modules that any slot has had, so that layers are not compiled again when trials come and go."""
        packed, slots = self.packed, self.slots
        ends = [_ends(sizes, packed.slots, len(slots)) for sizes in (packed.token_sizes, packed.row_sizes)]
        of_tokens, of_rows = on_device(ends, packed.ids.device)
        pairs = {}
        for module in slots.ranks:
            # Layers outermost: each has a matrix of its own, whose strides follow from its shape.
            by_layer = (part.transpose(0, 1).contiguous() for part in self._pair(module))
            pairs[module] = [part.transpose(2, 3).unbind() for part in by_layer]
        return [
            GroupedUpdates(
                a={module: a[number] for module, (a, _) in pairs.items()},
                b={module: b[number] for module, (_, b) in pairs.items()},
                ends=of_tokens,
                row_ends=of_rows,
                dropout=self.dropout.layer(number) if self.dropout else None,
            )
            for number in range(slots.shape.num_layers)
        ]

    def _by_segment(self) -> "list[SegmentUpdates]":
        packed, slots, num_layers = self.packed, self.slots, self.slots.shape.num_layers
        targeted = {module: [slots.targets(slot, module) for slot in packed.slots] for module in MODULES}
        pairs: list[dict[str, list[tuple[Tensor, Tensor] | None]]] = [{} for _ in range(num_layers)]
        for module in [module for module in MODULES if any(targeted[module])]:
            a, b = (part.flatten(0, 1).unbind() for part in self._pair(module))
            for number, layer in enumerate(pairs):
                places = [slot * num_layers + number for slot in packed.slots]
                own = zip(places, targeted[module], strict=True)
                layer[module] = [(a[place], b[place]) if adapts else None for place, adapts in own]
        return [
            SegmentUpdates(
                pairs=layer,
                token_sizes=packed.token_sizes,
                row_sizes=packed.row_sizes,
                dropout=self.dropout.layer(number) if self.dropout else None,
            )
            for number, layer in enumerate(pairs)
        ]


@dataclass(frozen=True)
class SegmentUpdates:
    """One layer's updates, a segment at a time: for the few slots of a CPU.

    pairs: {module: (A [r, in], scaled B [out, r]) of each segment's slot, or None where it does not adapt the module}.
    token_sizes, row_sizes: of each segment. dropout: of the updates' input.
    """

    pairs: Mapping[str, Sequence[tuple[Tensor, Tensor] | None]]
    token_sizes: tuple[int, ...]
    row_sizes: tuple[int, ...]
    dropout: LayerDropout | None

    def add(self, output: Tensor, x: Tensor, module: str, of_rows: bool) -> Tensor:
        """Add each segment's B A x to `output` [n, out], in one product with the sum."""
        if module not in self.pairs:
            return output
        if self.dropout:
            x = self.dropout(x, NUMBERS[module], of_rows)
        sizes = self.row_sizes if of_rows else self.token_sizes
        parts = list(output.split(sizes)) if len(sizes) > 1 else [output]
        for number, (pair, part) in enumerate(zip(self.pairs[module], x.split(sizes), strict=True)):
            if pair is not None:
                a, b = pair
                parts[number] = torch.addmm(parts[number], F.linear(part, a), b.t())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class GroupedUpdates:
    """One layer's updates of all slots, in one launch a product: for the many slots of a GPU.

    a, b: {module: A [K, in, r], scaled B [K, r, out]}. ends, row_ends: [K] int32, where each slot's segment of tokens
    or of rows ends. dropout: of the updates' input.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    ends: Tensor
    row_ends: Tensor
    dropout: LayerDropout | None

    def add(self, output: Tensor, x: Tensor, module: str, of_rows: bool) -> Tensor:
        """Add each slot's B A x to `output` [n, out]."""
        if module not in self.a:
            return output
        if self.dropout is not None:
            x = self.dropout(x, NUMBERS[module], of_rows)
        ends = self.row_ends if of_rows else self.ends
        return output + F.grouped_mm(F.grouped_mm(x, self.a[module], offs=ends), self.b[module], offs=ends)


def _ends(sizes: tuple[int, ...], slots: tuple[int, ...], num_slots: int) -> npt.NDArray[np.int32]:
    """Compute (K,) where each slot's segment ends; an absent slot's is empty."""
    counts = np.zeros(num_slots, dtype=np.int32)
    counts[list(slots)] = sizes
    return counts.cumsum(dtype=np.int32)


def _affine(x: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.baddbmm(parts[f"{name}.bias"][:, None], x, parts[f"{name}.weight"].transpose(1, 2))
