"""Triton kernels of the pass through the encoder, for bf16 on CUDA; `cuda.py` launches them.

Tokens lie segment by segment, and a tile holds up to `TILE` tokens of one segment. Where its slot does not adapt a
module, a tile is left at once: its h stays unwritten, and nothing reads it. Every sum over tokens is formed by one
program in the order of the tokens, without atomics: the same in every run, and beside any neighbours.

A kernel is compiled anew for every alignment of its arguments, so the sizes that change from pass to pass are exempt
(`do_not_specialize`) and ranks are counted in steps of 8, which says how their rows are aligned. Products are summed in
fp32; "ieee" keeps those of fp32 tensors out of TF32. Pointers get int64 offsets by segment and row, int32 within.
"""

import triton
import triton.language as tl

from agnews_lora.training.multilora import packing

TILE = tl.constexpr(packing.TILE)
LOG2E = tl.constexpr(1.4426950408889634)


# Dropout: the draws of `dropout.py`, in uint32, whose shifts need no masks --------------------------------------------


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropped(x, tokens, bounds, rows, live, salt, first):
    """Zero the features of x [rows, features from `first` on] that the module with this salt drops."""
    pairs = first // 2 + tl.arange(0, x.shape[1] // 2)
    keys = (tl.load(tokens + rows, live, 0) ^ salt).to(tl.uint32, bitcast=True)
    drawn = (_mixed(keys)[:, None] ^ _mixed(pairs.to(tl.uint32))[None, :]) * 0x7FEB352D
    drawn = (drawn ^ (drawn >> 15)) * 0x846CA68B
    drawn = drawn ^ (drawn >> 16)
    halves = tl.join(drawn & 0x7FFF, (drawn >> 16) & 0x7FFF).reshape(x.shape)  # each decides over one feature
    bound = tl.load(bounds + rows, live, -1).to(tl.int32)
    return tl.where(halves.to(tl.int32) > bound[:, None], x, 0.0)


# Low-rank products ----------------------------------------------------------------------------------------------------
#
# Programs that read the same tokens stand side by side, so that the second one finds them in the cache.
#
# x, out: [n, ·] with a row stride; module m reads or writes the `width` columns from m · step on. weight, of_weight:
# [M, S, r, width] with strides of module and segment. h: [n, M, r]. tiles: (3, tiles) segment, first row and end.
# flags: [M, S] whether a segment's slot adapts a module.


@triton.jit
def _matrix(x, rows, stride, row_live, columns, column_live):
    """Load x[rows, columns], 0 where either is not live."""
    return tl.load(x + rows[:, None] * stride + columns[None, :], row_live[:, None] & column_live[None, :], 0.0)


@triton.jit
def _store(x, rows, stride, row_live, columns, column_live, values):
    places = x + rows[:, None] * stride + columns[None, :]
    tl.store(places, values.to(x.dtype.element_ty), row_live[:, None] & column_live[None, :])


@triton.jit
def _gelu(x):
    """Compute x Φ(x) and its slope Φ(x) + x φ(x), of the standard normal distribution."""
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * below, below + x * 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2E))


@triton.jit
def _tile(tiles):
    """Give segment, first row and length of the program's tile."""
    tile, count = tl.program_id(1), tl.num_programs(1)
    start = tl.load(tiles + count + tile).to(tl.int64)
    return tl.load(tiles + tile), start, tl.load(tiles + 2 * count + tile) - start


@triton.jit
def _adapts(flags, segments, m, segment):
    """Tell whether a segment's slot adapts module m; -1 is no segment."""
    return tl.load(flags + m * segments + segment, segment >= 0, 0) != 0


_VARYING = ["segments", "rank8", "modules", "salt"]
_TABLES = ["tiles", "ends", "flags", "tokens", "bounds"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_TABLES)
def project(
    h, x, stride, step, width, weight, of_module, of_segment, tiles, flags, segments, rank8, modules,
    tokens, bounds, salt, DROP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write h[t, m] = drop_m(x[t]) · weight[m, segment]ᵀ; a program is (module, tile)."""
    m, rank = tl.program_id(0), rank8 * 8
    segment, start, count = _tile(tiles)
    if _adapts(flags, segments, m, segment):
        rows, ranks = tl.arange(0, TILE), tl.arange(0, RANKS)
        live = rows < count
        x += start * stride + m * step
        weight += m * of_module + segment * of_segment
        sums = tl.zeros((TILE, RANKS), dtype=tl.float32)
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            read = _matrix(x, rows, stride, live, columns, columns < width)
            if DROP:
                read = _dropped(read, tokens + start, bounds + start, rows, live, salt + m, first)
            across = _matrix(weight, ranks, width, ranks < rank, columns, columns < width)
            sums = tl.dot(read, tl.trans(across), sums, input_precision="ieee")
        places = h + (start * modules + m) * rank + rows[:, None] * (modules * rank) + ranks[None, :]
        tl.store(places, sums.to(h.dtype.element_ty), live[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_TABLES)
def expand(
    h, out, stride, step, width, weight, of_module, of_segment, tiles, flags, segments, rank8, modules,
    tokens, bounds, salt, DROP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    slope, SUM: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """Add drop_m(h[t, m] · weight[m, segment]) to out[t]: each module's to its own columns, or (SUM) all to the same.

    GELU: replace the sum by its GELU, and write the slope there, if `slope` [n, width] is given. Without GELU, the sum
    is multiplied by the slope. A program is (block of columns, tile, module).
    """
    rank = rank8 * 8
    segment, start, count = _tile(tiles)
    rows, ranks = tl.arange(0, TILE), tl.arange(0, RANKS)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, within = rows < count, columns < width
    begin, end = 0, modules
    if not SUM:
        begin = tl.program_id(2)
        end = begin + 1
    sums = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    changed = 1 if GELU or slope is not None else 0
    for m in range(begin, end):
        if _adapts(flags, segments, m, segment):
            left = _matrix(h + (start * modules + m) * rank, rows, modules * rank, live, ranks, ranks < rank)
            own = weight + m * of_module + segment * of_segment
            part = tl.dot(left, _matrix(own, ranks, width, ranks < rank, columns, within), input_precision="ieee")
            if DROP:
                part = _dropped(part, tokens + start, bounds + start, rows, live, salt + m, tl.program_id(0) * BLOCK)
            sums += part
            changed = 1
    if changed != 0:
        out += start * stride + begin * step
        sums += _matrix(out, rows, stride, live, columns, within)
        if slope is not None:
            slope += start * width
        if GELU:
            sums, own_slope = _gelu(sums)
            if slope is not None:
                _store(slope, rows, width, live, columns, within, own_slope)
        elif slope is not None:
            sums *= _matrix(slope, rows, width, live, columns, within)
        _store(out, rows, stride, live, columns, within, sums)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_TABLES)
def reduce(
    h, x, stride, step, width, of_weight, of_module, of_segment, ends, flags, segments, rank8, modules,
    tokens, bounds, salt, DROP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write of_weight[m, segment] = Σ h[t, m]ᵀ drop_m(x[t]); a program is (block of columns, module, segment).

    Args:
        ends: [1 + S], where segments end; 0 stands first.
    """
    segment, m, rank = tl.program_id(2), tl.program_id(1), rank8 * 8
    if _adapts(flags, segments, m, segment):
        start = tl.load(ends + segment).to(tl.int64)
        count = (tl.load(ends + segment + 1) - start).to(tl.int32)
        ranks, columns = tl.arange(0, RANKS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        within = columns < width
        x += start * stride + m * step
        h += (start * modules + m) * rank
        sums = tl.zeros((RANKS, BLOCK), dtype=tl.float32)
        for first in range(0, count, TILE):
            rows = first + tl.arange(0, TILE)
            live = rows < count
            left = _matrix(h, rows, modules * rank, live, ranks, ranks < rank)
            read = _matrix(x, rows, stride, live, columns, within)
            if DROP:
                read = _dropped(read, tokens + start, bounds + start, rows, live, salt + m, tl.program_id(0) * BLOCK)
            sums = tl.dot(tl.trans(left), read, sums, input_precision="ieee")
        places = of_weight + m * of_module + segment * of_segment + ranks[:, None] * width + columns[None, :]
        tl.store(places, sums.to(of_weight.dtype.element_ty), (ranks < rank)[:, None] & within[None, :])


# Attention (Dao 2023, FlashAttention-2, https://arxiv.org/abs/2307.08691): scores by blocks, never in memory ----------
#
# A program is a row and head, and goes through the row in blocks: rows of one block, the most, are read once. OF_ROWS:
# the only query of a row is q[row]. totals: [n, heads], log2 of the softmax's denominator. The last row of programs
# stands for the tokens that belong to no row.


@triton.jit
def _row(offsets, rows, tokens, heads):
    """Give head, row, its first token and its length."""
    row = tl.program_id(0) // heads
    start = tl.load(offsets + row)
    end = tl.load(offsets + row + 1, row < rows, tokens)
    return tl.program_id(0) % heads, row.to(tl.int64), start.to(tl.int64), end - start


@triton.jit(do_not_specialize=["rows", "tokens"], do_not_specialize_on_alignment=["offsets"])
def attend(
    context, totals, q, q_stride, k, v, stride, offsets, rows, tokens, heads, size, scale,
    OF_ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Write the context softmax(scale · q kᵀ) v of a row's queries, and their totals."""
    head, row, start, length = _row(offsets, rows, tokens, heads)
    own, queries = (row, 1) if OF_ROWS else (start, length)
    features = tl.arange(0, SIZE)
    within = features < size
    width = heads * size
    q += own * q_stride + head * size
    k += start * stride + head * size
    v += start * stride + head * size
    context += own * width + head * size
    totals += own * heads + head
    for first_query in range(0, queries, QUERIES):
        places = first_query + tl.arange(0, QUERIES)
        asking = places < queries
        sums = tl.zeros((QUERIES, SIZE), dtype=tl.float32)
        if row < rows:
            asked = _matrix(q, places, q_stride, asking, features, within)
            largest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((QUERIES,), dtype=tl.float32)
            for first in range(0, length, KEYS):
                others = first + tl.arange(0, KEYS)
                key = _matrix(k, others, stride, others < length, features, within)
                value = _matrix(v, others, stride, others < length, features, within)
                scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
                scores = tl.where((others < length)[None, :], scores, float("-inf"))
                larger = tl.maximum(largest, tl.max(scores, axis=1))
                shares = tl.exp2(scores - larger[:, None])
                shrunk = tl.exp2(largest - larger)
                total = total * shrunk + tl.sum(shares, axis=1)
                sums = tl.dot(shares.to(value.dtype), value, sums * shrunk[:, None], input_precision="ieee")
                largest = larger
            sums = sums / total[:, None]
            tl.store(totals + places * heads, largest + tl.log2(total), asking)
        _store(context, places, width, asking, features, within, sums)


@triton.jit(do_not_specialize=["rows", "tokens"], do_not_specialize_on_alignment=["offsets"])
def attend_gradients(
    g, context, totals, q, of_q, q_stride, of_q_stride, k, v, of_k, of_v, stride, of_stride, parts,
    offsets, rows, tokens, heads, size, scale,
    OF_ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Write the gradients of a row's queries, keys and values; the shares are computed anew from the totals.

    Args:
        parts: fp32 in the shape of the context, for the gradients of queries between two blocks of keys; None where no
            row has two.
    """
    head, row, start, length = _row(offsets, rows, tokens, heads)
    own, queries = (row, 1) if OF_ROWS else (start, length)
    features = tl.arange(0, SIZE)
    within = features < size
    width = heads * size
    q += own * q_stride + head * size
    of_q += own * of_q_stride + head * size
    k += start * stride + head * size
    v += start * stride + head * size
    of_k += start * of_stride + head * size
    of_v += start * of_stride + head * size
    g += own * width + head * size
    context += own * width + head * size
    totals += own * heads + head
    if parts is not None:
        parts += own * width + head * size
    for first in range(0, length, KEYS):
        others = first + tl.arange(0, KEYS)
        live = others < length
        of_key = tl.zeros((KEYS, SIZE), dtype=tl.float32)
        of_value = tl.zeros((KEYS, SIZE), dtype=tl.float32)
        if row < rows:
            key = _matrix(k, others, stride, live, features, within)
            value = _matrix(v, others, stride, live, features, within)
            for first_query in range(0, queries, QUERIES):
                places = first_query + tl.arange(0, QUERIES)
                asking = places < queries
                asked = _matrix(q, places, q_stride, asking, features, within)
                of_context = _matrix(g, places, width, asking, features, within)
                there = _matrix(context, places, width, asking, features, within)
                mean = tl.sum(of_context.to(tl.float32) * there.to(tl.float32), axis=1)
                total = tl.load(totals + places * heads, asking, 0.0)
                scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * (scale * LOG2E)
                shares = tl.where(asking[:, None] & live[None, :], tl.exp2(scores - total[:, None]), 0.0)
                of_value = tl.dot(tl.trans(shares.to(of_context.dtype)), of_context, of_value, input_precision="ieee")
                of_scores = shares * (tl.dot(of_context, tl.trans(value), input_precision="ieee") - mean[:, None])
                of_scores = of_scores.to(key.dtype)
                of_key = tl.dot(tl.trans(of_scores), asked, of_key, input_precision="ieee")
                of_asked = tl.dot(of_scores, key, input_precision="ieee") * scale
                if parts is not None:
                    if first > 0:
                        of_asked += _matrix(parts, places, width, asking, features, within)
                    if first + KEYS < length:
                        _store(parts, places, width, asking, features, within, of_asked)
                _store(of_q, places, of_q_stride, asking, features, within, of_asked)
            if parts is not None:
                tl.debug_barrier()  # other threads may read the parts that one has written
        elif not OF_ROWS:
            _store(of_q, others, of_q_stride, live, features, within, of_key)
        _store(of_k, others, of_stride, live, features, within, of_key * scale)
        _store(of_v, others, of_stride, live, features, within, of_value)


# Between the products -------------------------------------------------------------------------------------------------


@triton.jit
def _vector(x, columns, live):
    return tl.load(x + columns, live, 0.0).to(tl.float32)


@triton.jit
def add_norm(
    out, normal, deviations, x, x_stride, y, y_stride, scale, shift, width, epsilon,
    SAVE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write LayerNorm(x + y) of a row a program; SAVE: the normal values, too, and 1 / standard deviation."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    live = columns < width
    total = _vector(x + row * x_stride, columns, live) + _vector(y + row * y_stride, columns, live)
    centred = tl.where(live, total - tl.sum(total, axis=0) / width, 0.0)
    deviation = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    normed = centred * deviation
    if SAVE:
        tl.store(normal + row * width + columns, normed.to(normal.dtype.element_ty), live)
        tl.store(deviations + row, deviation)
    scaled = normed * _vector(scale, columns, live) + _vector(shift, columns, live)
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), live)


@triton.jit
def add_norm_gradient(
    of_sum, g, g_stride, g2, g2_stride, normal, deviations, scale, width, TWO: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Write the gradient of the sum that `add_norm` normalised, of the gradient g (TWO: g + g2) of its output."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    live = columns < width
    of_out = _vector(g + row * g_stride, columns, live)
    if TWO:
        of_out += _vector(g2 + row * g2_stride, columns, live)
    of_normal = of_out * _vector(scale, columns, live)
    normed = _vector(normal + row * width, columns, live)
    mean, slope = tl.sum(of_normal, axis=0) / width, tl.sum(of_normal * normed, axis=0) / width
    of_centred = (of_normal - mean - normed * slope) * tl.load(deviations + row)
    tl.store(of_sum + row * width + columns, of_centred.to(of_sum.dtype.element_ty), live)


@triton.jit(do_not_specialize=["count8"])
def gelu(z, slope, count8, BLOCK: tl.constexpr):
    """Write GELU in place, and its slope, if one is given."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = places < count8 * 8
    out, own_slope = _gelu(tl.load(z + places, live, 0.0).to(tl.float32))
    if slope is not None:
        tl.store(slope + places, own_slope.to(slope.dtype.element_ty), live)
    tl.store(z + places, out.to(z.dtype.element_ty), live)


# AdamW over [K, columns]: gradients are read twice, weights and moments read and written once -------------------------
#
# frozen: [K] whether a slot's columns [freezable, freezable_end) get no change. A program is (chunk of columns, slot).


@triton.jit
def _gradients(gradients, slot, places, columns, frozen, freezable, freezable_end):
    """Load a slot's gradients, 0 where it is frozen; also where that is, and where its columns lie in memory."""
    kept = (tl.load(frozen + slot) != 0) & (places >= freezable) & (places < freezable_end)
    there = slot.to(tl.int64) * columns + places
    return tl.load(gradients + there, (places < columns) & ~kept, 0.0), kept, there


@triton.jit(do_not_specialize=["freezable", "freezable_end"])
def square_sums(sums, gradients, columns, frozen, freezable, freezable_end, BLOCK: tl.constexpr):
    """Write the sum of squares of each chunk of a slot's gradients, sums [K, chunks]."""
    chunk, slot = tl.program_id(0), tl.program_id(1)
    places = chunk * BLOCK + tl.arange(0, BLOCK)
    own, _, _ = _gradients(gradients, slot, places, columns, frozen, freezable, freezable_end)
    tl.store(sums + slot * tl.num_programs(0) + chunk, tl.sum(own * own, axis=0))


@triton.jit(do_not_specialize=["freezable", "freezable_end"], do_not_specialize_on_alignment=["rates", "frozen"])
def adamw(
    weights, first_moment, second_moment, gradients, columns, sums, norms, max_norm,
    rates, first_corrections, second_corrections, decays, weight_decay, frozen, freezable, freezable_end,
    FIRST_BETA: tl.constexpr, SECOND_BETA: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the norm of each slot's gradients, clip them by it, and update weights and moments in place.

    Betas are constants, so that 1 - beta is computed in fp64: in fp32 it loses four digits.
    """
    chunk, chunks, slot = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, chunks, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        squares += tl.load(sums + slot * chunks + other, other < chunks, 0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    if chunk == 0:
        tl.store(norms + slot, norm)
    places = chunk * BLOCK + tl.arange(0, BLOCK)
    live = places < columns
    gradient, kept, there = _gradients(gradients, slot, places, columns, frozen, freezable, freezable_end)
    if max_norm > 0:
        gradient *= tl.minimum(max_norm / (norm + 1e-6), 1.0)
    weight = tl.load(weights + there, live, 0.0)
    first = tl.load(first_moment + there, live, 0.0)
    second = tl.load(second_moment + there, live, 0.0)
    first += (1 - FIRST_BETA) * (gradient - first)
    second = second * SECOND_BETA + (1 - SECOND_BETA) * gradient * gradient
    denominator = tl.sqrt(second / tl.load(second_corrections + slot)) + EPSILON
    update = first / tl.load(first_corrections + slot) / denominator
    update += weight_decay * weight * tl.load(decays + places, live, 0.0)
    tl.store(weights + there, weight - tl.where(kept, 0.0, update * tl.load(rates + slot)), live)
    tl.store(first_moment + there, first, live)
    tl.store(second_moment + there, second, live)
