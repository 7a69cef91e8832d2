"""The encoder's layers, forward and backward by hand.

Only the slots' updates train: the backward pass computes no gradients of the frozen weights, and ends at the lowest
update of the first layer. The classifier reads the first token of each row alone, so the last layer's query, attention
output and feed-forward block are computed for those tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agnews_lora.training.multilora.dropout import Mask
from agnews_lora.training.multilora.encoder import Affine, Layer
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora, Saved
from agnews_lora.training.multilora.packing import PackedBatch, Segments


@dataclass(frozen=True)
class LayerUpdates:
    """The updates that the slots of a pass add to one layer; None where no slot adapts any of those modules.

    mask: of the updates' inputs, where any feature is dropped. query_key_value: side by side.
    """

    mask: Mask | None
    query_key_value: Lora | None
    attention_output: Lora | None
    ffn_in: Lora | None
    ffn_out: Lora | None


class EncoderPass:
    """All layers in one pass: forward, then backward if `training`."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[Layer],
        updates: Sequence[LayerUpdates],
        packed: PackedBatch,
        training: bool,
    ) -> None:
        last = len(layers) - 1
        self.layers = [
            LayerPass(kernels, layer, own, packed, number == 0, number == last, training)
            for number, (layer, own) in enumerate(zip(layers, updates, strict=True))
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the last layer's output [rows, hidden] for each row's first token, of its input [tokens, hidden]."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, g: Tensor) -> None:
        """Write the gradients of all updates, of the output's g [rows, hidden]."""
        g2: Tensor | None = None
        while self.layers:  # what a layer keeps is freed behind it
            found = self.layers.pop().backward(g, g2)
            if found is None:
                return
            g, g2 = found


class LayerPass:
    """One layer in one pass. training: whether what the backward pass reads is kept."""

    def __init__(
        self,
        kernels: Kernels,
        layer: Layer,
        updates: LayerUpdates,
        packed: PackedBatch,
        is_first: bool,
        is_last: bool,
        training: bool,
    ) -> None:
        self.kernels, self.layer, self.rows, self.num_tokens = kernels, layer, packed.rows, len(packed.ids)
        self.is_last, self.training = is_last, training
        mask, segments = updates.mask, packed.tokens
        lora = updates.query_key_value
        if is_last:
            self.key_value = _Product(kernels, layer.key_value, _some(lora, slice(1, 3)), segments, mask, training)
            mask, segments = mask and mask.of(packed.rows.first), packed.firsts
            self.query = _Product(kernels, layer.query, _some(lora, slice(0, 1)), segments, mask, training)
            read = [self.query, self.key_value]
        else:
            self.query_key_value = _Product(kernels, layer.query_key_value, lora, segments, mask, training)
            read = [self.query_key_value]
        self.attention_output, self.ffn_in, self.ffn_out = (
            _Product(kernels, affine, own, segments, mask, training)
            for affine, own in (
                (layer.attention_output, updates.attention_output),
                (layer.ffn_in, updates.ffn_in),
                (layer.ffn_out, updates.ffn_out),
            )
        )
        if is_first:
            stages = [read, [self.attention_output], [self.ffn_in], [self.ffn_out]]
            lowest = next((stage for stage in stages if any(each.lora for each in stage)), stages[-1])
            for product in lowest:
                product.is_lowest = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output [n, hidden] of x [tokens, hidden]: of all tokens, in the last layer of the first ones."""
        kernels, layer, training = self.kernels, self.layer, self.training
        hidden = x.shape[1]
        if self.is_last:
            read = x.index_select(0, self.rows.first)
            query = self.query.forward(read)
            key, value = self.key_value.forward(x).split(hidden, dim=1)
        else:
            read = x
            query, key, value = self.query_key_value.forward(x).split(hidden, dim=1)
        context, self.attended = kernels.attention(query, key, value, self.rows, self.is_last, training)
        y = self.attention_output.forward(context)
        x, self.first_norm = kernels.add_norm(read, y, layer.attention_norm, training)
        inner, self.activated = self.ffn_in.forward_gelu(x)
        out, self.second_norm = kernels.add_norm(x, self.ffn_out.forward(inner), layer.ffn_norm, training)
        return out

    attended: Saved
    first_norm: Saved
    activated: Saved
    second_norm: Saved

    def backward(self, g: Tensor, g2: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Write the gradients of the updates, of the output's g + g2; two parts of the input's, or None at the end."""
        kernels, layer = self.kernels, self.layer
        of_second_sum = kernels.add_norm_gradient(g, g2, self.second_norm, layer.ffn_norm)
        of_z = self.ffn_out.backward_gelu(of_second_sum, self.activated)
        if of_z is None:
            return None
        of_x = self.ffn_in.backward(of_z)
        if of_x is None:
            return None
        of_first_sum = kernels.add_norm_gradient(of_x, of_second_sum, self.first_norm, layer.attention_norm)
        of_context = self.attention_output.backward(of_first_sum)
        if of_context is None:
            return None
        return self._attention_backward(of_context, of_first_sum)

    def _attention_backward(self, of_context: Tensor, of_read: Tensor) -> tuple[Tensor, Tensor | None] | None:
        hidden = of_context.shape[1]
        if not self.is_last:
            of_parts = of_context.new_empty(len(of_context), 3 * hidden)
            self.kernels.attention_gradients(of_context, self.attended, self.rows, *of_parts.split(hidden, dim=1))
            of_x = self.query_key_value.backward(of_parts)
            return None if of_x is None else (of_x, of_read)
        of_query = torch.empty_like(of_context)
        of_parts = of_context.new_empty(self.num_tokens, 2 * hidden)
        self.kernels.attention_gradients(of_context, self.attended, self.rows, of_query, *of_parts.split(hidden, dim=1))
        of_x, of_first = self.key_value.backward(of_parts), self.query.backward(of_query)
        if of_x is None or of_first is None:
            return None
        return of_x.index_add_(0, self.rows.first, of_first.add_(of_read)), None


class _Product:
    """A frozen product with the slots' updates beside it. is_lowest: whether no gradient of its input is wanted."""

    def __init__(
        self,
        kernels: Kernels,
        affine: Affine,
        lora: Lora | None,
        segments: Segments,
        mask: Mask | None,
        training: bool,
    ) -> None:
        self.kernels, self.affine, self.lora = kernels, affine, lora
        self.segments, self.mask, self.training = segments, mask, training
        self.is_lowest = False

    def forward(self, x: Tensor) -> Tensor:
        out, h = self._started(x)
        if self.lora is not None:
            self.kernels.lora_up(out, h, self.lora, self.segments)
        return out

    def forward_gelu(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Compute GELU of the output, and what its gradient needs."""
        out, h = self._started(x)
        if self.lora is None:
            return self.kernels.gelu(out, self.training)
        return self.kernels.lora_up_gelu(out, h, self.lora, self.segments, self.training)

    def backward(self, g: Tensor) -> Tensor | None:
        of_x, of_h = self._started_back(g)
        if self.lora is not None:
            self.kernels.lora_down_gradients(of_x, of_h, self.x, self.lora, self.segments, self.mask)
        return of_x

    def backward_gelu(self, g: Tensor, activated: Saved) -> Tensor | None:
        """Compute the gradient of what the input is the GELU of."""
        if self.is_lowest:
            return self.backward(g)
        of_x, of_h = self._started_back(g)
        assert of_x is not None
        if self.lora is None:
            return self.kernels.gelu_gradient(of_x, activated)
        own = self.x, self.lora, self.segments, self.mask
        return self.kernels.lora_down_gelu_gradients(of_x, of_h, *own, activated)

    def _started(self, x: Tensor) -> tuple[Tensor, Saved]:
        out, h = self.kernels.linear(x, self.affine), None
        if self.lora is not None:
            h = self.kernels.lora_down(x, self.lora, self.segments, self.mask)
            if self.training:
                self.x, self.h = x, h
        return out, h

    def _started_back(self, g: Tensor) -> tuple[Tensor | None, Saved]:
        of_x = None if self.is_lowest else self.kernels.linear_gradient(g, self.affine)
        if self.lora is None:
            return of_x, None
        return of_x, self.kernels.lora_up_gradients(g, self.h, self.lora, self.segments)


def _some(lora: Lora | None, modules: slice) -> Lora | None:
    """Give the updates of some of the modules, or None where no slot adapts any."""
    own = lora and lora[modules]
    return None if own is None or own.is_empty else own
