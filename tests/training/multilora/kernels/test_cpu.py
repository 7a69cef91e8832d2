"""The C kernels against the operations in torch: no further from fp32 than bf16 is there, and the same masks."""

import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agnews_lora.adapters.families import Family
from agnews_lora.paths import COMPILED
from agnews_lora.training.multilora.dropout import Mask, kept_bits
from agnews_lora.training.multilora.encoder import Affine, Layer, Norm
from agnews_lora.training.multilora.kernels import KernelChoice, UnsuitableError, cpu
from agnews_lora.training.multilora.kernels.cpu import CpuKernels
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora
from agnews_lora.training.multilora.packing import Segments
from tests.training.multilora.kernels.test_reference import assert_adamw_equal, rows_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# Hidden size, heads and intermediate size: heads of 32, of 64, and widths that are no power of 2.
SHAPES = {"32": (64, 2, 96), "64": (128, 2, 256), "96": (192, 2, 320)}


def random_layer(hidden: int, heads: int, inner: int) -> Layer:
    def affine(out: int, width: int) -> Affine:
        return Affine((torch.randn(out, width) * width**-0.5).to(BF16), (torch.randn(out) / 10).to(BF16))

    def norm() -> Norm:
        return Norm((1 + torch.randn(hidden) / 10).to(BF16), (torch.randn(hidden) / 10).to(BF16), 1e-5)

    stacked = affine(3 * hidden, hidden)
    parts = (Affine(stacked.weight[own], stacked.bias[own]) for own in (slice(hidden), slice(hidden, None)))
    ffn = affine(inner, hidden), affine(hidden, inner)
    return Layer(heads, stacked, *parts, affine(hidden, hidden), norm(), *ffn, norm())


class Compared:
    """One layer's operations thrice: by the C kernels, in bf16 by torch, and in fp32 by torch on the same values."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        layer = random_layer(*shape)
        others = [part for part in fields(layer) if part.name != "num_heads"]
        wide = {part.name: _wide(getattr(layer, part.name)) for part in others}
        self.hidden, _, self.inner = shape
        self.layers = [layer, layer, replace(layer, **wide)]
        self.kernels = [CpuKernels([layer, layer], BF16), Kernels([layer]), Kernels([self.layers[2]])]

    def __iter__(self) -> Iterator[tuple[Kernels, Layer, torch.dtype]]:
        yield from zip(self.kernels, self.layers, (BF16, BF16, torch.float32), strict=True)


def _wide(part: Any) -> Any:
    return replace(part, weight=part.weight.float(), bias=part.bias.float())


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def compared(request: pytest.FixtureRequest) -> Compared:
    return compared_or_skip(request.param)


def compared_or_skip(shape: tuple[int, int, int]) -> Compared:
    try:
        return Compared(shape)
    except UnsuitableError as error:
        pytest.skip(str(error))


def assert_as_exact(own: Tensor, in_torch: Tensor, exact: Tensor, more: float = 1.1) -> None:
    """Assert that `own` is not much further from `exact` than `in_torch`. more: allowed multiple of its distance."""
    distances = [(each.float() - exact.float()).norm().item() for each in (own, in_torch)]
    assert exact.norm() > 0 and distances[0] <= more * distances[1] + 1e-6 * exact.norm().item()


def values(h: Any) -> Tensor:
    """The matrix in what an operation gives for h."""
    return h if isinstance(h, Tensor) else h.values


# Low-rank updates -----------------------------------------------------------------------------------------------------

SIZES, BOUNDS = (37, 150, 1), (3276, -1, 9000)  # segments with and without dropout, odd, and longer than a tile


def random_mask(seed: int = 0, bounds: tuple[int, ...] = BOUNDS) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    num = sum(SIZES)
    tokens = torch.randint(-(2**31), 2**31, (num,), dtype=torch.int32, generator=generator)
    of_tokens = [torch.full((size,), bound, dtype=torch.int16) for size, bound in zip(SIZES, bounds, strict=True)]
    return Mask(tokens, torch.cat(of_tokens), 65, tuple(bound >= 0 for bound in bounds))


def random_lora(num_modules: int, rank: int, width: int, out: int, dtype: torch.dtype) -> Lora:
    """Where the sum of module and segment is 1 or 4, the segment's slot does not adapt the module."""
    torch.manual_seed(1)
    sizes = num_modules, len(SIZES), rank
    adapts = tuple(tuple((m + s) % 3 != 1 for s in range(len(SIZES))) for m in range(num_modules))
    there = torch.tensor(adapts)
    a, b = ((torch.randn(*sizes, each) * there[:, :, None, None]).to(BF16).to(dtype) for each in (width, out))
    of_a, of_b = (torch.zeros(*sizes, each) for each in (width, out))
    return Lora(a, b, of_a, of_b, adapts, there.int(), tuple(range(2, 2 + num_modules)))


@pytest.mark.parametrize("rank", [8, 24])
@pytest.mark.parametrize("place", ["query, key and value", "into the intermediate", "out of it"])
@pytest.mark.parametrize("drops", [True, False])
def test_low_rank_updates(compared: Compared, rank: int, place: str, drops: bool) -> None:
    hidden, inner, num = compared.hidden, compared.inner, sum(SIZES)
    places = {"query, key and value": (3, hidden, hidden), "into the intermediate": (1, hidden, inner)}
    modules, width, out = places.get(place, (1, inner, hidden))
    x, before, g = (torch.randn(num, each).to(BF16) for each in (width, modules * out + 64, modules * out + 32))
    segments, found = Segments(SIZES), []
    for kernels, _, dtype in compared:
        lora, mask = random_lora(modules, rank, width, out, dtype), random_mask() if drops else None
        there = lora.flags.bool()[:, torch.repeat_interleave(torch.tensor(SIZES))].t()[:, :, None]
        own_x, own_out, own_g = (each.to(dtype, copy=True) for each in (x, before, g))
        target, of_out = own_out[:, 32:-32], own_g[:, 32:]
        h = kernels.lora_down(own_x, lora, segments, mask)
        kernels.lora_up(target, h, lora, segments)
        of_h = kernels.lora_up_gradients(of_out, h, lora, segments)
        of_x = own_x.clone()
        kernels.lora_down_gradients(of_x, of_h, own_x, lora, segments, mask)
        without = random_lora(modules, rank, width, out, dtype)
        kernels.lora_down_gradients(None, of_h, own_x, without, segments, mask)
        assert lora.of_a is not None and lora.of_b is not None and without.of_a is not None
        assert torch.equal(lora.of_a, without.of_a)
        assert not lora.of_a[lora.flags == 0].any() and not lora.of_b[lora.flags == 0].any()
        assert torch.equal(own_out[:, :32], before[:, :32].to(dtype))
        assert torch.equal(own_out[:, -32:], before[:, -32:].to(dtype))
        read = (each.where(there, torch.zeros_like(each)) for each in map(values, (h, of_h)))
        found.append((*read, target, lora.of_a, lora.of_b, of_x))
    for own, in_torch, exact in zip(*found, strict=True):
        assert_as_exact(own, in_torch, exact)


def test_masks_are_those_of_dropout_bit_by_bit(compared: Compared) -> None:
    """Read out by updates that pick single features, forward and backward."""
    kernels, width, num = compared.kernels[0], compared.hidden, sum(SIZES)
    ones, segments = torch.ones(num, width, dtype=BF16), Segments(SIZES)
    mask, module = random_mask(bounds=(3276, 0, 20000)), 4
    adapts = ((True,) * len(SIZES),)
    expected = kept_bits(mask.keys(module), mask.bounds, width, BF16) != 0
    assert 0.3 < expected.float().mean() < 0.99
    forward, backward = torch.empty(num, width), torch.zeros(num, width, dtype=BF16)
    for first in range(0, width, 8):
        a = torch.zeros(1, len(SIZES), 8, width, dtype=BF16)
        a[:, :, torch.arange(8), first + torch.arange(8)] = 1.0
        of_a = torch.zeros(a.shape)
        lora = Lora(a, a, of_a, None, adapts, torch.ones(1, len(SIZES), dtype=torch.int32), (module,))
        h = kernels.lora_down(ones, lora, segments, mask)
        forward[:, first : first + 8] = values(h)[:, 0].float()
        kernels.lora_down_gradients(backward, h._replace(values=torch.ones_like(values(h))), ones, lora, segments, mask)
        counts = torch.stack([part.sum(0) for part in expected.split(SIZES)]).float()
        assert torch.equal(of_a[0], counts[:, None].expand(-1, 8, -1))
    assert torch.equal(forward, expected.float())
    assert torch.equal(backward, expected.to(BF16))


@pytest.mark.parametrize("fault", ["rank", "width", "stride"])
def test_tensors_that_the_kernels_do_not_take_go_by_torch(fault: str) -> None:
    compared = compared_or_skip(SHAPES["32"])
    rank, width = (6 if fault == "rank" else 8), (40 if fault == "width" else 64)
    x = torch.randn(sum(SIZES), width).to(BF16)
    if fault == "stride":
        x = torch.stack([x, x], dim=2)[:, :, 0]
    segments, found = Segments(SIZES), []
    for kernels in compared.kernels[:2]:
        lora = random_lora(1, rank, width, 64, BF16)
        h = kernels.lora_down(x, lora, segments, None)
        of_x = x.clone()
        kernels.lora_down_gradients(of_x, h, x, lora, segments, None)
        assert lora.of_a is not None
        found.append((values(h)[:37], lora.of_a, of_x))
    for own, in_torch in zip(*found, strict=True):
        assert torch.equal(own, in_torch)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1, 31, 33, 90, 8, 2], [300], [16] * 4])
@pytest.mark.parametrize("of_rows", [False, True])
def test_attention(compared: Compared, lengths: list[int], of_rows: bool) -> None:
    """Rows of odd and even lengths, and three tokens behind them that belong to none."""
    rows, hidden, found = rows_of(lengths), compared.hidden, []
    num = rows.total + 3
    parts = (torch.randn(num, 3 * hidden) * 1.5).to(BF16)
    g = torch.randn(len(lengths) if of_rows else num, hidden).to(BF16)
    for kernels, _, dtype in compared:
        query, key, value = parts.to(dtype).split(hidden, dim=1)
        if of_rows:
            query = query[rows.first]
        context, saved = kernels.attention(query, key, value, rows, of_rows, True)
        scored, nothing = kernels.attention(query, key, value, rows, of_rows, False)
        assert torch.equal(context, scored) and nothing is None
        gradients = torch.full((num, 3 * hidden), float("nan"), dtype=dtype)
        of_query, of_key, of_value = gradients.split(hidden, dim=1)
        if of_rows:
            of_query = torch.full_like(query, float("nan"))
        kernels.attention_gradients(g.to(dtype), saved, rows, of_query, of_key, of_value)
        for each in (of_key, of_value) if of_rows else (context, of_query, of_key, of_value):
            assert not each[rows.total :].any()
        found.append((context, of_query, of_key, of_value))
    for own, in_torch, exact in zip(*found, strict=True):
        assert_as_exact(own, in_torch, exact)


# Between the products -------------------------------------------------------------------------------------------------


def test_gelu(compared: Compared) -> None:
    z = (torch.randn(50, compared.inner) * 3).to(BF16)
    z[0] = torch.linspace(-40, 40, compared.inner).to(BF16)
    g, found = torch.randn(z.shape).to(BF16), []
    for kernels, _, dtype in compared:
        scored, nothing = kernels.gelu(z.to(dtype, copy=True), False)
        u, saved = kernels.gelu(z.to(dtype, copy=True), True)
        assert torch.equal(u, scored) and nothing is None
        found.append((u, kernels.gelu_gradient(g.to(dtype, copy=True), saved)))
    assert_as_exact(*(each[0] for each in found))
    # The slope is kept in bf16 instead of z: two roundings instead of one.
    assert_as_exact(*(each[1] for each in found), more=1.7)


@pytest.mark.parametrize("parts", [1, 2])
def test_norm_of_a_sum(compared: Compared, parts: int) -> None:
    x, y, g, g2 = (torch.randn(50, compared.hidden).to(BF16) for _ in range(4))
    found = []
    for kernels, layer, dtype in compared:
        norm = layer.ffn_norm
        scored, nothing = kernels.add_norm(x.to(dtype), y.to(dtype), norm, False)
        out, saved = kernels.add_norm(x.to(dtype), y.to(dtype), norm, True)
        assert torch.equal(out, scored) and nothing is None
        found.append((out, kernels.add_norm_gradient(g.to(dtype), g2.to(dtype) if parts == 2 else None, saved, norm)))
    for own, in_torch, exact in zip(*found, strict=True):
        assert_as_exact(own, in_torch, exact)


@pytest.mark.parametrize("name", ["query_key_value", "query", "key_value", "attention_output", "ffn_in", "ffn_out"])
def test_frozen_products(compared: Compared, name: str) -> None:
    found = []
    x, g = torch.randn(48, compared.inner).to(BF16), torch.randn(48, 3 * compared.hidden + compared.inner).to(BF16)
    for kernels, layer, dtype in compared:
        affine = getattr(layer, name)
        out, width = affine.weight.shape
        found.append(
            (
                kernels.linear(x[:, :width].to(dtype), affine),
                kernels.linear_gradient(g[:, :out].to(dtype), affine),
                kernels.linear(x[:3, :width].contiguous().to(dtype), affine),
            )
        )
    for own, in_torch, exact in zip(*found, strict=True):
        assert_as_exact(own, in_torch, exact)


# Optimizer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "max_norm"), [("bert", 0.0), ("roberta", 1.0)])
def test_adamw_with_clipping(compared: Compared, family: Family, max_norm: float) -> None:
    assert_adamw_equal(*compared.kernels[:2], family, max_norm, CPU, atol=1e-5)


# Where they are used --------------------------------------------------------------------------------------------------


def test_every_layer_of_bf16_on_such_a_cpu_is_computed_by_them() -> None:
    compared_or_skip(SHAPES["32"])
    choice = KernelChoice([random_layer(*SHAPES["32"])] * 2, CPU, BF16)
    assert isinstance(choice.kernels, CpuKernels)


@pytest.fixture
def compiled() -> Path:
    """The kernels in the project's own cache."""
    compared_or_skip(SHAPES["32"])
    return cpu.build(cpu.compiler()).resolve()


@pytest.fixture
def own_cache(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of a project without compiled kernels, and a process that has loaded none."""
    monkeypatch.chdir(tmp_path)
    cpu.library.cache_clear()
    yield tmp_path / COMPILED
    cpu.library.cache_clear()


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    "lack", ["fp32", "head size", "no compiler", "broken compiler", "missing", "instructions", "folder"]
)
def test_without_what_they_need_torch_computes_and_the_reason_is_known(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    layer, dtype, reason = random_layer(*SHAPES["32"]), BF16, ""
    if lack == "fp32":
        dtype, reason = torch.float32, "bf16"
    elif lack == "head size":
        layer, reason = random_layer(96, 2, 192), "48"
    elif lack == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        reason = "no C compiler"
    elif lack == "broken compiler":
        text = "import sys\nif '--version' not in sys.argv: sys.exit('cc1: killed')"
        monkeypatch.setenv("CC", str(program(tmp_path / "broken", text)))
        reason = "cc1: killed"
    elif lack == "missing":
        monkeypatch.setenv("CC", "no-such-compiler")
        reason = "no-such-compiler"
    elif lack == "instructions":
        monkeypatch.setattr(cpu, "INSTRUCTIONS", (*cpu.INSTRUCTIONS, "avx2048"))
        reason = "avx2048"
    else:
        own_cache.parent.mkdir(parents=True)
        own_cache.touch()
        reason = str(COMPILED)
    choice = KernelChoice([layer, layer], CPU, dtype)
    assert type(choice.kernels) is Kernels and reason in choice.reason
    assert not list(own_cache.glob("*"))


def test_kernels_are_compiled_once(
    compiled: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that start at once leave one whole file, and those that follow use it."""
    text = f"""import shutil, sys
if "-o" in sys.argv:
    open("calls", "a").write(".")
    shutil.copy({str(compiled)!r}, sys.argv[sys.argv.index("-o") + 1])"""
    monkeypatch.setenv("CC", str(program(tmp_path / "quick", text)))
    with ThreadPoolExecutor(3) as pool:
        made = {each.result() for each in [pool.submit(cpu.build, cpu.compiler()) for _ in range(3)]}
    assert len(made) == 1 and list(own_cache.iterdir()) == [own_cache / made.pop().name]
    before = Path("calls").read_text()
    cpu.library()
    assert Path("calls").read_text() == before
