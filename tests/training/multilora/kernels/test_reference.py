"""Each operation in plain torch against the formula, and its gradient against autograd's of the formula."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agnews_lora.adapters.adapter_files import tensor_shapes
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.training.multilora.dropout import Mask
from agnews_lora.training.multilora.encoder import Affine, Layer, Norm
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora
from agnews_lora.training.multilora.optimizer import SlotSteps
from agnews_lora.training.multilora.packing import Rows, Segments
from agnews_lora.training.multilora.slots import Slots, SlotState
from tests.tiny import tiny_shape

HEADS, HIDDEN, RANK = 2, 16, 8


def normal(*shape: int) -> Tensor:
    """Random numbers in fp64, whose products are exact to what is compared."""
    return torch.randn(*shape, dtype=torch.float64)


def kernels_of(num_heads: int = HEADS) -> Kernels:
    weight = torch.zeros(1, 1)
    affine, norm = Affine(weight, weight), Norm(weight, weight, 1e-5)
    return Kernels([Layer(num_heads, affine, affine, affine, affine, norm, affine, affine, norm)])


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


def test_the_product_and_its_gradient() -> None:
    affine, x, g = Affine(normal(24, HIDDEN), normal(24)), normal(5, HIDDEN).requires_grad_(), normal(5, 24)
    out = F.linear(x, affine.weight, affine.bias)
    same(kernels_of().linear(x.detach(), affine), out)
    same(kernels_of().linear_gradient(g, affine), torch.autograd.grad(out, x, g)[0])


def test_gelu_and_its_gradient() -> None:
    z, g = normal(5, HIDDEN).requires_grad_(), normal(5, HIDDEN)
    out = z * (1 + torch.erf(z / 2**0.5)) / 2
    found, saved = kernels_of().gelu(z.detach().clone(), training=True)
    same(found, out)
    same(kernels_of().gelu_gradient(g.clone(), saved), torch.autograd.grad(out, z, g)[0])
    assert kernels_of().gelu(z.detach(), training=False)[1] is None


@pytest.mark.parametrize("parts", [1, 2])
def test_the_normalised_sum_and_its_gradient(parts: int) -> None:
    norm = Norm(normal(HIDDEN), normal(HIDDEN), 1e-5)
    x, y, gs = normal(5, HIDDEN).requires_grad_(), normal(5, HIDDEN), [normal(5, HIDDEN) for _ in range(parts)]
    total = x + y
    centred = total - total.mean(1, keepdim=True)
    out = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    found, saved = kernels_of().add_norm(x.detach(), y, norm, training=True)
    same(found, out)
    of_sum = kernels_of().add_norm_gradient(gs[0], gs[1] if parts == 2 else None, saved, norm)
    same(of_sum, torch.autograd.grad(out, x, sum(gs))[0])  # type: ignore[arg-type]
    assert kernels_of().add_norm(x.detach(), y, norm, training=False)[1] is None


# Attention ------------------------------------------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> Rows:
    sizes = torch.tensor(lengths, dtype=torch.int32)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=torch.int32)])
    return Rows(offsets, sizes, offsets[:-1].long(), max(lengths), sum(lengths))


def attended(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], of_rows: bool) -> Tensor:
    """Softmax attention, row by row; 0 where a token is of no row."""
    out, start = [], 0
    for number, length in enumerate(lengths):
        own = slice(number, number + 1) if of_rows else slice(start, start + length)
        queries, keys, values = (
            x.view(len(x), HEADS, -1).transpose(0, 1) for x in (q[own], k[start : start + length], v[start:][:length])
        )
        shares = (queries @ keys.transpose(1, 2) / queries.shape[2] ** 0.5).softmax(-1)
        out.append((shares @ values).transpose(0, 1).flatten(1))
        start += length
    context = torch.cat(out)
    return torch.cat([context, context.new_zeros(len(q) - len(context), context.shape[1])])


@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    rest=st.integers(0, 3),
    of_rows=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_attention_and_its_gradients(lengths: list[int], rest: int, of_rows: bool, seed: int) -> None:
    torch.manual_seed(seed)
    num_tokens, rows, kernels = sum(lengths) + rest, rows_of(lengths), kernels_of()
    wide = torch.randn(num_tokens, 3 * HIDDEN)
    q, k, v = wide.split(HIDDEN, dim=1)  # views with a larger row stride
    q = q[: len(lengths)] if of_rows else q
    leaves = [part.double().requires_grad_() for part in (q, k, v)]
    expected = attended(*leaves, lengths, of_rows)
    context, saved = kernels.attention(q, k, v, rows, of_rows, training=True)
    same(context, expected)
    g = torch.randn(context.shape)
    of_wide = torch.full((num_tokens, 3 * HIDDEN), float("nan"))
    found = list(of_wide.split(HIDDEN, dim=1))
    found[0] = found[0][: len(q)]
    kernels.attention_gradients(g, saved, rows, *found)
    for own, wanted in zip(found, torch.autograd.grad(expected, leaves, g.double()), strict=True):
        same(own, wanted)
    assert kernels.attention(q, k, v, rows, of_rows, training=False)[1] is None


# Low-rank updates -----------------------------------------------------------------------------------------------------


def lora_of(sizes: list[int], num_modules: int, out_features: int, adapts: list[list[bool]]) -> Lora:
    shape = (num_modules, len(sizes), RANK)
    a, b = torch.randn(*shape, HIDDEN), torch.randn(*shape, out_features)
    flags = torch.tensor(adapts)
    for each in (a, b):
        each[~flags] = 0.0
    return Lora(
        a,
        b,
        torch.zeros_like(a),
        torch.zeros_like(b),
        tuple(map(tuple, adapts)),
        flags.int(),
        tuple(range(num_modules)),
    )


@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), num_modules=st.integers(1, 3))
@settings(max_examples=40)
def test_updates_and_their_gradients(data: st.DataObject, sizes: list[int], num_modules: int) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    booleans = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))
    adapts = data.draw(st.lists(booleans, min_size=num_modules, max_size=num_modules))
    drops, needs_input = data.draw(booleans), data.draw(st.booleans())
    num_tokens, out_features, segments = sum(sizes), 12, Segments(tuple(sizes))
    bounds = torch.tensor([2**13 if each else -1 for each in drops], dtype=torch.int16)
    bounds = bounds.repeat_interleave(torch.tensor(sizes))
    mask = Mask(torch.arange(num_tokens, dtype=torch.int32) * 7_919, bounds, 65, tuple(drops))
    lora, kernels = lora_of(sizes, num_modules, out_features, adapts), kernels_of()
    assert lora.of_a is not None and lora.of_b is not None

    x = torch.randn(num_tokens, HIDDEN)
    out = torch.randn(num_tokens, num_modules * out_features)
    leaves = [part.double().requires_grad_() for part in (x, lora.a, lora.b)]
    expected = []
    for m in range(num_modules):
        kept = mask.apply(torch.ones_like(x), slice(0, num_tokens), m).double()
        for s, part in enumerate(segments.parts):
            expected.append((leaves[0][part] * kept[part]) @ leaves[1][m, s].t() @ leaves[2][m, s])
    by_module = [torch.cat(expected[m * len(sizes) : (m + 1) * len(sizes)]) for m in range(num_modules)]
    wanted = out.double() + torch.cat(by_module, dim=1)

    used = mask if any(drops) else None
    h = kernels.lora_down(x, lora, segments, used)
    kernels.lora_up(out, h, lora, segments)
    same(out, wanted)
    g = torch.randn(out.shape)
    of_x, of_a, of_b = torch.autograd.grad(wanted, leaves, g.double())
    before = torch.randn(x.shape)
    found = before.clone() if needs_input else None
    of_h = kernels.lora_up_gradients(g, h, lora, segments)
    kernels.lora_down_gradients(found, of_h, x, lora, segments, used)
    if found is not None:
        same(found, before.double() + of_x)
    absent = ~lora.flags.bool()
    for own, gradient in ((lora.of_a, of_a), (lora.of_b, of_b)):
        gradient[absent] = 0.0  # a slot that does not adapt a module gets none, whatever its zeros would
        same(own, gradient)
        assert not own[absent].any()


def test_some_of_the_modules_write_into_the_same_gradients() -> None:
    lora = lora_of([3, 4], 3, 12, [[True, False], [False, False], [True, True]])
    assert [lora[slice(m, m + 1)].is_empty for m in range(3)] == [False, True, False]
    own = lora[slice(1, 3)]
    assert own.modules == (1, 2) and own.adapts == lora.adapts[1:]
    x, segments = torch.randn(7, HIDDEN), Segments((3, 4))
    h = kernels_of().lora_down(x, own, segments, None)
    kernels_of().lora_up_gradients(torch.randn(7, 24), h, own, segments)
    assert lora.of_b is not None and lora.of_b[2].all() and not lora.of_b[:2].any()


def assert_adamw_equal(
    own: Kernels, in_torch: Kernels, family: Family, max_norm: float, device: torch.device, atol: float
) -> None:
    """Update a slot whose head is frozen in part, one without a step, an empty one, and one that is not clipped."""
    shape = tiny_shape(family)
    specs = [TrialSpec("qv", 3, 6, 0.0, 1e-3, "out_proj"), TrialSpec("all-linear", 9, 6, 0.0, 1e-3), None]
    slots = [Slots(4, shape, device) for _ in range(2)]
    for slot, spec in enumerate([*specs, specs[0]]):
        if spec is not None:
            shapes = tensor_shapes(spec, shape)
            state = SlotState(*({name: torch.rand(size) for name, size in shapes.items()} for _ in range(3)))
            for each in slots:
                each.place(slot, spec, state)
    gradients = torch.randn(slots[0].weights.shape) * torch.tensor([1.0, 1.0, 0.0, 1e-5])[:, None]
    gradients = gradients.to(device)
    steps = SlotSteps.of([0.1, 0.0, 0.0, 0.2], [1, 5, 1, 1000], device)
    norms = [
        kernels.adamw(each, gradients.clone(), steps, 0.3, max_norm)
        for kernels, each in zip((own, in_torch), slots, strict=True)
    ]
    torch.testing.assert_close(*norms)
    for name in ("weights", "first_moment", "second_moment"):
        torch.testing.assert_close(*(getattr(each, name) for each in slots), rtol=1e-5, atol=atol)
