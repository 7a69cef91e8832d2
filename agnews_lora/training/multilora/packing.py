"""Batches of several slots packed one behind the other, from token tables that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agnews_lora.data.tokens import TokenTable
from agnews_lora.training.data_order import WIDTH_STEP
from agnews_lora.training.multilora.attention import Attention, FlatAttention, PaddedAttention

# Tokens of a row that flash attention takes at once (heads of 64). The longest row in these steps launches the same
# work, and is hardly ever a new number, for which a layer would have to be compiled again.
TILE = 128
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward pass: segments, one a slot, in the order of the slots.

    slots: slot of each segment. row_sizes, token_sizes: rows and tokens of each segment. ids, positions: (tokens,)
    int64, a position being a row of the encoder's table of them. token_slots, token_rows, token_places: (tokens,)
    int64, the slot of each token, its row in the table and its place in that row; in padding, place and position are 0.
    first: (rows,) index of each row's first token. labels: (rows,) int64.
    places: (rows,) index of each row where every slot has as many places as the largest segment has rows. shares:
    (rows,) share of a row in its segment. flat: whether rows lie without padding. attention: inside each row.
    """

    slots: tuple[int, ...]
    row_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    token_rows: torch.Tensor
    token_places: torch.Tensor
    first: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    shares: torch.Tensor
    flat: bool
    attention: Attention


class DeviceTokens:
    """A token table, resident on a device.

    flat: rows are laid out without padding, for variable-length attention; else each is padded to the longest of its
    segment, in steps of `WIDTH_STEP` tokens, which batches of like length keep short. padding_id: the encoder's.
    """

    def __init__(self, table: TokenTable, device: torch.device, flat: bool, padding_id: int | None) -> None:
        self.device = device
        self.flat = flat
        self.lengths = table.lengths
        self.pad_id = table.pad_id
        self.ids = torch.from_numpy(np.array(table.ids)).to(device)  # (total_tokens,) int32
        self.positions = torch.from_numpy(positions(table, padding_id)).to(device)
        self.starts = torch.from_numpy(np.array(table.offsets[:-1])).to(device)
        self.labels = torch.from_numpy(np.array(table.labels)).to(device)

    def pack(self, segments: Sequence[tuple[int, Sequence[int]]]) -> PackedBatch:
        """Pack the rows of some slots, given as pairs of a slot and its row ids."""
        slots, chosen = zip(*sorted(segments, key=lambda segment: segment[0]), strict=True)
        row_sizes = tuple(len(rows) for rows in chosen)
        rows = np.concatenate([np.asarray(each, dtype=np.int64) for each in chosen])
        lengths = self.lengths[rows]
        bounds = np.cumsum([0, *row_sizes])
        longest = np.maximum.reduceat(lengths, bounds[:-1])
        padded = -(-longest // WIDTH_STEP) * WIDTH_STEP
        widths = lengths if self.flat else np.repeat(padded, row_sizes)  # places that each row takes
        offsets = np.concatenate([[0], np.cumsum(widths)])
        own_slots, own_bounds = np.repeat(slots, row_sizes), np.repeat(bounds[:-1], row_sizes)
        places = own_slots * max(row_sizes) + np.arange(len(rows)) - own_bounds
        described, places_there, shares, offsets_there = on_device(
            [
                np.stack([rows, lengths, offsets[:-1], own_slots, widths]),
                places,
                np.repeat(1 / np.array(row_sizes), row_sizes).astype(np.float32),
                offsets.astype(np.int32),
            ],
            self.device,
        )
        ids, positions, token_slots, token_rows, token_places = self._cut(described, total=int(offsets[-1]))
        token_sizes = tuple(np.diff(offsets[bounds]).tolist())
        attention: Attention
        if self.flat:
            attention = FlatAttention(offsets_there, -(-int(lengths.max()) // TILE) * TILE)
        else:
            parts = np.split(lengths, bounds[1:-1])
            paddings = tuple(self._padding(part, int(width)) for part, width in zip(parts, padded, strict=True))
            attention = PaddedAttention(row_sizes, token_sizes, paddings)
        return PackedBatch(
            slots=tuple(slots),
            row_sizes=row_sizes,
            token_sizes=token_sizes,
            ids=ids,
            positions=positions,
            token_slots=token_slots,
            token_rows=token_rows,
            token_places=token_places,
            first=described[2],
            labels=self.labels[described[0]],
            places=places_there,
            shares=shares,
            flat=self.flat,
            attention=attention,
        )

    def _cut(self, described: torch.Tensor, total: int) -> tuple[torch.Tensor, ...]:
        """Give (ids, positions, slots, rows, places in the row) of each token, of rows described [5, rows] by their
        number, tokens, first place, slot and places."""
        row, length, begin, slot = described[:4].repeat_interleave(described[4], dim=1, output_size=total)
        place = torch.arange(total, device=self.device) - begin
        real = place < length
        place = place.where(real, 0)
        token = self.starts[row] + place
        ids, positions = self.ids[token].long(), self.positions[token].long()
        return ids.where(real, self.pad_id), positions.where(real, 0), slot, row, place

    def _padding(self, lengths: npt.NDArray[np.int64], width: int) -> torch.Tensor | None:
        if lengths.min() == width:
            return None
        return on_device([(np.arange(width) >= lengths[:, None])[:, None, None, :]], self.device)[0]


def positions(table: TokenTable, padding_id: int | None) -> npt.NDArray[np.int32]:
    """Number the tokens of each row as transformers does: the position (total_tokens,) of each.

    Args:
        padding_id: of an encoder that counts from the position behind this one the tokens with other ids, and gives
            this position to those with it, wherever they stand (fairseq's `make_positions`). None: every token counts,
            from 0.
    """
    counted = np.ones(len(table.ids), dtype=bool) if padding_id is None else table.ids != padding_id
    counts = np.cumsum(counted)
    before = np.repeat(np.concatenate([[0], counts])[table.offsets[:-1]], table.lengths)
    start = -1 if padding_id is None else padding_id
    return (np.where(counted, counts - before, 0) + start).astype(np.int32)


def on_device(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to a device at once, out of page-locked memory: the host does not wait for it."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return in_one_copy(arrays, device)


def in_one_copy(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to a device side by side in one buffer."""
    sources = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    ends = np.cumsum([-(-source.nbytes // ALIGNMENT) * ALIGNMENT for source in sources]).tolist()
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = [(end, source) for end, source in zip([0, *ends[:-1]], sources, strict=True)]

    def part(of: torch.Tensor, start: int, source: torch.Tensor) -> torch.Tensor:
        return of[start : start + source.nbytes].view(source.dtype).view(source.shape)

    for start, source in places:
        part(buffer, start, source).copy_(source)
    moved = buffer.to(device, non_blocking=True)  # pinned memory is not handed out again before the copy is done
    return [part(moved, start, source) for start, source in places]
