"""The frozen encoder of BERT and its like, computed from Hugging Face's weights for the tokens of many slots at once.

The classifier reads the first token of each row alone, so the last layer's query, attention output and feed-forward
block are computed for those tokens only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm

from agnews_lora.adapters.families import (
    ATTENTION_OUTPUT,
    FFN_IN,
    FFN_OUT,
    KEY,
    LAYOUTS,
    QUERY,
    VALUE,
    Family,
)
from agnews_lora.training.multilora.attention import Attention
from agnews_lora.training.multilora.packing import PackedBatch


class LayerUpdates(Protocol):
    """The updates that the slots add to one layer's matrix products."""

    def add(self, output: Tensor, x: Tensor, module: str, of_rows: bool) -> Tensor:
        """Add each slot's part for its segment of `x` [n, in] to a module's `output` [n, out].

        Args:
            of_rows: whether n counts the first tokens of the rows alone.
        """
        ...


@dataclass(frozen=True)
class Affine:
    """Weight [out, in] and bias [out] of a matrix product."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    """Scale and shift [width] of a layer's normalisation."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Layer:
    """One encoder layer; query, key and value lie one below the other in `query_key_value` [3·hidden, hidden]."""

    num_heads: int
    query_key_value: Affine
    attention_output: Affine
    attention_norm: Norm
    ffn_in: Affine
    ffn_out: Affine
    ffn_norm: Norm


def encode_layer(layer: Layer, x: Tensor, first: Tensor | None, attention: Attention, updates: LayerUpdates) -> Tensor:
    """Compute a layer's output [n, hidden] of `x` [tokens, hidden], for all tokens, or for those of `first` alone."""
    hidden, of_rows = x.shape[1], first is not None
    weight, bias = layer.query_key_value.weight, layer.query_key_value.bias
    if first is None:
        read = x
        query, key, value = F.linear(x, weight, bias).split(hidden, dim=1)
    else:
        read = x.index_select(0, first)
        query = F.linear(read, weight[:hidden], bias[:hidden])
        key, value = F.linear(x, weight[hidden:], bias[hidden:]).split(hidden, dim=1)
    query = updates.add(query, read, QUERY, of_rows)
    key = updates.add(key, x, KEY, False)
    value = updates.add(value, x, VALUE, False)
    query, key, value = (part.reshape(-1, layer.num_heads, hidden // layer.num_heads) for part in (query, key, value))
    context = attention(query, key, value, of_rows).flatten(1)
    attended = updates.add(layer.attention_output(context), context, ATTENTION_OUTPUT, of_rows)
    x = layer.attention_norm(read + attended)
    inner = F.gelu(updates.add(layer.ffn_in(x), x, FFN_IN, of_rows))
    return layer.ffn_norm(x + updates.add(layer.ffn_out(inner), inner, FFN_OUT, of_rows))


LayerFunction = Callable[[Layer, Tensor, Tensor | None, Attention, LayerUpdates], Tensor]


class Encoder:
    """The frozen weights, in the precision of the forward pass.

    padding_id: of the tokens that no position counts (`packing.positions`), or None.

    Args:
        model: Hugging Face's, for sequence classification, with nothing that is `unknown_to_multilora`.
    """

    def __init__(self, model: torch.nn.Module, family: Family, device: torch.device, dtype: torch.dtype) -> None:
        config: Any = model.config
        layout = LAYOUTS[family]
        encoder: Any = model.get_submodule(layout.encoder)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype)

        def affine(module: Any) -> Affine:
            return Affine(moved(module.weight), moved(module.bias))

        def norm(module: Any) -> Norm:
            return Norm(moved(module.weight), moved(module.bias), module.eps)

        def layer(module: torch.nn.Module) -> Layer:
            parts = {role: affine(module.get_submodule(path)) for role, path in layout.modules.items()}
            stacked = [parts[role] for role in (QUERY, KEY, VALUE)]
            after_attention, after_ffn = (norm(each) for each in module.modules() if isinstance(each, LayerNorm))
            return Layer(
                num_heads=int(config.num_attention_heads),
                query_key_value=Affine(
                    torch.cat([part.weight for part in stacked]), torch.cat([part.bias for part in stacked])
                ),
                attention_output=parts[ATTENTION_OUTPUT],
                attention_norm=after_attention,
                ffn_in=parts[FFN_IN],
                ffn_out=parts[FFN_OUT],
                ffn_norm=after_ffn,
            )

        embeddings = encoder.embeddings
        self.device, self.dtype = device, dtype
        self.words = moved(embeddings.word_embeddings.weight)
        self.padding_id: int | None = config.pad_token_id if layout.counts_from_padding else None
        self.places = moved(embeddings.position_embeddings.weight)
        if (types := getattr(embeddings, "token_type_embeddings", None)) is not None:
            self.places = self.places + moved(types.weight)[0]
        self.embedding_norm = norm(embeddings.LayerNorm)
        projection = getattr(encoder, "embeddings_project", None)  # ELECTRA's, where its embeddings are smaller
        self.projection = None if projection is None else affine(projection)
        self.layers = [layer(module) for module in encoder.get_submodule(layout.layers)]
        self.pooler = affine(encoder.pooler.dense) if family == "bert" else None

    @property
    def fits_kernels(self) -> bool:
        """Whether flash attention and grouped products compute these sizes in bf16: rows of 16 bytes, heads to 256."""
        layer = self.layers[0]
        intermediate_size, hidden_size = layer.ffn_in.weight.shape
        head_size = hidden_size // layer.num_heads
        return not any(size % 8 for size in (head_size, hidden_size, intermediate_size)) and head_size <= 256

    def __call__(self, packed: PackedBatch, updates: Sequence[LayerUpdates], encode: LayerFunction) -> Tensor:
        """Compute the classifier's input [rows, hidden]: each row's first token, which BERT's pooler goes over.

        Args:
            updates: of each layer.
            encode: computes a layer.
        """
        x = self.embedding_norm(self.words[packed.ids] + self.places[packed.positions])
        if self.projection is not None:
            x = self.projection(x)
        for layer, own in zip(self.layers, updates, strict=True):
            first = packed.first if layer is self.layers[-1] else None
            x = encode(layer, x, first, packed.attention, own)
        return x if self.pooler is None else torch.tanh(self.pooler(x))
