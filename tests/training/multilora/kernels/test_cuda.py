"""The Triton kernels against the plain torch code: on a CUDA device, or interpreted in a process of their own."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.training.multilora.dropout import DropoutKey, Mask
from agnews_lora.training.multilora.encoder import Affine, Encoder, Layer, Norm
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora
from agnews_lora.training.multilora.layer import LayerPass, LayerUpdates
from agnews_lora.training.multilora.model import MultiLoraModel
from agnews_lora.training.multilora.optimizer import SlotSteps
from agnews_lora.training.multilora.packing import DeviceTokens, PackedBatch, Rows, Segments, tables_of
from agnews_lora.training.multilora.slots import Slots
from tests.training.conftest import TinySetup
from tests.training.multilora.kernels.test_reference import assert_adamw_equal
from tests.training.multilora.test_model import state_of, trained_model

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEADS, HEAD_SIZE = 2, 24
HIDDEN = HEADS * HEAD_SIZE


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32), id="interpreted"),
        pytest.param(("cuda", torch.bfloat16), id="cuda", marks=pytest.mark.gpu),
    ]
)
def case(request: pytest.FixtureRequest) -> "Case":
    device, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("Triton interprets kernels only if TRITON_INTERPRET=1 is set first: test_interpreted does that")
    torch.manual_seed(0)
    return Case(torch.device(device), dtype)


class Case:
    """Both kinds of kernels, and random tensors of the precision that they share."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        from agnews_lora.training.multilora.kernels.cuda import CudaKernels

        self.device, self.dtype = device, dtype
        affine = Affine(self.random(HIDDEN, HIDDEN), self.random(HIDDEN))
        norm = Norm(self.random(HIDDEN), self.random(HIDDEN), 1e-5)
        layer = Layer(HEADS, affine, affine, affine, affine, norm, affine, affine, norm)
        self.norm, self.torch, self.triton = norm, Kernels([layer]), CudaKernels([layer], torch.bfloat16)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)

    def columns(self, rows: int, width: int) -> Tensor:
        """Random columns of a wider matrix."""
        return self.random(rows, width + 16)[:, 8 : 8 + width]

    def segments(self, *sizes: int) -> Segments:
        return Segments(sizes, *(torch.from_numpy(table).to(self.device) for table in tables_of(sizes)))

    def ints(self, *values: int) -> Tensor:
        return torch.tensor([int(value) for value in values], dtype=torch.int32, device=self.device)

    def mask(self, segments: Segments, *drops: bool) -> Mask:
        tokens = torch.randint(-(2**31), 2**31, (sum(segments.sizes),)).int()
        bounds = [torch.full((size,), 9_000 if own else -1) for own, size in zip(drops, segments.sizes, strict=True)]
        return Mask(tokens.to(self.device), torch.cat(bounds).short().to(self.device), 129, drops)

    def lora(self, adapts: tuple[tuple[bool, ...], ...], rank: int, inputs: int, outputs: int) -> Lora:
        flags = torch.tensor(adapts, device=self.device).int()
        shape = (*flags.shape, rank)
        a, b = (self.random(*shape, width) * flags[..., None, None].to(self.dtype) for width in (inputs, outputs))
        of_a, of_b = (torch.zeros(each.shape, device=self.device) for each in (a, b))
        return Lora(a, b, of_a, of_b, adapts, flags, tuple(range(1, 1 + len(adapts))))

    def assert_equal(self, found: Tensor, wanted: Tensor, in_bf16: float = 2e-2) -> None:
        tolerance = 1e-5 if self.dtype == torch.float32 else in_bf16
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


ADAPTS = ((True, False, True), (True, True, False), (False, False, True))
ONE = ((True, False, True),)


@pytest.mark.parametrize(
    ("adapts", "rank", "drops"), [(ADAPTS, 8, (True, False, True)), (ONE, 24, None), (ONE, 16, (False, False, True))]
)
def test_low_rank_updates_and_their_gradients(
    case: Case, adapts: tuple[tuple[bool, ...], ...], rank: int, drops: tuple[bool, ...] | None
) -> None:
    segments, inputs, outputs = case.segments(70, 20, 10), 72, 88
    n, modules = sum(segments.sizes), len(adapts)
    mask = None if drops is None else case.mask(segments, *drops)
    lora = case.lora(adapts, rank, inputs, outputs)
    x, g, of_x = case.columns(n, inputs), case.columns(n, modules * outputs), case.columns(n, inputs)
    out = case.columns(n, modules * outputs)

    def computed(kernels: Kernels) -> list[Tensor]:
        own = replace(lora, of_a=torch.zeros_like(lora.of_a), of_b=torch.zeros_like(lora.of_b))  # type: ignore[arg-type]
        summed, of_input = out.clone(), of_x.clone()
        h = kernels.lora_down(x, own, segments, mask)
        kernels.lora_up(summed, h, own, segments)
        of_h = kernels.lora_up_gradients(g, h, own, segments)
        kernels.lora_down_gradients(of_input, of_h, x, own, segments, mask)
        kernels.lora_down_gradients(None, of_h, x, own, segments, mask)
        assert own.of_a is not None and own.of_b is not None
        return [summed, of_input, own.of_a, own.of_b]

    for found, wanted in zip(computed(case.triton), computed(case.torch), strict=True):
        case.assert_equal(found, wanted)


@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("lengths", [(5, 1, 20), (40, 130, 1, 64)])
def test_attention_and_its_gradients(case: Case, lengths: tuple[int, ...], of_rows: bool) -> None:
    ends = np.cumsum(lengths).tolist()
    first = case.ints(0, *ends[:-1]).long()
    rows = Rows(case.ints(0, *ends), case.ints(*lengths), first, max(lengths), ends[-1])
    tokens = -(-ends[-1] // 16) * 16
    queries = len(lengths) if of_rows else tokens
    q, k, v = case.columns(queries, HIDDEN), *case.columns(tokens, 2 * HIDDEN).split(HIDDEN, dim=1)
    g = case.random(queries, HIDDEN)

    def computed(kernels: Kernels) -> list[Tensor]:
        context, saved = kernels.attention(q, k, v, rows, of_rows, True)
        of_q, of_parts = torch.full_like(q, torch.nan), case.random(tokens, 2 * HIDDEN)
        kernels.attention_gradients(g, saved, rows, of_q, *of_parts.split(HIDDEN, dim=1))
        return [context, of_q, of_parts]

    for found, wanted in zip(computed(case.triton), computed(case.torch), strict=True):
        case.assert_equal(found, wanted)


@pytest.mark.parametrize("two", [False, True])
def test_normalisation_of_a_sum_and_its_gradient(case: Case, two: bool) -> None:
    x, y, g = case.columns(9, HIDDEN), case.columns(9, HIDDEN), case.columns(9, HIDDEN)
    g2 = case.columns(9, HIDDEN) if two else None

    def computed(kernels: Kernels) -> list[Tensor]:
        out, saved = kernels.add_norm(x, y, case.norm, True)
        scored, _ = kernels.add_norm(x, y, case.norm, False)
        return [out, scored, kernels.add_norm_gradient(g, g2, saved, case.norm)]

    for found, wanted in zip(computed(case.triton), computed(case.torch), strict=True):
        case.assert_equal(found, wanted)


def test_gelu_and_its_gradient(case: Case) -> None:
    z, g = case.random(35, HIDDEN), case.random(35, HIDDEN)

    def computed(kernels: Kernels) -> list[Tensor]:
        u, saved = kernels.gelu(z.clone(), True)
        scored, _ = kernels.gelu(z.clone(), False)
        return [u, scored, kernels.gelu_gradient(g.clone(), saved)]

    for found, wanted in zip(computed(case.triton), computed(case.torch), strict=True):
        case.assert_equal(found, wanted)


def test_gradients_of_a_whole_pass(case: Case, roberta: TinySetup) -> None:
    """Of slots with unlike targets, ranks and dropout, one of which is not in the pass."""
    presets = ("qv", "all-linear", "ffn", "qkvo")
    specs = [TrialSpec(preset, 3 + slot, 8, 0.1 * slot, 1e-3) for slot, preset in enumerate(presets)]
    encoder = Encoder(load_base(roberta.base, 4), "roberta", case.device, case.dtype)
    model = MultiLoraModel(encoder, roberta.base.shape, len(specs))
    for slot, spec in enumerate(specs):
        model.slots.place(slot, spec, state_of(trained_model(roberta, spec, seed=slot)))
    tokens = DeviceTokens(roberta.corpus.train, case.device, encoder.padding_id)
    packed = tokens.pack([(0, [1]), (1, [20, 30]), (3, [50, 51])])
    segments = {name: case.segments(*getattr(packed, name).sizes) for name in ("tokens", "firsts")}
    packed = replace(packed, **segments)
    keys = {slot: DropoutKey(spec.dropout, 5, 1) for slot, spec in enumerate(specs) if spec.dropout}

    def computed(kernels: Kernels) -> tuple[Tensor, Tensor]:
        model.choice.kernels = kernels
        return model.gradients(packed, keys)

    found = computed(type(case.triton)(encoder.layers, torch.bfloat16))
    wanted = computed(Kernels(encoder.layers))
    for own, other in zip(found, wanted, strict=True):
        case.assert_equal(own, other, in_bf16=5e-2)


@pytest.mark.parametrize(("family", "max_norm"), [("bert", 0.0), ("roberta", 1.0)])
def test_adamw_with_clipping(case: Case, family: Family, max_norm: float) -> None:
    assert_adamw_equal(case.triton, case.torch, family, max_norm, case.device, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="it starts itself")
@pytest.mark.skipif(VERSION < (3, 7), reason="this Triton's interpreter fails with NumPy from 2.4 on")
def test_interpreted() -> None:
    """Triton decides when it is imported whether it interprets kernels: hence a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu and not proof", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# Without a device: layers of `roberta-base` with 32 slots, whose tensors have no memory -------------------------------

WIDTH, INNER, SLOTS, TOKENS, ROWS = 768, 3072, 32, 32 * 32 * 53, 32 * 32
MODULES = {"query_key_value": (3, WIDTH, WIDTH), "attention_output": (1, WIDTH, WIDTH)}
MODULES |= {"ffn_in": (1, WIDTH, INNER), "ffn_out": (1, INNER, WIDTH)}


def pass_over_layer(kind: str, rank: int, training: bool, longest: int) -> None:
    """Go forward, and in training backward, through a layer of a `kind`, in which every slot adapts every module."""
    from agnews_lora.training.multilora.kernels.cuda import CudaKernels

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> Tensor:
        return made(*shape, dtype=torch.int32)

    def affine(inputs: int, outputs: int) -> Affine:
        return Affine(made(outputs, inputs), made(outputs))

    def lora(modules: int, inputs: int, outputs: int) -> Lora:
        shapes = [(modules, SLOTS, rank, width) for width in (inputs, outputs)]
        a, b = (made(*shape) for shape in shapes)
        of_a, of_b = (made(*shape, dtype=torch.float32) for shape in shapes)
        return Lora(a, b, of_a, of_b, ((True,) * SLOTS,) * modules, ints(modules, SLOTS), tuple(range(modules)))

    def segments(rows: int) -> Segments:
        return Segments((rows // SLOTS,) * SLOTS, ints(3, 2 * SLOTS), ints(SLOTS + 1))

    affines = {name: affine(inputs, modules * outputs) for name, (modules, inputs, outputs) in MODULES.items()}
    norm = Norm(made(WIDTH), made(WIDTH), 1e-5)
    query, key_value = affine(WIDTH, WIDTH), affine(WIDTH, 2 * WIDTH)
    layer = Layer(12, **affines, query=query, key_value=key_value, attention_norm=norm, ffn_norm=norm)
    mask = Mask(ints(TOKENS), made(TOKENS, dtype=torch.int16), 65, (True,) * SLOTS)
    updates = LayerUpdates(**{name: lora(*sizes) for name, sizes in MODULES.items()}, mask=mask if training else None)
    rows = Rows(ints(ROWS + 1), ints(ROWS), made(ROWS, dtype=torch.int64), longest, TOKENS)
    rest = dict.fromkeys((field.name for field in fields(PackedBatch)), None)
    packed = PackedBatch(**rest | {"tokens": segments(TOKENS), "firsts": segments(ROWS), "rows": rows})  # type: ignore
    kernels = CudaKernels([layer], torch.bfloat16)
    own = LayerPass(kernels, layer, updates, packed, kind == "first", kind == "last", training)
    with torch.no_grad():
        out = own.forward(made(TOKENS, WIDTH))
        if training:
            own.backward(torch.empty_like(out), None if kind == "last" else torch.empty_like(out))


def update_slots() -> None:
    from agnews_lora.training.multilora.kernels.cuda import CudaKernels

    slots = Slots(SLOTS, ModelShape("roberta", WIDTH, 12, INNER, 4), torch.device("meta"))
    steps = SlotSteps.of([1e-3] * SLOTS, [1] * SLOTS, slots.device)
    CudaKernels.adamw(Mock(), slots, torch.empty_like(slots.weights), steps, 0.01, 1.0)


class Launches(TorchDispatchMode):
    """Counts torch's operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and "empty" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not launched")
def test_a_layer_and_step_take_at_most_40_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **others: launches.names.append(self.__name__))
    with launches:
        pass_over_layer("middle", 8, training=True, longest=100)
    assert len(launches.names) <= 40, launches.names


@pytest.mark.proof
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("rank", [8, 16, 32])
def test_compiled_for_an_h200_all_products_run_on_tensor_cores(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As they are launched, with the real driver's place taken by one that names the device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", device)
    from agnews_lora.training.multilora.kernels import triton_kernels

    functions = [each for each in vars(triton_kernels).values() if isinstance(each, triton.JITFunction)]
    kernels = [each for each in functions if not each.__name__.startswith("_")]
    compiled, run = {}, triton.JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **others: Any) -> None:
        kernel = run(self, *args, warmup=True, **others)
        compiled[kernel.hash] = kernel

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    for kind in ("first", "middle", "last"):
        for training in (True, False):
            for longest in (30, 100):
                pass_over_layer(kind, rank, training, longest)
    update_slots()
    for kernel in kernels:
        kernel.device_caches.clear()  # nobody else is to launch them
    assert {kernel.name for kernel in compiled.values()} == {kernel.__name__ for kernel in kernels}
    for kernel in compiled.values():
        assert kernel.metadata.shared <= 227 * 1024, kernel.name
        if "tt.dot" in kernel.asm["ttir"]:
            assert "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"], kernel.name
