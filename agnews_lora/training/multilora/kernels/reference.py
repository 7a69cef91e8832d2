"""The operations that a pass through the encoder consists of, in plain torch, for any device and precision.

It says what each operation computes: faster kernels override these methods one by one and are tested against them, and
this code takes their place where they do not run. Matrices [n, width] hold a token or a row's first token in each row;
those given may be views with a larger row stride. Products are summed in fp32 or better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agnews_lora.training.multilora import optimizer
from agnews_lora.training.multilora.dropout import Mask
from agnews_lora.training.multilora.encoder import Affine, Layer, Norm
from agnews_lora.training.multilora.optimizer import SlotSteps
from agnews_lora.training.multilora.packing import Rows, Segments
from agnews_lora.training.multilora.slots import Slots

Saved = Any  # what an operation keeps for its gradient: known to the class alone that computes both


@dataclass(frozen=True)
class Lora:
    """The updates of M modules that read one input and whose outputs lie side by side, for S segments.

    Where a segment's slot does not adapt a module, a and b are 0, the h of its tokens is never read, and its gradients
    stay 0. r is a multiple of 8; ranks below it are filled with zeros.

    a: [M, S, r, in], and b: [M, S, r, out], multiplied by alpha / rank and the factor of dropout: in the precision of
    the pass. of_a, of_b: their gradients, fp32, zero before they are computed; None in scoring. adapts: [m][s] whether
    a segment's slot adapts a module. flags: the same [M, S] on the device, int32. modules: numbers [m] for the mask.
    """

    a: Tensor
    b: Tensor
    of_a: Tensor | None
    of_b: Tensor | None
    adapts: tuple[tuple[bool, ...], ...]
    flags: Tensor
    modules: tuple[int, ...]

    def __getitem__(self, own: slice) -> "Lora":
        """Give the updates of some of the modules."""
        of_a, of_b = (None if each is None else each[own] for each in (self.of_a, self.of_b))
        return Lora(self.a[own], self.b[own], of_a, of_b, self.adapts[own], self.flags[own], self.modules[own])

    @property
    def is_empty(self) -> bool:
        """Whether no segment's slot adapts any of the modules."""
        return not any(map(any, self.adapts))


class Kernels:
    """The operations in plain torch.

    replays: whether operations launch the same for all passes of one `Layout.shape`.

    Args:
        layers: all products will be with their weights.
    """

    name = "torch"
    replays = False

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.num_heads = layers[0].num_heads

    # Frozen products -------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, affine: Affine) -> Tensor:
        """Compute x Wᵀ + b."""
        return F.linear(x, affine.weight, affine.bias)

    def linear_gradient(self, g: Tensor, affine: Affine) -> Tensor:
        """Compute the gradient g W of the input."""
        return g @ affine.weight

    # Low-rank updates ------------------------------------------------------------------------------------------------

    def lora_down(self, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None) -> Saved:
        """Compute h [n, M, r]: h[t, m] = drop_m(x[t]) · a[m, segment of t]ᵀ, in fp32 or the precision of the pass."""
        h = x.new_empty(len(x), *lora.a.shape[::2])
        for m, s, part in _adapted(lora, segments):
            torch.mm(_dropped(x[part], mask, lora, m, s, part), lora.a[m, s].t(), out=h[part, m])
        return h

    def lora_up(self, out: Tensor, h: Saved, lora: Lora, segments: Segments) -> None:
        """Add h[t, m] · b[m, segment of t] to the columns m · out_features of `out`, in place."""
        width = lora.b.shape[3]
        for m, s, part in _adapted(lora, segments):
            out[part, m * width : (m + 1) * width].addmm_(h[part, m], lora.b[m, s])

    def lora_up_gelu(self, z: Tensor, h: Saved, lora: Lora, segments: Segments, training: bool) -> tuple[Tensor, Saved]:
        """Compute GELU of z with the updates added (`lora_up`, `gelu`)."""
        self.lora_up(z, h, lora, segments)
        return self.gelu(z, training)

    def lora_up_gradients(self, g: Tensor, h: Saved, lora: Lora, segments: Segments) -> Saved:
        """Write `lora.of_b`, of the gradient g [n, M · out] of the outputs; the gradient [n, M, r] of h."""
        assert lora.of_b is not None
        width, of_h = lora.b.shape[3], torch.empty_like(h)
        for m, s, part in _adapted(lora, segments):
            own = g[part, m * width : (m + 1) * width]
            torch.mm(own, lora.b[m, s].t(), out=of_h[part, m])
            lora.of_b[m, s] = h[part, m].t() @ own
        return of_h

    def lora_down_gradients(
        self, of_x: Tensor | None, of_h: Saved, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None
    ) -> None:
        """Write `lora.of_a`, and add the gradient drop_m(of_h a) of x to `of_x` in place, where there is one."""
        assert lora.of_a is not None
        for m, s, part in _adapted(lora, segments):
            own = of_h[part, m]
            lora.of_a[m, s] = own.t() @ _dropped(x[part], mask, lora, m, s, part)
            if of_x is None:
                continue
            if mask is not None and mask.drops[s]:
                of_x[part] += mask.apply(own @ lora.a[m, s], part, lora.modules[m])
            else:
                of_x[part].addmm_(own, lora.a[m, s])

    def lora_down_gelu_gradients(
        self, of_x: Tensor, of_h: Saved, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None, activated: Saved
    ) -> Tensor:
        """Compute the gradient of what x is the GELU of (`lora_down_gradients`, `gelu_gradient`)."""
        self.lora_down_gradients(of_x, of_h, x, lora, segments, mask)
        return self.gelu_gradient(of_x, activated)

    # Attention -------------------------------------------------------------------------------------------------------

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, of_rows: bool, training: bool
    ) -> tuple[Tensor, Saved]:
        """Compute softmax(q kᵀ / √size) v inside each row, heads side by side in the columns.

        Written out, on rows padded to the longest: in short rows on a CPU, torch's own `scaled_dot_product_attention`
        takes two to three times as long, and its backward pass in bf16 fifteen times.

        Args:
            q: [n, hidden] of all tokens, or (of_rows) of each row's first alone.

        Returns:
            the context [n, hidden] of the same tokens, 0 where they belong to no row.
        """
        scale = (q.shape[1] // self.num_heads) ** -0.5
        queries = self._by_head(q * scale, rows, of_rows)
        keys, values = (self._by_head(part, rows, False) for part in (k, v))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        padding = rows.padding[:, None, None, :]
        scores.view(len(padding), self.num_heads, -1, rows.width).masked_fill_(padding, float("-inf"))
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        context = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._by_token(torch.bmm(shares, values), rows, of_rows, context)
        return context, (queries, keys, values, shares, scale, of_rows) if training else None

    def attention_gradients(
        self, g: Tensor, saved: Saved, rows: Rows, of_q: Tensor, of_k: Tensor, of_v: Tensor
    ) -> None:
        """Write the gradients of q, k and v, of the context's g: 0 where a token belongs to no row."""
        queries, keys, values, shares, scale, of_rows = saved
        context = self._by_head(g, rows, of_rows)
        of_shares = torch.bmm(context, values.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        self._by_token(torch.bmm(of_scores, keys).mul_(scale), rows, of_rows, of_q)
        self._by_token(torch.bmm(of_scores.transpose(1, 2), queries), rows, False, of_k)
        self._by_token(torch.bmm(shares.transpose(1, 2), context), rows, False, of_v)

    def _by_head(self, x: Tensor, rows: Rows, of_rows: bool) -> Tensor:
        """Copy x [n, hidden] to (rows · heads, width, size), padded with zeros, or to (rows · heads, 1, size)."""
        padded = x
        if not of_rows:
            padded = x.new_zeros(len(rows.first) * rows.width, x.shape[1]).index_copy_(0, rows.places, x[: rows.total])
        heads = padded.view(len(rows.first), -1, self.num_heads, x.shape[1] // self.num_heads)
        return heads.transpose(1, 2).flatten(0, 1)

    def _by_token(self, x: Tensor, rows: Rows, of_rows: bool, out: Tensor) -> None:
        """Write x (rows · heads, width, size) to `out` [n, hidden]."""
        heads = x.view(len(rows.first), self.num_heads, -1, x.shape[2]).transpose(1, 2)
        if of_rows:
            out.view(heads.squeeze(1).shape).copy_(heads.squeeze(1))
        else:
            out[: rows.total] = heads.reshape(-1, out.shape[1]).index_select(0, rows.places)
            out[rows.total :] = 0.0

    # Between the products --------------------------------------------------------------------------------------------

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm, training: bool) -> tuple[Tensor, Saved]:
        """Compute LayerNorm(x + y)."""
        total = x + y
        out, mean, rstd = torch.native_layer_norm(total, norm.weight.shape, norm.weight, norm.bias, norm.epsilon)
        return out, (total, mean, rstd) if training else None

    def add_norm_gradient(self, g: Tensor, g2: Tensor | None, saved: Saved, norm: Norm) -> Tensor:
        """Compute the gradient of x + y, of the output's g (+ g2)."""
        total, mean, rstd = saved
        g = g if g2 is None else g + g2
        wanted = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(
            g, total, norm.weight.shape, mean, rstd, norm.weight, norm.bias, wanted
        )[0]

    def gelu(self, z: Tensor, training: bool) -> tuple[Tensor, Saved]:
        """Compute GELU with erf; `z` is not used afterwards."""
        return F.gelu(z), z if training else None

    def gelu_gradient(self, g: Tensor, saved: Saved) -> Tensor:
        """Compute the gradient of z, of the output's g, which is not used afterwards."""
        return torch.ops.aten.gelu_backward(g, saved)

    # Optimizer -------------------------------------------------------------------------------------------------------

    def adamw(self, slots: Slots, gradients: Tensor, steps: SlotSteps, weight_decay: float, max_norm: float) -> Tensor:
        """Clip gradients [K, columns], which are not used afterwards, and update all slots; their norms [K] before."""
        norms = optimizer.clip(slots, gradients, max_norm)
        optimizer.step(slots, gradients, steps, weight_decay)
        return norms


def _adapted(lora: Lora, segments: Segments) -> list[tuple[int, int, slice]]:
    """List the updates that there are: module, segment and its rows."""
    return [(m, s, part) for m, adapts in enumerate(lora.adapts) for s, part in enumerate(segments.parts) if adapts[s]]


def _dropped(x: Tensor, mask: Mask | None, lora: Lora, m: int, s: int, part: slice) -> Tensor:
    return mask.apply(x, part, lora.modules[m]) if mask is not None and mask.drops[s] else x
