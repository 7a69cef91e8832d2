"""A layer compiled for CUDA, where the launches of a small batch's kernels take longer than the kernels.

Sizes that vary from pass to pass (tokens, rows, slots, ranks) are marked as dynamic, so that one compiled layer serves
all passes. The compiler still makes one each for the first layer (no gradient to its input), the last (first tokens
alone) and those between; for training with dropout, without, and scoring; and for every set of modules that slots have
had. No CUDA graphs: each is of one token count, and keeps its memory.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from agnews_lora.training.multilora.attention import Attention, FlatAttention
from agnews_lora.training.multilora.encoder import Layer, LayerFunction, LayerUpdates, encode_layer
from agnews_lora.training.multilora.lora import GroupedUpdates

# Compiled layers of one process: (3 places x 2 + 2 in scoring) for each of the sets of modules that grow as trials come
# (6 at most), and again of a single slot or row, whose size is a constant to the compiler. Beyond: uncompiled.
MAX_COMPILED = 96

Value = TypeVar("Value")


class LayerCompiler:
    """Chooses how layers are computed: compiled on CUDA until that fails, uncompiled everywhere else."""

    def __init__(self, device: torch.device) -> None:
        self.compiles, self.failed = device.type == "cuda", ""

    def layer_function(self, flat: bool) -> LayerFunction:
        """Give the function that computes a layer; only tokens without padding are worth compiling for."""
        return encode_compiled if self.compiles and flat else encode_layer

    def run(self, call: Callable[[], Value]) -> Value:
        """Call `call`, which asks for `layer_function`; where it fails compiled, call it again uncompiled."""
        if not self.compiles:
            return call()
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything; a fault of the program is raised again below
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logging.getLogger(__name__).warning("layers are computed uncompiled from here on, which is slower (%s)", reason)
        self.compiles, self.failed = False, f"uncompiled: {reason}"
        return call()


def encode_compiled(
    layer: Layer, x: Tensor, first: Tensor | None, attention: Attention, updates: LayerUpdates
) -> Tensor:
    """Compute a layer as `encode_layer` does, for tokens without padding."""
    assert isinstance(attention, FlatAttention) and isinstance(updates, GroupedUpdates)
    _mark(x, 0)
    _mark(attention.offsets, 0)
    if first is not None:
        _mark(first, 0)
    _mark(updates.ends, 0)
    _mark(updates.row_ends, 0)
    for a, b in zip(updates.a.values(), updates.b.values(), strict=True):
        _mark(a, 0, 2)
        _mark(b, 0, 1)
    if updates.dropout is not None:
        for tensor in (updates.dropout.tokens, updates.dropout.bounds, updates.dropout.first):
            _mark(tensor, 0)
    return _compiled()(layer, x, first, attention, updates)


def _mark(tensor: Tensor, *dimensions: int) -> None:
    torch._dynamo.maybe_mark_dynamic(tensor, dimensions)


@cache
def _compiled() -> LayerFunction:
    return compile_layer("inductor")


def compile_layer(backend: str | Callable[..., Any]) -> LayerFunction:
    """Wrap `encode_layer` so that a backend of torch's compiles it when it is called."""
    import torch.fx.experimental._config as symbols

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED)
    # Ranks, slots and places in memory that happen to be the same number in one pass are not so in the next.
    symbols.use_duck_shape = False
    return torch.compile(encode_layer, backend=backend, fullgraph=True)
