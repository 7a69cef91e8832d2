"""Attention inside each row of a batch, in two layouts: rows padded to their segment's longest, or not at all."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import varlen


class Attention(Protocol):
    """Attention of the queries to the tokens of their own row."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, of_rows: bool) -> Tensor:
        """Attend by queries [n, heads, size]: those of all tokens, or (of_rows) of each row's first alone."""
        ...


@dataclass(frozen=True)
class PaddedAttention:
    """Rows padded to the longest of their segment, a segment at a time.

    row_sizes, token_sizes: of each segment. paddings: for each segment (rows, 1, 1, width), true where there is no
    token, or None where nothing is padded.
    """

    row_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]
    paddings: tuple[Tensor | None, ...]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, of_rows: bool) -> Tensor:
        query_sizes = self.row_sizes if of_rows else self.token_sizes
        parts = zip(query.split(query_sizes), key.split(self.token_sizes), value.split(self.token_sizes), strict=True)
        context = []
        for segment, rows, padding in zip(parts, self.row_sizes, self.paddings, strict=True):
            q, k, v = (part.view(rows, -1, *part.shape[1:]) for part in segment)
            context.append(_ScaledProducts.apply(q, k, v, padding).flatten(0, 1))
        return torch.cat(context) if len(context) > 1 else context[0]


class _ScaledProducts(torch.autograd.Function):
    """Compute softmax(q kᵀ / √size) v of queries (rows, queries, heads, size), softmax in fp32, padding left out.

    Written out: in short rows on a CPU, torch's own `scaled_dot_product_attention` takes two to three times as long,
    and its backward pass in bf16 fifteen times.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        rows, queries, heads, size = query.shape
        q, k, v = (_by_head(part) for part in (query * size**-0.5, key, value))
        scores = torch.bmm(q, k.transpose(1, 2))
        if padding is not None:
            scores.view(rows, heads, queries, -1).masked_fill_(padding, float("-inf"))
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        ctx.save_for_backward(q, k, v, shares)
        return _by_row(torch.bmm(shares, v), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, shares = ctx.saved_tensors
        rows, size = gradients[0].shape[0], q.shape[-1]
        context = _by_head(gradients[0])
        of_shares = torch.bmm(context, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_query = torch.bmm(of_scores, k).mul_(size**-0.5)
        of_key = torch.bmm(of_scores.transpose(1, 2), q)
        of_value = torch.bmm(shares.transpose(1, 2), context)
        return *(_by_row(part, rows) for part in (of_query, of_key, of_value)), None


def _by_head(x: Tensor) -> Tensor:
    """View (rows, n, heads, size) as (rows · heads, n, size)."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _by_row(x: Tensor, rows: int) -> Tensor:
    """View (rows · heads, n, size) as (rows, n, heads, size)."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class FlatAttention:
    """Rows one behind the other without padding, by flash attention over variable lengths (CUDA, bf16).

    offsets: (rows + 1,) int32, where each row starts and the last one ends. longest: no row has more tokens.
    """

    offsets: Tensor
    longest: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, of_rows: bool) -> Tensor:
        offsets, longest = self.offsets, self.longest
        if of_rows:
            offsets, longest = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device), 1
        attended = varlen.varlen_attn(query, key, value, offsets, self.offsets, longest, self.longest)
        assert isinstance(attended, Tensor)  # a pair only where more is asked for
        return attended
