"""Batches of several slots laid one behind the other, cut from token tables that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from agnews_lora.data.tokens import TokenTable
from agnews_lora.training.batches import WIDTH_STEP
from agnews_lora.training.multilora.attention import Attention, FlatAttention, PaddedAttention


@dataclass(frozen=True)
class Packing:
    """The tokens of one forward pass: segments, one a slot, in the order of the slots.

    slots: slot of each segment. row_sizes, token_sizes: rows and tokens of each segment. ids, positions: (tokens,)
    int64, a position being the token's place in its row (0 in padding). token_slots, token_rows: (tokens,) int64, the
    slot of each token and its row in the table. first: (rows,) index of each row's first token. labels: (rows,) int64.
    flat: whether rows lie without padding. attention: inside each row.
    """

    slots: tuple[int, ...]
    row_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    token_rows: torch.Tensor
    first: torch.Tensor
    labels: torch.Tensor
    flat: bool
    attention: Attention


class TokenStore:
    """A token table, resident on a device.

    flat: rows are laid out without padding, for variable-length attention; else each is padded to the longest of its
    segment, in steps of `WIDTH_STEP` tokens, which batches of like length keep short.
    """

    def __init__(self, table: TokenTable, device: torch.device, flat: bool) -> None:
        self.device = device
        self.flat = flat
        self.lengths = table.lengths
        self.pad_id = table.pad_id
        self.ids = torch.from_numpy(np.array(table.ids)).to(device)  # (total_tokens,) int32
        self.starts = self._on_device(np.array(table.offsets[:-1]))
        self.labels = self._on_device(np.array(table.labels))

    def pack(self, segments: Sequence[tuple[int, Sequence[int]]]) -> Packing:
        """Lay out the rows of some slots: pairs of a slot and its row ids."""
        slots, chosen = zip(*sorted(segments, key=lambda segment: segment[0]), strict=True)
        row_sizes = tuple(len(rows) for rows in chosen)
        rows = np.concatenate([np.asarray(each, dtype=np.int64) for each in chosen])
        lengths = self.lengths[rows]
        bounds = np.cumsum([0, *row_sizes])
        longest = np.maximum.reduceat(lengths, bounds[:-1])
        padded = -(-longest // WIDTH_STEP) * WIDTH_STEP
        widths = lengths if self.flat else np.repeat(padded, row_sizes)  # places that each row takes
        offsets = np.concatenate([[0], np.cumsum(widths)])
        token_sizes = tuple(np.diff(offsets[bounds]).tolist())
        cut = self._cut(rows, lengths, widths, offsets, np.repeat(slots, row_sizes))
        ids, positions, token_slots, token_rows = cut
        attention: Attention
        if self.flat:
            attention = FlatAttention(self._on_device(offsets.astype(np.int32)), int(lengths.max()))
        else:
            parts = np.split(lengths, bounds[1:-1])
            paddings = tuple(self._padding(part, int(width)) for part, width in zip(parts, padded, strict=True))
            attention = PaddedAttention(row_sizes, token_sizes, paddings)
        return Packing(
            slots=tuple(slots),
            row_sizes=row_sizes,
            token_sizes=token_sizes,
            ids=ids,
            positions=positions,
            token_slots=token_slots,
            token_rows=token_rows,
            first=self._on_device(offsets[:-1]),
            labels=self.labels[self._on_device(rows)],
            flat=self.flat,
            attention=attention,
        )

    def _cut(
        self,
        rows: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        widths: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, positions, slots, rows), a token each, of rows that take `widths` places each, from `offsets` on."""
        described = self._on_device(np.stack([rows, lengths, offsets[:-1], slots, widths]))
        total = int(offsets[-1])
        row, length, begin, slot = described[:4].repeat_interleave(described[4], dim=1, output_size=total)
        place = torch.arange(total, device=self.device) - begin
        real = place < length
        place = place.where(real, 0)
        ids = self.ids[self.starts[row] + place].long()
        return ids.where(real, self.pad_id), place, slot, row

    def _padding(self, lengths: npt.NDArray[np.int64], width: int) -> torch.Tensor | None:
        if lengths.min() == width:
            return None
        return self._on_device(np.arange(width) >= lengths[:, None])[:, None, None, :]

    def _on_device(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
