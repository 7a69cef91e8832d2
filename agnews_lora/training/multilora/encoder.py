"""The frozen weights of an encoder of BERT's kind, read from Hugging Face's model, and what lies around its layers."""

from dataclasses import dataclass
from typing import Any

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
from agnews_lora.training.multilora.packing import PackedBatch


@dataclass(frozen=True, eq=False)
class Affine:
    """Weight [out, in] and bias [out] of a matrix product."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Norm:
    """Scale and shift [width] of a layer's normalisation."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, eq=False)
class Layer:
    """One encoder layer.

    query_key_value: the three one below the other [3 · hidden, hidden]; query, key_value: its parts, for the last layer
    alone.
    """

    num_heads: int
    query_key_value: Affine
    query: Affine
    key_value: Affine
    attention_output: Affine
    attention_norm: Norm
    ffn_in: Affine
    ffn_out: Affine
    ffn_norm: Norm


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
            weight, bias = (torch.cat([getattr(part, name) for part in stacked]) for name in ("weight", "bias"))
            hidden = weight.shape[1]
            after_attention, after_ffn = (norm(each) for each in module.modules() if isinstance(each, LayerNorm))
            return Layer(
                num_heads=int(config.num_attention_heads),
                query_key_value=Affine(weight, bias),
                query=Affine(weight[:hidden], bias[:hidden]),
                key_value=Affine(weight[hidden:], bias[hidden:]),
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

    def embed(self, packed: PackedBatch) -> Tensor:
        """Compute the first layer's input [tokens, hidden]."""
        x = self.embedding_norm(self.words.index_select(0, packed.ids) + self.places.index_select(0, packed.positions))
        return x if self.projection is None else self.projection(x)

    def pool(self, x: Tensor) -> Tensor:
        """Compute the classifier's input [rows, hidden] from the last layer's output for each row's first token."""
        return x if self.pooler is None else torch.tanh(self.pooler(x))
