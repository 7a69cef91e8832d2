"""Dropout that is a function of (trial seed, step, layer, module, row, place, feature).

A hash of those numbers decides which features are dropped, not a generator's state: neighbours, the layout of the
tokens and the number of masks drawn before change nothing, and one pass over all tokens serves all slots. The hash
is a 32-bit integer finaliser (Wellons 2018, https://nullprogram.com/blog/2018/07/31/, `lowbias32`) in torch's int32
arithmetic, which wraps around; its two halves decide over two features each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agnews_lora.training.multilora.packing import PackedBatch, on_device

DRAWS = 2**15  # a probability is a multiple of 1 / DRAWS
LAYER_SALT = 64  # more than there are modules in a layer
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # multipliers, as int32
_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 / golden ratio, odd: consecutive numbers land far apart


@dataclass(frozen=True)
class DropoutKey:
    """Key of a slot's masks in one step."""

    probability: float
    seed: int
    step: int


def key_arrays(slots: Sequence[int], keys: Mapping[int, DropoutKey]) -> list[npt.NDArray[Any]]:
    """Compute hash and bound [2, K] int32, and factor [K], of the segments of some slots."""
    own = [keys.get(slot, DropoutKey(0.0, 0, 0)) for slot in slots]
    hashes = [int(np.random.SeedSequence([key.seed, key.step]).generate_state(1, np.uint32)[0]) for key in own]
    dropped = [_num_dropped(key) for key in own]
    described = np.array([hashes, [count - 1 for count in dropped]], dtype=np.int64).astype(np.int32)
    return [described, np.array([1 / (1 - count / DRAWS) for count in dropped], dtype=np.float32)]


def _num_dropped(key: DropoutKey) -> int:
    return round(key.probability * DRAWS)


class Dropout:
    """One pass's masks. Features that stay are not scaled: the caller scales the update by `factors` instead.

    factors: [K], of each segment.

    Args:
        keys: {slot: its key}; a slot without one drops nothing.
        arrays: those of `key_arrays`, if they are on the device already.
    """

    def __init__(
        self, packed: PackedBatch, keys: Mapping[int, DropoutKey], arrays: Sequence[Tensor] | None = None
    ) -> None:
        by_segment, self.factors = arrays or on_device(key_arrays(packed.slots, keys), packed.ids.device)
        own_hash, bound = by_segment[:, packed.token_segments]
        # A token is known by its row in the table and its place in the row, wherever it lies in the pass.
        self.tokens = mixed(own_hash ^ mixed(packed.token_rows.int() * _GOLDEN + packed.token_places.int()))
        self.bounds = bound.to(torch.int16)
        self.drops = tuple(slot in keys and _num_dropped(keys[slot]) > 0 for slot in packed.slots)

    def layer(self, number: int) -> "Mask":
        """Give the masks of one layer."""
        return Mask(self.tokens, self.bounds, number * LAYER_SALT + 1, self.drops)


@dataclass(frozen=True)
class Mask:
    """The features that one layer drops of the inputs of its modules.

    tokens: [n] int32, a hash of each token. bounds: [n] int16, draws up to it are dropped; -1 where none is. salt: of
    the layer. drops: whether a segment drops any.
    """

    tokens: Tensor
    bounds: Tensor
    salt: int
    drops: tuple[bool, ...]
    _kept: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def of(self, tokens: Tensor) -> "Mask":
        """Give the mask of some tokens alone."""
        return Mask(self.tokens[tokens], self.bounds[tokens], self.salt, self.drops)

    def keys(self, module: int, part: slice = slice(None)) -> Tensor:
        """Give the key [of part] of each token in a module, that of its number."""
        return mixed(self.tokens[part] ^ (self.salt + module))

    def apply(self, x: Tensor, part: slice, module: int) -> Tensor:
        """Copy `x` [of part, features] with the features zeroed that the module drops. part: of the tokens.

        In integers alone, on the floats' own bits: on a CPU, torch's comparisons and `masked_fill` take five times as
        long. A mask is drawn once for the forward and the backward pass.
        """
        place = (part.start, part.stop, module)
        if place not in self._kept:
            self._kept[place] = kept_bits(self.keys(module, part), self.bounds[part], x.shape[1], x.dtype)
        kept = self._kept[place]
        return (x.view(kept.dtype) & kept).view(x.dtype)


def kept_bits(keys: Tensor, bounds: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Draw integers [n, features] of the size of `dtype`: all bits set where a feature stays, none where it is dropped.

    Args:
        keys: [n] int32.
        bounds: [n] int16.
    """
    pairs = torch.arange(-(-features // 2), dtype=torch.int32, device=keys.device)
    drawn = keys[:, None] ^ mixed(pairs)
    drawn.mul_(_FIRST)
    drawn.bitwise_xor_((drawn >> 15).bitwise_and_(0x1FFFF))  # a shift of int32 copies the sign, which is not wanted
    drawn.mul_(_SECOND)
    drawn.bitwise_xor_((drawn >> 16).bitwise_and_(0xFFFF))
    drawn.bitwise_and_(0x7FFF7FFF)  # two keys of 15 bits
    kept = bounds[:, None] - drawn.view(torch.int16)[:, :features]
    kept.bitwise_right_shift_(15)  # all bits set where the key is above its bound, else none
    return kept.to(torch.int32) if dtype.itemsize == 4 else kept


def mixed(x: Tensor) -> Tensor:
    """Spread every bit of int32 `x` over all 32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)
