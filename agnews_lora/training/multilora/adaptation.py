"""The slots' own part of a forward pass: low-rank updates beside the frozen products, and one head a slot."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from agnews_lora.training.multilora.dropout import Draw, Dropout, Kept
from agnews_lora.training.multilora.packing import Packing
from agnews_lora.training.multilora.slots import DENSE, MODULES, Slots


class Adaptation:
    """One pass through the slots' weights.

    weights: [K, columns], what gradients are asked for. draws: {slot: where its dropout comes from} of the slots that
    drop anything in this pass.
    """

    def __init__(
        self, slots: Slots, weights: Tensor, packing: Packing, dtype: torch.dtype, draws: Mapping[int, Draw]
    ) -> None:
        self.slots, self.packing = slots, packing
        self.dropout = Dropout(packing, draws, len(slots)) if draws else None
        sizes = [block.stop - block.start for block in slots.blocks.values()]
        columns = zip(slots.blocks.values(), weights.split(sizes, dim=1), strict=True)
        # Split once: its gradient is one concatenation, where a slice's own would be a whole matrix of zeros.
        self.parts = {block.name: part.view(-1, *block.shape) for block, part in columns}
        self.products = {
            module: self._products(module, dtype)
            for module in MODULES
            if any(slots.targets(slot, module) for slot in packing.slots)
        }

    def _products(self, module: str, dtype: torch.dtype) -> "GroupedProducts | SegmentProducts":
        # The scale goes into B, which is small: alpha / rank, and 0 for a slot that does not adapt the module.
        scale = self.slots.scales[module]
        if self.dropout:
            scale = scale * self.dropout.factors
        a = self.parts[f"{module}.A"].to(dtype)
        b = (self.parts[f"{module}.B"] * scale[:, None, None, None]).to(dtype)
        if self.packing.flat:
            return GroupedProducts(a, b, self.packing)
        targeted = [self.slots.targets(slot, module) for slot in range(len(self.slots))]
        return SegmentProducts(a, b, self.packing, targeted)

    def add(self, output: Tensor, x: Tensor, module: str, layer: int, sizes: tuple[int, ...]) -> Tensor:
        """`output` [n, out] plus, for each segment of `x` [n, in], its slot's scaled B A x."""
        if module not in self.products:
            return output
        if self.dropout:
            x = Kept.apply(x, *self.dropout.keys(layer, MODULES.index(module), of_rows=sizes is self.packing.row_sizes))
        return self.products[module].add(output, x, layer, sizes)

    def logits(self, features: Tensor) -> Tensor:
        """fp32 logits [K, longest, classes] of `features` [rows, hidden]; the rows of a slot lie at its start."""
        longest = max(self.packing.row_sizes)
        padded = features.new_zeros(len(self.slots) * longest, features.shape[1], dtype=torch.float32)
        x = padded.index_copy(0, self.places(longest), features.float()).view(len(self.slots), longest, -1)
        if f"{DENSE}.weight" in self.parts:
            x = torch.tanh(_affine(x, self.parts, DENSE))
            return _affine(x, self.parts, "classifier.out_proj")
        return _affine(x, self.parts, "classifier")

    def places(self, longest: int) -> Tensor:
        """[rows] where each row stands among K x `longest`."""
        slots = zip(self.packing.slots, self.packing.row_sizes, strict=True)
        return torch.cat([torch.arange(rows) + slot * longest for slot, rows in slots]).to(self.slots.device)


class SegmentProducts:
    """One module's updates, a segment at a time: the few slots of a CPU."""

    def __init__(self, a: Tensor, b: Tensor, packing: Packing, targeted: list[bool]) -> None:
        """a [K, layers, r, in], b [K, layers, out, r]; targeted: whether each slot adapts the module."""
        self.slots, self.targeted, self.num_layers = packing.slots, targeted, a.shape[1]
        self.pairs = list(zip(a.flatten(0, 1).unbind(), b.flatten(0, 1).unbind(), strict=True))

    def add(self, output: Tensor, x: Tensor, layer: int, sizes: tuple[int, ...]) -> Tensor:
        """`output` [n, out] plus each targeted slot's B A x, in one product with the sum."""
        parts = list(output.split(sizes)) if len(sizes) > 1 else [output]
        for number, (slot, part) in enumerate(zip(self.slots, x.split(sizes), strict=True)):
            if self.targeted[slot]:
                a, b = self.pairs[slot * self.num_layers + layer]
                parts[number] = torch.addmm(parts[number], F.linear(part, a), b.t())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class GroupedProducts:
    """One module's updates for all slots in one launch a product: the many slots of a GPU."""

    def __init__(self, a: Tensor, b: Tensor, packing: Packing) -> None:
        """a [K, layers, r, in], b [K, layers, out, r]."""
        self.layers = list(zip(a.transpose(2, 3).unbind(1), b.transpose(2, 3).unbind(1), strict=True))
        self.ends = {sizes: _ends(sizes, packing.slots, a) for sizes in (packing.token_sizes, packing.row_sizes)}

    def add(self, output: Tensor, x: Tensor, layer: int, sizes: tuple[int, ...]) -> Tensor:
        """`output` [n, out] plus each slot's B A x."""
        a, b = self.layers[layer]
        ends = self.ends[sizes]
        return output + F.grouped_mm(F.grouped_mm(x, a, offs=ends), b, offs=ends)


def _ends(sizes: tuple[int, ...], slots: tuple[int, ...], like: Tensor) -> Tensor:
    """(K,) int32 where each slot's segment ends; an absent slot's is empty."""
    counts = torch.zeros(len(like), dtype=torch.int64)
    counts[list(slots)] = torch.tensor(sizes)
    return counts.cumsum(0).to(like.device, torch.int32)


def _affine(x: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.baddbmm(parts[f"{name}.bias"][:, None], x, parts[f"{name}.weight"].transpose(1, 2))
