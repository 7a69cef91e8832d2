"""Dropout that is a function of (trial seed, step, layer, module, row, place, feature).

A hash of those numbers decides which features are dropped, not a generator's state: neighbours, the layout of the
tokens and the number of masks drawn before change nothing, and one pass over all tokens serves all slots. The hash
is a 32-bit integer finaliser (Wellons 2018, https://nullprogram.com/blog/2018/07/31/, `lowbias32`) in torch's int32
arithmetic, which wraps around; its two halves decide over two features each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agnews_lora.training.multilora.packing import PackedBatch, on_device

DRAWS = 2**15  # a probability is a multiple of 1 / DRAWS
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # multipliers, as int32
_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio, odd: consecutive numbers land far apart


@dataclass(frozen=True)
class DropoutKey:
    """Key of a slot's masks in one step."""

    probability: float
    seed: int
    step: int


class Dropout:
    """One pass's masks. Features that stay are not scaled: the caller scales the update by `factors` [K] instead.

    Args:
        keys: {slot: its key}; a slot without one drops nothing.
    """

    def __init__(self, packed: PackedBatch, keys: Mapping[int, DropoutKey], num_slots: int) -> None:
        own = [keys.get(slot, DropoutKey(0.0, 0, 0)) for slot in range(num_slots)]
        hashes = [int(np.random.SeedSequence([key.seed, key.step]).generate_state(1, np.uint32)[0]) for key in own]
        dropped = [round(key.probability * DRAWS) for key in own]
        described = np.array([hashes, [count - 1 for count in dropped]], dtype=np.int64).astype(np.int32)
        factors = np.array([1 / (1 - count / DRAWS) for count in dropped], dtype=np.float32)
        by_slot, self.factors = on_device([described, factors], packed.ids.device)
        own_hash, bound = by_slot[:, packed.token_slots]
        # A token is known by its row in the table and its place in the row, wherever it lies in the pass.
        self.tokens = _mixed(own_hash ^ _mixed(packed.token_rows.int() * _GOLDEN + packed.token_places.int()))
        self.bounds = bound[:, None].to(torch.int16)
        self.packed = packed

    def layer(self, number: int) -> "LayerDropout":
        """Give the masks of one layer."""
        salt: int | Tensor = number * 64 + 1
        if self.packed.flat:  # a compiled layer is one for all numbers only if it reads its own from the device
            salt = torch.full((), number * 64 + 1, dtype=torch.int32, device=self.tokens.device)
        return LayerDropout(self.tokens, self.bounds, self.packed.first, salt)


@dataclass(frozen=True)
class LayerDropout:
    """The masks of one layer.

    tokens: [n] int32, a hash of each token. bounds: [n, 1] int16, draws up to it are dropped. first: (rows,) index of
    each row's first token.
    """

    tokens: Tensor
    bounds: Tensor
    first: Tensor
    salt: int | Tensor

    def __call__(self, x: Tensor, module: int, of_rows: bool) -> Tensor:
        """Drop features of a module's input `x` [n, features]: of all tokens, or of each row's first alone."""
        keys, bounds = self.keys(module, of_rows)
        # A compiler makes one kernel of one expression; it would split `HashDropout` at its view as other integers.
        return hash_dropout(x, keys, bounds) if torch.compiler.is_compiling() else HashDropout.apply(x, keys, bounds)

    def keys(self, module: int, of_rows: bool) -> tuple[Tensor, Tensor]:
        """Give (keys [n], bounds [n, 1]) of all tokens in a module, or of each row's first token alone."""
        tokens, bounds = self.tokens, self.bounds
        if of_rows:
            tokens, bounds = tokens[self.first], bounds[self.first]
        return _mixed(tokens ^ (self.salt + module)), bounds


def hash_dropout(x: Tensor, keys: Tensor, bounds: Tensor) -> Tensor:
    """Drop as `HashDropout` does, one feature at a time, for CUDA's compiler: in C++, such overflow is undefined."""
    features = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    drawn = (keys[:, None] ^ _mixed(features >> 1)) * _FIRST
    drawn = (drawn ^ ((drawn >> 15) & 0x1FFFF)) * _SECOND
    drawn = drawn ^ ((drawn >> 16) & 0xFFFF)
    drawn = torch.where((features & 1) == 0, drawn, drawn >> 16) & 0x7FFF
    return x.masked_fill(drawn <= bounds, 0.0)


class HashDropout(torch.autograd.Function):
    """Zero the dropped features of `x` [n, features]; keys [n] int32, bounds [n, 1] int16.

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
        drawn.bitwise_and_(0x7FFF7FFF)  # two keys of 15 bits
        mask = bounds - drawn.view(torch.int16)[:, : x.shape[1]]
        mask.bitwise_right_shift_(15)  # all bits set where the key is above its bound, else none
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
    """Spread every bit of int32 `x` over all 32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)
