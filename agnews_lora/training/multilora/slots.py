"""Slots: the adapters and heads of K trials, stacked, with the optimizer's moments beside them.

A slot's trainable tensors are one row of a matrix [K, columns]; every adaptable module's A and B of all layers, and the
head, are blocks of its columns. Ranks are padded with zeros to the largest that a module has seen, in multiples of
`RANK_STEP`. A padded row of A meets a padded column of B: both gradients are exactly zero, and so both stay zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from agnews_lora.adapters.spec import PRESETS, ModelShape, TrialSpec, head_shapes, module_shape

MODULES = PRESETS["all-linear"]
RANK_STEP = 8  # kernels read rows of 16 bytes at least


@dataclass(frozen=True)
class Block:
    """Columns [start, stop) of a slot's row, holding a tensor of `shape`; `decays`: whether weight decay applies."""

    name: str
    shape: tuple[int, ...]
    start: int
    decays: bool

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)

    def of(self, row: Tensor) -> Tensor:
        """View the block's tensor in a slot's row."""
        return row[self.start : self.stop].view(self.shape)


class SlotState(NamedTuple):
    """A trial's tensors on the CPU: {PEFT's name: tensor} of weights and of AdamW's two moments."""

    weights: dict[str, Tensor]
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]

    @classmethod
    def fresh(cls, weights: Mapping[str, Tensor]) -> "SlotState":
        """Give the state before the first step."""
        first, second = ({name: torch.zeros_like(tensor) for name, tensor in weights.items()} for _ in range(2))
        return cls(dict(weights), first, second)


class Slots:
    """K slots on a device, all fp32.

    specs: of the trial in each slot, or None. weights, first_moment, second_moment: [K, columns]. scales: {module: [K]
    alpha / rank, 0 where a slot does not adapt it}. decays: [columns] 1 where weight decay applies, else 0. freezable:
    columns of the classifier layers that a head may keep frozen. frozen: [K] whether the slot's head does, or it is
    empty. version: changes with the trials in the slots, and so with the place of any of these tensors.
    """

    def __init__(self, num_slots: int, shape: ModelShape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.specs: list[TrialSpec | None] = [None] * num_slots
        self.version = 0
        self._allocate({})

    def __len__(self) -> int:
        return len(self.specs)

    def place(self, slot: int, spec: TrialSpec, state: SlotState) -> None:
        """Put a trial into a slot, in place of any other."""
        rank = -(-spec.rank // RANK_STEP) * RANK_STEP
        wider = {module: rank for module in PRESETS[spec.targets] if rank > self.ranks.get(module, 0)}
        if wider:
            self._allocate({**self.ranks, **wider})
        self.clear(slot)
        for matrix, tensors in zip(self._matrices(), state, strict=True):
            for name, part in self.tensors(matrix[slot], spec):
                part.copy_(tensors[name])
        self.specs[slot] = spec
        self._describe()

    def take(self, slot: int) -> SlotState:
        """Copy the tensors of a slot's trial, whole rows at once: a GPU answers each copy of its own."""
        spec = self.specs[slot]
        assert spec is not None, "an empty slot holds nothing"
        rows = torch.stack([matrix[slot] for matrix in self._matrices()]).cpu()
        return SlotState(*({name: part.contiguous() for name, part in self.tensors(row, spec)} for row in rows))

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.specs[slot] = None
        for matrix in self._matrices():
            matrix[slot] = 0.0
        self._describe()

    def targets(self, slot: int, module: str) -> bool:
        """Tell whether the trial in a slot adapts a module."""
        spec = self.specs[slot]
        return spec is not None and module in PRESETS[spec.targets]

    def zero_frozen(self, changes: Tensor) -> None:
        """Zero in place the changes [K, columns] of classifier layers that a slot keeps frozen."""
        changes[:, self.freezable].masked_fill_(self.frozen[:, None], 0.0)

    def tensors(self, row: Tensor, spec: TrialSpec) -> Iterator[tuple[str, Tensor]]:
        """View a trial's tensors in a row [columns], without padding: pairs of PEFT's name and tensor."""
        return _tensors(row, spec, self.blocks, self.shape)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.first_moment, self.second_moment

    def _allocate(self, ranks: dict[str, int]) -> None:
        """Allocate columns for these ranks and move the slots' tensors. Out of memory changes nothing."""
        blocks = _blocks(ranks, self.shape)
        columns = sum(prod(block.shape) for block in blocks.values())
        matrices = torch.zeros(3, len(self), columns, device=self.device).unbind()
        decays = torch.cat([torch.full((prod(block.shape),), float(block.decays)) for block in blocks.values()])
        decays = decays.to(self.device)
        for slot, spec in enumerate(self.specs):
            if spec is not None:
                for old, new in zip(self._matrices(), matrices, strict=True):
                    moved = _tensors(new[slot], spec, blocks, self.shape)
                    for (_, source), (_, target) in zip(self.tensors(old[slot], spec), moved, strict=True):
                        target.copy_(source)
        self.ranks, self.blocks, self.decays = ranks, blocks, decays
        freezable = [blocks[name] for name in self.shape.layout.head if self.shape.layout.is_frozen(name, "out_proj")]
        self.freezable = slice(freezable[0].start, freezable[-1].stop) if freezable else slice(0, 0)
        self.weights, self.first_moment, self.second_moment = matrices
        self._describe()

    def _describe(self) -> None:
        """Copy scales and frozen heads of the trials in the slots to the device."""
        self.version += 1
        scales = {
            module: [
                spec.alpha / spec.rank if spec is not None and module in PRESETS[spec.targets] else 0.0
                for spec in self.specs
            ]
            for module in self.ranks
        }
        self.scales = {module: torch.tensor(values, device=self.device) for module, values in scales.items()}
        frozen = [spec is None or spec.head != "full" for spec in self.specs]
        self.frozen = torch.tensor(frozen, device=self.device)


def _tensors(
    row: Tensor, spec: TrialSpec, blocks: Mapping[str, Block], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    for module in PRESETS[spec.targets]:
        a, b = blocks[f"{module}.A"].of(row), blocks[f"{module}.B"].of(row)
        for layer in range(shape.num_layers):
            path = f"base_model.model.{shape.layout.module_path(layer, shape.layout.modules[module])}"
            yield f"{path}.lora_A.weight", a[layer, : spec.rank]
            yield f"{path}.lora_B.weight", b[layer, :, : spec.rank]
    for name in shape.layout.head:
        yield f"base_model.model.{name}", blocks[name].of(row)


def _blocks(ranks: Mapping[str, int], shape: ModelShape) -> dict[str, Block]:
    """List the blocks of a slot's row, in the order of their columns."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in MODULES:
        if rank := ranks.get(module, 0):
            out_features, in_features = module_shape(shape.layout.modules[module], shape)
            shapes[f"{module}.A"] = (shape.num_layers, rank, in_features)
            shapes[f"{module}.B"] = (shape.num_layers, out_features, rank)
    shapes |= head_shapes(shape)
    blocks, start = {}, 0
    for name, block_shape in shapes.items():
        blocks[name] = Block(name, block_shape, start, decays=not name.endswith(".bias"))
        start = blocks[name].stop
    return blocks
