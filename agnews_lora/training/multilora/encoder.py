"""The frozen encoder of RoBERTa and BERT, computed from Hugging Face's weights for the tokens of many slots at once.

Only what a classifier reads is computed: the last layer's query, attention output and feed-forward block see the first
token of each row alone.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from agnews_lora.adapters.spec import ATTENTION_OUTPUT, FFN_IN, FFN_OUT, KEY, QUERY, VALUE, Family
from agnews_lora.errors import BaseModelError
from agnews_lora.training.multilora.packing import Packing


class Adapters(Protocol):
    """What the slots add to the encoder's matrix products."""

    def add(self, output: Tensor, x: Tensor, module: str, layer: int, sizes: tuple[int, ...]) -> Tensor:
        """`output` [n, out] of a module, plus each slot's own part for its segment of `x` [n, in]."""
        ...


@dataclass(frozen=True)
class Affine:
    """Weight [out, in] and bias [out] of a matrix product, or scale and shift [width] of a normalisation."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, start: int, stop: int) -> "Affine":
        """Some of the outputs alone."""
        return Affine(self.weight[start:stop], self.bias[start:stop])


@dataclass(frozen=True)
class Layer:
    """One encoder layer; query, key and value lie one below the other in `query_key_value` [3·hidden, hidden]."""

    query_key_value: Affine
    attention_output: Affine
    attention_norm: Affine
    ffn_in: Affine
    ffn_out: Affine
    ffn_norm: Affine


class Encoder:
    """The frozen weights, in the precision that is computed in.

    Raises:
        BaseModelError: an activation or a kind of position that this forward pass does not compute.
    """

    def __init__(self, model: torch.nn.Module, family: Family, device: torch.device, dtype: torch.dtype) -> None:
        config: Any = model.config
        _require_known(config)
        weights = {
            name.removeprefix(f"{family}."): tensor.detach().to(device, dtype)
            for name, tensor in model.state_dict().items()
            if name.startswith(f"{family}.") and tensor.is_floating_point()
        }
        self.num_heads = int(config.num_attention_heads)
        self.hidden_size = int(config.hidden_size)
        self.epsilon = float(config.layer_norm_eps)
        self.device, self.dtype = device, dtype
        self.words = weights["embeddings.word_embeddings.weight"]
        # RoBERTa counts positions from the one behind its padding's (fairseq's `make_positions`).
        first = config.pad_token_id + 1 if family == "roberta" else 0
        types = weights["embeddings.token_type_embeddings.weight"][0]
        self.places = weights["embeddings.position_embeddings.weight"][first:] + types
        self.embedding_norm = _affine(weights, "embeddings.LayerNorm")
        self.layers = [_layer(weights, f"encoder.layer.{number}") for number in range(config.num_hidden_layers)]
        self.pooler = _affine(weights, "pooler.dense") if family == "bert" else None

    def __call__(self, packing: Packing, adapters: Adapters) -> Tensor:
        """What the classifier reads, [rows, hidden]: RoBERTa's first token, or BERT's pooled one."""
        x = self._norm(self.words[packing.ids] + self.places[packing.positions], self.embedding_norm)
        for number in range(len(self.layers)):
            x = self._layer(number, x, packing, adapters)
        return x if self.pooler is None else torch.tanh(self.pooler(x))

    def _layer(self, number: int, x: Tensor, packing: Packing, adapters: Adapters) -> Tensor:
        layer, hidden, sizes = self.layers[number], self.hidden_size, packing.token_sizes
        if number < len(self.layers) - 1:
            read, read_sizes = x, sizes
            query, key, value = layer.query_key_value(x).split(hidden, dim=1)
        else:
            read, read_sizes = x.index_select(0, packing.first), packing.row_sizes
            query = layer.query_key_value.rows(0, hidden)(read)
            key, value = layer.query_key_value.rows(hidden, 3 * hidden)(x).split(hidden, dim=1)
        query = adapters.add(query, read, QUERY, number, read_sizes)
        key = adapters.add(key, x, KEY, number, sizes)
        value = adapters.add(value, x, VALUE, number, sizes)
        by_head = [part.reshape(-1, self.num_heads, hidden // self.num_heads) for part in (query, key, value)]
        context = packing.attention(*by_head).flatten(1)
        attended = adapters.add(layer.attention_output(context), context, ATTENTION_OUTPUT, number, read_sizes)
        x = self._norm(read + attended, layer.attention_norm)
        inner = F.gelu(adapters.add(layer.ffn_in(x), x, FFN_IN, number, read_sizes))
        output = adapters.add(layer.ffn_out(inner), inner, FFN_OUT, number, read_sizes)
        return self._norm(x + output, layer.ffn_norm)

    def _norm(self, x: Tensor, norm: Affine) -> Tensor:
        return F.layer_norm(x, (self.hidden_size,), norm.weight, norm.bias, self.epsilon)


def _affine(weights: dict[str, Tensor], name: str) -> Affine:
    return Affine(weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer(weights: dict[str, Tensor], name: str) -> Layer:
    parts = [_affine(weights, f"{name}.{module}") for module in (QUERY, KEY, VALUE)]
    return Layer(
        query_key_value=Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
        attention_output=_affine(weights, f"{name}.{ATTENTION_OUTPUT}"),
        attention_norm=_affine(weights, f"{name}.attention.output.LayerNorm"),
        ffn_in=_affine(weights, f"{name}.{FFN_IN}"),
        ffn_out=_affine(weights, f"{name}.{FFN_OUT}"),
        ffn_norm=_affine(weights, f"{name}.output.LayerNorm"),
    )


def _require_known(config: Any) -> None:
    known = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in known.items():
        if (found := getattr(config, key, value)) != value:
            raise BaseModelError(
                f"engine multilora computes {key} {value!r}, but the base model's configuration says {found!r}; take "
                "`engine: trainer`"
            )
