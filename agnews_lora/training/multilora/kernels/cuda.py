"""The operations of the pass as Triton kernels, for bf16 on CUDA."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agnews_lora.training.multilora.dropout import Mask
from agnews_lora.training.multilora.encoder import Layer, Norm
from agnews_lora.training.multilora.kernels import UnsuitableError, triton_kernels
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora, Saved
from agnews_lora.training.multilora.optimizer import BETAS, EPSILON, SlotSteps
from agnews_lora.training.multilora.packing import Rows, Segments
from agnews_lora.training.multilora.slots import Slots

COLUMNS = 64  # features that a program of a low-rank product reads or writes at once
TOKENS = 64  # the most queries and keys that a program of the attention takes at once: most rows, whole
ELEMENTS = 1024  # of one program without products
SMALLEST = 16  # side of a matrix that tensor cores multiply
LARGEST_HEAD = 128  # features of a head: larger blocks of keys and values do not fit the registers


class CudaKernels(Kernels):
    """The operations in Triton; the frozen products stay cuBLAS's.

    Raises:
        UnsuitableError: another precision than bf16, or sizes that the kernels do not take.
    """

    name = "triton"
    replays = True

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        super().__init__(layers)
        inner, hidden = layers[0].ffn_in.weight.shape
        if dtype != torch.bfloat16:
            raise UnsuitableError(f"the Triton kernels are made for bf16, and this pass is in {dtype}")
        if hidden % 8 or inner % 8 or hidden // self.num_heads > LARGEST_HEAD:
            raise UnsuitableError(
                f"the Triton kernels take widths in steps of 8 and heads to {LARGEST_HEAD}, and this model has widths "
                f"of {hidden} and {inner} and {self.num_heads} heads"
            )

    # Low-rank updates ------------------------------------------------------------------------------------------------

    def lora_down(self, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None) -> Tensor:
        h = x.new_empty(len(x), *lora.a.shape[::2])
        _project(h, x, 0, lora.a, lora, segments, mask)
        return h

    def lora_up(self, out: Tensor, h: Tensor, lora: Lora, segments: Segments) -> None:
        _expand(h, out, lora.b.shape[3], lora.b, lora, segments, None)

    def lora_up_gelu(
        self, z: Tensor, h: Tensor, lora: Lora, segments: Segments, training: bool
    ) -> tuple[Tensor, Saved]:
        slope = torch.empty_like(z) if training else None
        _expand(h, z, lora.b.shape[3], lora.b, lora, segments, None, slope, gelu=True)
        return z, slope

    def lora_up_gradients(self, g: Tensor, h: Tensor, lora: Lora, segments: Segments) -> Tensor:
        of_h, width = torch.empty_like(h), lora.b.shape[3]
        _project(of_h, g, width, lora.b, lora, segments, None)
        _reduce(h, g, width, lora.of_b, lora, segments, None)
        return of_h

    def lora_down_gradients(
        self, of_x: Tensor | None, of_h: Tensor, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None
    ) -> None:
        _reduce(of_h, x, 0, lora.of_a, lora, segments, mask)
        if of_x is not None:
            _expand(of_h, of_x, 0, lora.a, lora, segments, mask)

    def lora_down_gelu_gradients(
        self, of_x: Tensor, of_h: Tensor, x: Tensor, lora: Lora, segments: Segments, mask: Mask | None, activated: Saved
    ) -> Tensor:
        _reduce(of_h, x, 0, lora.of_a, lora, segments, mask)
        _expand(of_h, of_x, 0, lora.a, lora, segments, mask, activated)
        return of_x

    # Attention -------------------------------------------------------------------------------------------------------

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, of_rows: bool, training: bool
    ) -> tuple[Tensor, Saved]:
        context = q.new_empty(q.shape)
        totals = q.new_empty(len(q), self.num_heads, dtype=torch.float32)
        sizes = self._sizes(q, rows, of_rows)
        programs = len(rows.lengths) if of_rows else len(rows.lengths) + 1  # one for the tokens that belong to no row
        triton_kernels.attend[programs * self.num_heads,](
            context, totals, q, q.stride(0), k, v, k.stride(0), *self._rows(q, k, rows), OF_ROWS=of_rows, **sizes
        )
        return context, (q, k, v, context, totals, of_rows) if training else None

    def attention_gradients(
        self, g: Tensor, saved: Saved, rows: Rows, of_q: Tensor, of_k: Tensor, of_v: Tensor
    ) -> None:
        q, k, v, context, totals, of_rows = saved
        sizes = self._sizes(q, rows, of_rows)
        programs = (len(rows.lengths) + 1) * self.num_heads
        parts = q.new_empty(q.shape, dtype=torch.float32) if rows.longest > sizes["KEYS"] else None
        triton_kernels.attend_gradients[programs,](
            g, context, totals, q, of_q, q.stride(0), of_q.stride(0), k, v, of_k, of_v, k.stride(0), of_k.stride(0),
            parts, *self._rows(q, k, rows), OF_ROWS=of_rows, **sizes
        )  # fmt: skip

    def _rows(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Any, ...]:
        size = q.shape[1] // self.num_heads
        return rows.offsets, len(rows.lengths), len(k), self.num_heads, size, size**-0.5

    def _sizes(self, q: Tensor, rows: Rows, of_rows: bool) -> dict[str, int]:
        keys = min(TOKENS, _padded(rows.longest))
        return {
            "QUERIES": SMALLEST if of_rows else keys,
            "KEYS": keys,
            "SIZE": _padded(q.shape[1] // self.num_heads),
            "num_stages": 1,  # rows are of a block or two: there is no next one to be loaded ahead
        }

    # Between the products --------------------------------------------------------------------------------------------

    def add_norm(self, x: Tensor, y: Tensor, norm: Norm, training: bool) -> tuple[Tensor, Saved]:
        out = x.new_empty(x.shape)
        normal = x.new_empty(x.shape) if training else None
        deviations = x.new_empty(len(x), dtype=torch.float32) if training else None
        width = x.shape[1]
        triton_kernels.add_norm[len(x),](
            out, normal, deviations, x, x.stride(0), y, y.stride(0), norm.weight, norm.bias, width, norm.epsilon,
            SAVE=training, WIDTH=_padded(width)
        )  # fmt: skip
        return out, (normal, deviations) if training else None

    def add_norm_gradient(self, g: Tensor, g2: Tensor | None, saved: Saved, norm: Norm) -> Tensor:
        normal, deviations = saved
        of_sum = torch.empty_like(normal)
        second = g if g2 is None else g2
        triton_kernels.add_norm_gradient[len(g),](
            of_sum, g, g.stride(0), second, second.stride(0), normal, deviations, norm.weight, g.shape[1],
            TWO=g2 is not None, WIDTH=_padded(g.shape[1])
        )  # fmt: skip
        return of_sum

    def gelu(self, z: Tensor, training: bool) -> tuple[Tensor, Saved]:
        slope = torch.empty_like(z) if training else None
        count = z.numel()
        triton_kernels.gelu[-(-count // ELEMENTS),](z, slope, count // 8, BLOCK=ELEMENTS)
        return z, slope

    def gelu_gradient(self, g: Tensor, saved: Saved) -> Tensor:
        return g.mul_(saved)

    # Optimizer -------------------------------------------------------------------------------------------------------

    def adamw(self, slots: Slots, gradients: Tensor, steps: SlotSteps, weight_decay: float, max_norm: float) -> Tensor:
        num_slots, columns = gradients.shape
        chunks = -(-columns // ELEMENTS)
        sums, norms = gradients.new_empty(num_slots, chunks), gradients.new_empty(num_slots)
        frozen = slots.frozen, slots.freezable.start, slots.freezable.stop
        triton_kernels.square_sums[chunks, num_slots](sums, gradients, columns, *frozen, BLOCK=ELEMENTS)
        triton_kernels.adamw[chunks, num_slots](
            slots.weights, slots.first_moment, slots.second_moment, gradients, columns, sums, norms, float(max_norm),
            steps.learning_rates, steps.first_corrections, steps.second_corrections, slots.decays, weight_decay,
            *frozen, FIRST_BETA=BETAS[0], SECOND_BETA=BETAS[1], EPSILON=EPSILON, BLOCK=ELEMENTS
        )  # fmt: skip
        return norms


def _project(
    h: Tensor, x: Tensor, step: int, weight: Tensor, lora: Lora, segments: Segments, mask: Mask | None
) -> None:
    assert segments.tiles is not None
    grid = len(lora.modules), segments.tiles.shape[1]
    triton_kernels.project[grid](*_low_rank(h, x, step, weight, segments.tiles, lora, mask), num_stages=4)


def _expand(
    h: Tensor,
    out: Tensor,
    step: int,
    weight: Tensor,
    lora: Lora,
    segments: Segments,
    mask: Mask | None,
    slope: Tensor | None = None,
    gelu: bool = False,
) -> None:
    """Add to each module's own columns, or, where the step between them is 0, all to the same."""
    assert segments.tiles is not None
    grid = -(-weight.shape[3] // COLUMNS), segments.tiles.shape[1], len(lora.modules) if step else 1
    own = _low_rank(h, out, step, weight, segments.tiles, lora, mask)
    triton_kernels.expand[grid](*own, slope, SUM=step == 0, GELU=gelu)


def _reduce(
    h: Tensor, x: Tensor, step: int, of_weight: Tensor | None, lora: Lora, segments: Segments, mask: Mask | None
) -> None:
    assert segments.ends is not None and of_weight is not None
    grid = -(-of_weight.shape[3] // COLUMNS), len(lora.modules), len(segments.sizes)
    triton_kernels.reduce[grid](*_low_rank(h, x, step, of_weight, segments.ends, lora, mask))


def _low_rank(
    h: Tensor, x: Tensor, step: int, weight: Tensor, table: Tensor, lora: Lora, mask: Mask | None
) -> tuple[Any, ...]:
    """List the arguments that the kernels of the low-rank products share."""
    modules, segments, rank, width = weight.shape
    drops = mask is not None and any(mask.drops)
    drawn = (mask.tokens, mask.bounds, mask.salt + lora.modules[0]) if mask and drops else (None, None, 0)
    strides = weight.stride(0), weight.stride(1)
    sizes = segments, rank // 8, modules
    return (
        h,
        x,
        x.stride(0),
        step,
        width,
        weight,
        *strides,
        table,
        lora.flags,
        *sizes,
        *drawn,
        drops,
        _padded(rank),
        COLUMNS,
    )


def _padded(size: int) -> int:
    """Round up to a power of two that tensor cores take."""
    return max(SMALLEST, 1 << (size - 1).bit_length())
