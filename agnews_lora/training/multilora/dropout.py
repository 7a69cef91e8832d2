"""Dropout that follows from (trial seed, step, layer, module, row, place, feature) and from nothing else.

Whether a feature is kept is decided by a hash of those numbers, not by a generator's state: neighbours, the layout of
the tokens and the number of masks drawn before change nothing, and one pass over all tokens serves all slots. The hash
is a 32-bit integer finaliser (Wellons 2018, https://nullprogram.com/blog/2018/07/31/, `lowbias32`) in torch's int32
arithmetic, which wraps around; its two halves decide over two features each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_lora.training.multilora.packing import Packing, on_device

DRAWS = 2**15  # a probability is a multiple of 1 / DRAWS
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # multipliers, as int32
_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio, odd: consecutive numbers land far apart


@dataclass(frozen=True)
class Draw:
    """Where a slot's masks of one step come from."""

    probability: float
    seed: int
    step: int


class Dropout:
    """One pass's masks. Kept features are left as they are: `factors` [K] is what the update is to be scaled by."""

    def __init__(self, packing: Packing, draws: Mapping[int, Draw], num_slots: int) -> None:
        """draws: {slot: its draw}; a slot without one drops nothing."""
        own = [draws.get(slot, Draw(0.0, 0, 0)) for slot in range(num_slots)]
        keys = [int(np.random.SeedSequence([draw.seed, draw.step]).generate_state(1, np.uint32)[0]) for draw in own]
        dropped = [round(draw.probability * DRAWS) for draw in own]
        described = np.array([keys, [count - 1 for count in dropped]], dtype=np.int64).astype(np.int32)
        factors = np.array([1 / (1 - count / DRAWS) for count in dropped], dtype=np.float32)
        by_slot, self.factors = on_device([described, factors], packing.ids.device)
        key, bound = by_slot[:, packing.token_slots]
        # A token is known by its row in the table and its place in the row, wherever it lies in the pass.
        self.tokens = _mixed(key ^ _mixed(packing.token_rows.int() * _GOLDEN + packing.positions.int()))
        self.bounds = bound[:, None].to(torch.int16)
        self.packing = packing

    def layer(self, number: int) -> "LayerDropout":
        """The masks of one layer."""
        salt: int | Tensor = number * 64 + 1
        if self.packing.flat:  # a compiled layer is one for all numbers only if it reads its own from the device
            salt = torch.full((), number * 64 + 1, dtype=torch.int32, device=self.tokens.device)
        return LayerDropout(self.tokens, self.bounds, self.packing.first, salt)


@dataclass(frozen=True)
class LayerDropout:
    """The masks of one layer: tokens [n] int32, bounds [n, 1] int16, first (rows,) index of each row's first token."""

    tokens: Tensor
    bounds: Tensor
    first: Tensor
    salt: int | Tensor

    def __call__(self, x: Tensor, module: int, of_rows: bool) -> Tensor:
        """`x` [n, features] of all tokens, or of each row's first alone, as a module is to see it."""
        keys, bounds = self.keys(module, of_rows)
        # Of one expression a compiler makes one kernel; it would cut the other one at its view of other integers.
        return kept(x, keys, bounds) if torch.compiler.is_compiling() else Kept.apply(x, keys, bounds)

    def keys(self, module: int, of_rows: bool) -> tuple[Tensor, Tensor]:
        """(keys [n], bounds [n, 1]) of all tokens in a module, or of each row's first token alone."""
        tokens, bounds = self.tokens, self.bounds
        if of_rows:
            tokens, bounds = tokens[self.first], bounds[self.first]
        return _mixed(tokens ^ (self.salt + module)), bounds


def kept(x: Tensor, keys: Tensor, bounds: Tensor) -> Tensor:
    """What `Kept` gives, feature by feature, for CUDA's compiler: in C++, products that overflow are undefined."""
    features = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    drawn = (keys[:, None] ^ _mixed(features >> 1)) * _FIRST
    drawn = (drawn ^ ((drawn >> 15) & 0x1FFFF)) * _SECOND
    drawn = drawn ^ ((drawn >> 16) & 0xFFFF)
    drawn = torch.where((features & 1) == 0, drawn, drawn >> 16) & 0x7FFF
    return x.masked_fill(drawn <= bounds, 0.0)


class Kept(torch.autograd.Function):
    """`x` [n, features] with zeros where a feature is dropped; keys [n] int32, bounds [n, 1] int16.

    In integers alone, on the floats' own bits: on a CPU, torch's comparisons and `masked_fill` take five times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, bounds: Tensor) -> Tensor:
        pairs = torch.arange(-(-x.shape[1] // 2), dtype=torch.int32, device=x.device)
        drawn = keys[:, None] ^ _mixed(pairs)
        drawn.mul_(_FIRST)
        drawn.bitwise_xor_((drawn >> 15).bitwise_and_(0x1FFFF))  # a shift of int32 copies the sign, which is not wanted
        drawn.mul_(_SECOND)
        drawn.bitwise_xor_((drawn >> 16).bitwise_and_(0xFFFF))
        drawn.bitwise_and_(0x7FFF7FFF)  # two draws of 15 bits
        mask = bounds - drawn.view(torch.int16)[:, : x.shape[1]]
        mask.bitwise_right_shift_(15)  # all bits set where the draw is above its bound, else none
        if x.element_size() == 4:
            mask = mask.to(torch.int32)
        ctx.save_for_backward(mask)
        return _masked(x, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return _masked(gradients[0].contiguous(), mask), None, None


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return (x.view(mask.dtype) & mask).view(x.dtype)


def _mixed(x: Tensor) -> Tensor:
    """Every bit of int32 `x` spread over all 32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)
