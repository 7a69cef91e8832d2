"""Attention inside each row of a packing, in two layouts: rows padded to their segment's longest, or not at all."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen


class Attention(Protocol):
    """Attention of the queries to the tokens of their own row."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[n, heads, size] of queries [n, heads, size], which are those of all tokens or of each row's first alone."""
        ...


@dataclass(frozen=True)
class PaddedAttention:
    """Rows padded to the longest of their segment, a segment at a time.

    row_sizes, token_sizes: of each segment. masks: for each segment (rows, 1, 1, longest), true where there is a token,
    or None where nothing is padded.
    """

    row_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]
    masks: tuple[Tensor | None, ...]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dtype = query.dtype
        if query.device.type == "cpu" and query.requires_grad:  # its backward pass in bf16 takes five times fp32's
            query, key, value = query.float(), key.float(), value.float()
        query_sizes = self.token_sizes if len(query) == len(key) else self.row_sizes
        parts = zip(query.split(query_sizes), key.split(self.token_sizes), value.split(self.token_sizes), strict=True)
        context = []
        for segment, rows, mask in zip(parts, self.row_sizes, self.masks, strict=True):
            q, k, v = (part.view(rows, -1, *part.shape[1:]).transpose(1, 2) for part in segment)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (rows, heads, queries, size)
            context.append(attended.transpose(1, 2).reshape(-1, *query.shape[1:]))
        return (torch.cat(context) if len(context) > 1 else context[0]).to(dtype)


@dataclass(frozen=True)
class FlatAttention:
    """Rows one behind the other without padding, by flash attention over variable lengths (CUDA, bf16).

    offsets: (rows + 1,) int32, where each row starts and the last one ends. longest: tokens of the longest row.
    """

    offsets: Tensor
    longest: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        offsets, longest = self.offsets, self.longest
        if len(query) != len(key):
            offsets, longest = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device), 1
        attended = varlen.varlen_attn(query, key, value, offsets, self.offsets, longest, self.longest)
        assert isinstance(attended, Tensor)  # a pair only where more is asked for
        return attended
