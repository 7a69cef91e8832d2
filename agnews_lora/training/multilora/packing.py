"""Batches of several slots packed one behind the other without padding, from token tables that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agnews_lora.data.tokens import TokenTable

TILE = 64  # rows of a segment that one program of a CUDA kernel computes
# The tokens of a pass are a multiple of it: the libraries prepare each product once for every number of rows that
# there is, which takes as long as the product.
TOKEN_STEP = 16
WIDTH_STEP = 8  # tokens that rows are padded to where they have to be
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Segments:
    """Consecutive rows of a matrix that belong to one slot each.

    sizes: rows of each segment. For CUDA's kernels, int32: tiles: (3, tiles) segment, first row and end of every `TILE`
    rows at most; ends: (1 + segments,) where segments end, behind a 0.
    """

    sizes: tuple[int, ...]
    tiles: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    @cached_property
    def parts(self) -> list[slice]:
        """The rows of each segment."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def tables_of(sizes: npt.ArrayLike) -> list[npt.NDArray[np.int32]]:
    """Compute `tiles` and `ends` of segments of these sizes."""
    sizes = np.asarray(sizes)
    ends, counts = np.cumsum(sizes), -(-sizes // TILE)
    starts, segments = ends - sizes, np.repeat(np.arange(len(sizes)), counts)
    first = starts[segments] + TILE * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    tiles = np.stack([segments, first, np.minimum(first + TILE, ends[segments])])
    return [tiles.astype(np.int32), np.concatenate([[0], ends]).astype(np.int32)]


@dataclass(frozen=True)
class Rows:
    """The rows of a pass: consecutive tokens, which attend to one another.

    offsets: (rows + 1,) int32, where each row starts and the last one ends. lengths: (rows,) int32 tokens. first:
    (rows,) int64 index of each row's first token. longest: tokens of the longest row. total: tokens of all rows.
    """

    offsets: torch.Tensor
    lengths: torch.Tensor
    first: torch.Tensor
    longest: int
    total: int

    @property
    def width(self) -> int:
        """Tokens of a row, padded."""
        return -(-self.longest // WIDTH_STEP) * WIDTH_STEP

    @cached_property
    def padding(self) -> torch.Tensor:
        """Whether a place (rows, width) of padded rows is padding."""
        return torch.arange(self.width, device=self.first.device) >= self.lengths[:, None]

    @cached_property
    def places(self) -> torch.Tensor:
        """The place of every token (total,) in padded rows."""
        before = torch.arange(len(self.first), device=self.first.device) * self.width - self.first
        shift = before.repeat_interleave(self.lengths, output_size=self.total)
        return shift + torch.arange(self.total, device=self.first.device)


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of one forward pass: segments, one a slot, in the order of the slots.

    slots: slot of each segment. tokens, firsts: the segments of all tokens, and of the rows' first tokens; the last
    token segment ends with the few tokens that belong to no row. rows: for attention. ids, positions: (tokens,) int64,
    a position being a row of the encoder's table of them. token_segments, token_rows, token_places: (tokens,) int64,
    the segment of each token, its row in the table and its place in that row; of no row, place and position are 0.
    labels: (rows,) int64. places: (rows,) index of each row where every segment has as many places as the largest has
    rows. shares: (rows,) share of a row in its segment.
    """

    slots: tuple[int, ...]
    tokens: Segments
    firsts: Segments
    rows: Rows
    ids: torch.Tensor
    positions: torch.Tensor
    token_segments: torch.Tensor
    token_rows: torch.Tensor
    token_places: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    shares: torch.Tensor


class DeviceTokens:
    """A token table, resident on a device. padding_id: the encoder's."""

    def __init__(self, table: TokenTable, device: torch.device, padding_id: int | None) -> None:
        self.device = device
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
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = -(-int(offsets[-1]) // TOKEN_STEP) * TOKEN_STEP
        rest = total - int(offsets[-1])
        token_sizes = np.diff(offsets[bounds])
        token_sizes[-1] += rest
        own, own_bounds = np.repeat(np.arange(len(slots)), row_sizes), np.repeat(bounds[:-1], row_sizes)
        # One more row of no tokens stands for the tokens behind the last one.
        row_table = np.stack([rows, lengths, offsets[:-1], own, lengths])
        row_table = np.concatenate([row_table, [[0], [0], [offsets[-1]], [len(slots) - 1], [rest]]], axis=1)
        arrays = [
            row_table,
            own * max(row_sizes) + np.arange(len(rows)) - own_bounds,
            np.repeat(1 / np.array(row_sizes), row_sizes).astype(np.float32),
            offsets.astype(np.int32),
            lengths.astype(np.int32),
        ]
        if self.device.type == "cuda":
            arrays += [*tables_of(token_sizes), *tables_of(row_sizes)]
        described, places, shares, offsets_there, lengths_there, *tables = on_device(arrays, self.device)
        ids, positions, token_segments, token_rows, token_places = self._cut(described, total)
        first = described[2, :-1]
        return PackedBatch(
            slots=tuple(slots),
            tokens=Segments(tuple(token_sizes.tolist()), *tables[:2]),
            firsts=Segments(row_sizes, *tables[2:]),
            rows=Rows(offsets_there, lengths_there, first, int(lengths.max()), int(offsets[-1])),
            ids=ids,
            positions=positions,
            token_segments=token_segments,
            token_rows=token_rows,
            token_places=token_places,
            labels=self.labels[described[0, :-1]],
            places=places,
            shares=shares,
        )

    def _cut(self, described: torch.Tensor, total: int) -> tuple[torch.Tensor, ...]:
        """Give (ids, positions, segments, rows, places in the row) of each token, of rows described [5, rows] by their
        number, tokens, first token, segment and the places that they take."""
        row, length, begin, segment = described[:4].repeat_interleave(described[4], dim=1, output_size=total)
        place = torch.arange(total, device=self.device) - begin
        real = place < length
        place = place.where(real, 0)
        token = self.starts[row] + place
        ids, positions = self.ids[token].long(), self.positions[token].long()
        return ids.where(real, self.pad_id), positions.where(real, 0), segment, row, place


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
