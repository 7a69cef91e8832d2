"""Batches of several slots packed one behind the other without padding, from token tables that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from agnews_lora.data.tokens import TokenTable

TILE = 64  # rows of a segment that one program of a CUDA kernel computes
# The tokens of a pass are a multiple of it: the libraries prepare each product once for every number of rows that
# there is, which takes as long as the product.
TOKEN_STEP = 16
SMALLEST_STEP = 1024  # between the numbers of tokens that bucketed passes have
WIDTH_STEP = 8  # tokens that rows are padded to where they have to be
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Segments:
    """Consecutive rows of a matrix that belong to one slot each.

    sizes: rows of each segment; rows behind the last one belong to no slot. For CUDA's kernels, int32: tiles: (3,
    tiles) segment (-1: none), first row and end of every `TILE` rows at most; ends: (1 + segments,) where segments end,
    behind a 0.
    """

    sizes: tuple[int, ...]
    tiles: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    @cached_property
    def parts(self) -> list[slice]:
        """The rows of each segment."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def tables_of(sizes: npt.ArrayLike, total: int) -> list[npt.NDArray[np.int32]]:
    """Compute `tiles` and `ends` of segments of these sizes, and tiles of segment -1 for the rest of `total` rows.

    There are as many tiles however the rows are distributed; those that are not needed are empty.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    stops = np.append(ends[1:], total)
    counts = -(-(stops - ends) // TILE)
    counts[-1] += total // TILE + len(ends) - counts.sum()
    segments = np.repeat(np.arange(len(ends)), counts)
    first = ends[segments] + TILE * (np.arange(len(segments)) - np.repeat(np.cumsum(counts) - counts, counts))
    stop, numbers = stops[segments], np.where(segments == len(ends) - 1, -1, segments)
    tiles = np.stack([numbers, np.minimum(first, stop), np.minimum(first + TILE, stop)])
    return [tiles.astype(np.int32), ends.astype(np.int32)]


def bucket_of(tokens: int) -> int:
    """Round tokens up to one of a few numbers: where they are many, by a sixteenth on average."""
    step = max(SMALLEST_STEP, (1 << tokens.bit_length()) // 16)
    return -(-tokens // step) * step


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

    slots: slot of each segment. tokens, firsts: the segments of all tokens, and of the rows' first tokens. Behind the
    last row are tokens that belong to no row, and, where the pass fills a bucket, to no segment. rows: for attention.
    ids, positions: (tokens,) int64, a position being a row of the encoder's table of them. token_segments, token_rows,
    token_places: (tokens,) int64, the segment of each token, its row in the table and its place in that row; of no row,
    place and position are 0. labels: (rows,) int64. places: (rows,) index of each row where every segment has as many
    places as the largest has rows. shares: (rows,) share of a row in its segment.
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


class Layout(NamedTuple):
    """The rows of a pass before they are on the device.

    slots, row_sizes, token_sizes: of each segment. num_tokens: with those that belong to no row; total: without them.
    longest: tokens of the longest row, or in a bucket more. arrays: for the device.
    """

    slots: tuple[int, ...]
    row_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]
    num_tokens: int
    total: int
    longest: int
    arrays: list[npt.NDArray[Any]]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Give all that the operations of CUDA's kernels depend on, beside the values of `arrays`."""
        return self.slots, self.row_sizes, self.num_tokens, self.longest


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
        layout = self.layout(segments)
        return self.packed(layout, on_device(layout.arrays, self.device))

    def layout(self, segments: Sequence[tuple[int, Sequence[int]]], most: int = 0) -> Layout:
        """Lay out the rows of some slots, with the tokens of a bucket if there are up to `most`."""
        slots, chosen = zip(*sorted(segments, key=lambda segment: segment[0]), strict=True)
        row_sizes = tuple(len(rows) for rows in chosen)
        rows = np.concatenate([np.asarray(each, dtype=np.int64) for each in chosen])
        lengths = self.lengths[rows]
        bounds = np.cumsum([0, *row_sizes])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total, longest = int(offsets[-1]), int(lengths.max())
        num_tokens = -(-total // TOKEN_STEP) * TOKEN_STEP
        token_sizes = np.diff(offsets[bounds])
        if total <= most:
            num_tokens, longest = bucket_of(total), 1 << (longest - 1).bit_length()
        else:
            token_sizes[-1] += num_tokens - total
        own, own_bounds = np.repeat(np.arange(len(slots)), row_sizes), np.repeat(bounds[:-1], row_sizes)
        # One more row of no tokens stands for the tokens behind the last one.
        row_table = np.stack([rows, lengths, offsets[:-1], own, lengths])
        row_table = np.concatenate([row_table, [[0], [0], [total], [len(slots) - 1], [num_tokens - total]]], axis=1)
        arrays = [
            row_table,
            own * max(row_sizes) + np.arange(len(rows)) - own_bounds,
            np.repeat(1 / np.array(row_sizes), row_sizes).astype(np.float32),
            offsets.astype(np.int32),
            lengths.astype(np.int32),
            *tables_of(token_sizes, num_tokens),
            *tables_of(row_sizes, len(rows)),
        ]
        return Layout(tuple(slots), row_sizes, tuple(token_sizes.tolist()), num_tokens, total, longest, arrays)

    def packed(self, layout: Layout, arrays: Sequence[torch.Tensor]) -> PackedBatch:
        """Give the tokens of a layout whose arrays lie on the device."""
        described, places, shares, offsets, lengths, *tables = arrays
        ids, positions, token_segments, token_rows, token_places = self._cut(described, layout.num_tokens)
        return PackedBatch(
            slots=layout.slots,
            tokens=Segments(layout.token_sizes, *tables[:2]),
            firsts=Segments(layout.row_sizes, *tables[2:]),
            rows=Rows(offsets, lengths, described[2, :-1], layout.longest, layout.total),
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


def in_one_copy(
    arrays: Sequence[npt.NDArray[Any]], device: torch.device, target: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Copy arrays to a device side by side in one buffer, a new one or a given one."""
    sources = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    buffer = empty_buffer(arrays, torch.device("cpu"), pinned=device.type == "cuda")
    starts = np.cumsum([0, *map(_aligned, arrays)]).tolist()[:-1]

    def part(of: torch.Tensor, start: int, source: torch.Tensor) -> torch.Tensor:
        return of[start : start + source.nbytes].view(source.dtype).view(source.shape)

    for start, source in zip(starts, sources, strict=True):
        part(buffer, start, source).copy_(source)
    moved = empty_buffer(arrays, device) if target is None else target
    moved.copy_(buffer, non_blocking=True)  # pinned memory is not handed out again before the copy is done
    return [part(moved, start, source) for start, source in zip(starts, sources, strict=True)]


def empty_buffer(arrays: Sequence[npt.NDArray[Any]], device: torch.device, pinned: bool = False) -> torch.Tensor:
    """Allocate bytes for arrays side by side."""
    return torch.empty(sum(map(_aligned, arrays)), dtype=torch.uint8, device=device, pin_memory=pinned)


def _aligned(array: npt.NDArray[Any]) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT
