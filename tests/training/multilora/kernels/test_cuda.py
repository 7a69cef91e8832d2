"""The Triton kernels against the plain torch code: on a CUDA device, or interpreted in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.training.multilora import packing
from agnews_lora.training.multilora.dropout import Mask
from agnews_lora.training.multilora.encoder import Affine, Encoder, Layer, Norm
from agnews_lora.training.multilora.graphs import Captured, StepGraphs
from agnews_lora.training.multilora.kernels.reference import Kernels, Lora
from agnews_lora.training.multilora.layer import LayerPass, LayerUpdates
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.optimizer import SlotSteps
from agnews_lora.training.multilora.packing import (
    DeviceTokens,
    PackedBatch,
    Rows,
    Segments,
    empty_buffer,
    in_one_copy,
    tables_of,
)
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
        """Segments, and 30 tokens behind them that belong to none."""
        tables = tables_of(sizes, sum(sizes) + 30)
        return Segments(sizes, *(torch.from_numpy(table).to(self.device) for table in tables))

    def ints(self, *values: int) -> Tensor:
        return torch.tensor([int(value) for value in values], dtype=torch.int32, device=self.device)

    def mask(self, segments: Segments, *drops: bool) -> Mask:
        tokens = torch.randint(-(2**31), 2**31, (sum(segments.sizes) + 30,)).int()
        sizes = [*segments.sizes, 30]
        bounds = [torch.full((size,), 9_000 if own else -1) for own, size in zip([*drops, True], sizes, strict=True)]
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
    n, modules = sum(segments.sizes) + 30, len(adapts)
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


@pytest.mark.parametrize("drops", [None, (True, False, True)])
def test_low_rank_updates_with_gelu(case: Case, drops: tuple[bool, ...] | None) -> None:
    """Before it and behind it, also of tokens that no update changes."""
    segments, hidden, inner, n = case.segments(70, 20, 10), 72, 88, 130
    mask = None if drops is None else case.mask(segments, *drops)
    before, behind = case.lora(ONE, 8, hidden, inner), replace(case.lora(ONE, 16, inner, hidden), modules=(2,))
    x, z, of_u, g = (case.random(n, width) for width in (hidden, inner, inner, hidden))

    def computed(kernels: Kernels) -> list[Tensor]:
        h = kernels.lora_down(x, before, segments, mask)
        scored, _ = kernels.lora_up_gelu(z.clone(), h, before, segments, False)
        u, activated = kernels.lora_up_gelu(z.clone(), h, before, segments, True)
        of_h = kernels.lora_up_gradients(g, kernels.lora_down(u, behind, segments, mask), behind, segments)
        return [scored, u, kernels.lora_down_gelu_gradients(of_u.clone(), of_h, u, behind, segments, mask, activated)]

    for found, wanted in zip(computed(case.triton), computed(case.torch), strict=True):
        case.assert_equal(found, wanted)


@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("lengths", [(5, 1, 20), (40, 130, 1, 64), (128, 65, 100)])
def test_attention_and_its_gradients(case: Case, lengths: tuple[int, ...], of_rows: bool) -> None:
    ends = np.cumsum(lengths).tolist()
    first = case.ints(0, *ends[:-1]).long()
    rows = Rows(case.ints(0, *ends), case.ints(*lengths), first, max(lengths), ends[-1])
    tokens = ends[-1] + 80
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
    known = {"tokens": segments(TOKENS), "firsts": segments(ROWS), "rows": rows, "ids": ints(TOKENS)}
    packed = PackedBatch(**dict.fromkeys((field.name for field in fields(PackedBatch)), None) | known)  # type: ignore
    kernels = CudaKernels([layer], torch.bfloat16)
    own = LayerPass(kernels, layer, updates, packed, kind == "first", kind == "last", training)
    with torch.no_grad():
        out = own.forward(made(TOKENS, WIDTH))
        if training:
            own.backward(torch.empty_like(out), None if kind == "last" else torch.empty_like(out))


def activate_and_update_slots() -> None:
    """Compute what a layer does by itself where no slot adapts its feed-forward block, and a step's end."""
    from agnews_lora.training.multilora.kernels.cuda import CudaKernels

    slots = Slots(SLOTS, ModelShape("roberta", WIDTH, 12, INNER, 4), torch.device("meta"))
    steps = SlotSteps.of([1e-3] * SLOTS, [1] * SLOTS, slots.device)
    CudaKernels.gelu(Mock(), torch.empty(TOKENS, INNER, dtype=torch.bfloat16, device="meta"), True)
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
def test_a_layer_and_step_take_at_most_38_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **others: launches.names.append(self.__name__))
    with launches:
        pass_over_layer("middle", 8, training=True, longest=100)
    assert len(launches.names) <= 38, launches.names


# Steps that are replayed ----------------------------------------------------------------------------------------------


SPECS = [TrialSpec(preset, 3, 8, dropout, 1e-3) for preset, dropout in (("qv", 0.0), ("all-linear", 0.3))]


def model_in_one_pass(
    setup: TinySetup, kernels: Callable[[Sequence[Layer]], Kernels], dtype: torch.dtype, graphs: StepGraphs
) -> MultiLoraModel:
    """Unlike slots on a CPU, which go through a step as on a GPU; the one between them is empty."""
    encoder = Encoder(load_base(setup.base, 4), "roberta", torch.device("cpu"), dtype)
    model = MultiLoraModel(encoder, setup.base.shape, len(SPECS) + 1)
    model.threads, model.graphs, model.choice.kernels = None, graphs, kernels(encoder.layers)
    for slot, spec in zip((0, 2), SPECS, strict=True):
        model.slots.place(slot, spec, state_of(trained_model(setup, spec, seed=slot)))
    return model


def unlike_batches(setup: TinySetup) -> list[list[SlotBatch]]:
    """Batches of the same numbers of rows, but other rows, rates, steps and seeds in each step."""
    order = setup.corpus.train.lengths.argsort().tolist()
    return [
        [
            SlotBatch(2, [order[-n], order[2 * n], order[10 * n]], 1e-3 / n, 4 + n, n),
            SlotBatch(0, [order[20 * n]], 1e-2 * n, 1, 0),
        ]
        for n in (1, 2)
    ]


class OnACpu(StepGraphs):
    """Takes a step again in place of a graph, by the code that the captured step ran: what that reads beside the arrays
    of the step is of the captured step. Every step may be captured; the first one is not taken."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.reason, self.replays = "", 0

    def clear(self) -> None:
        super().clear()
        self.seen = MagicMock(__contains__=lambda seen, sizes: True)

    def _capture(self, arrays: Any, compute: Any) -> Captured:
        buffer, result = empty_buffer(arrays, self.device), torch.zeros(2, len(SPECS) + 1)
        parts = in_one_copy(arrays, self.device, buffer)

        def replay() -> None:
            if self.replays:
                result.copy_(compute(parts))
            self.replays += 1

        return Captured(replay, buffer, result)


def test_replayed_steps_give_the_numbers_of_launched_ones(
    case: Case, roberta: TinySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; and up to rounding those of plain torch, without a bucket."""
    if case.device.type == "cuda":
        pytest.skip("tests/training/multilora/test_cuda.py has real graphs")
    monkeypatch.setattr(packing, "SMALLEST_STEP", 96)
    tokens = DeviceTokens(roberta.corpus.train, case.device, 1)
    captured, step = unlike_batches(roberta)
    replaying, launching = OnACpu(), StepGraphs(case.device)
    launching.reason = ""
    found = []
    triton_kernels = partial(type(case.triton), dtype=torch.bfloat16)
    for graphs, kernels in ((replaying, triton_kernels), (launching, triton_kernels), (launching, Kernels)):
        model = model_in_one_pass(roberta, kernels, torch.float32, graphs)
        if graphs is replaying:
            model.step(tokens, captured, 0.01, 1.0)
        found.append((model.step(tokens, step, 0.01, 1.0), model.slots.first_moment, model.slots.weights))
    replayed, launched, by_torch = found
    assert replaying.replays == 2 and len(replaying.captured) == 1 and len(launching.seen) == 1
    for own, other in zip(replayed, launched, strict=True):
        assert torch.equal(own, other)
    for own, other in zip(replayed[:2], by_torch[:2], strict=True):
        case.assert_equal(own, other)


class Recorded(Launches):
    """Notes torch's operations with the shapes of tensors and all other arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func.name(), args, kwargs)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, *given: Any) -> None:
        known = tree_map(lambda each: tuple(each.shape) if isinstance(each, Tensor) else each, given)
        self.names.append(f"{name} {known}")


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not launched")
def test_steps_that_are_replayed_launch_the_same_and_read_nothing_from_the_host(
    roberta: TinySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agnews_lora.training.multilora.kernels.cuda import CudaKernels

    recorded: dict[Any, list[list[str]]] = {}

    class Recording(OnACpu):
        def run(self, version: Any, sizes: Any, arrays: Any, compute: Any) -> Tensor:
            parts = in_one_copy(arrays, self.device)
            with monkeypatch.context() as forbidden, Recorded() as launches:
                forbidden.setattr(torch, "from_numpy", Mock(side_effect=AssertionError("a copy from the host")))
                forbidden.setattr(
                    triton.JITFunction,
                    "run",
                    lambda kernel, *args, grid, **others: launches.note(kernel.__name__, grid, args, others),
                )
                result: Tensor = compute(parts)
            recorded.setdefault((version, sizes), []).append(launches.names)
            return result

    model = model_in_one_pass(roberta, partial(CudaKernels, dtype=torch.bfloat16), torch.bfloat16, Recording())
    tokens = DeviceTokens(roberta.corpus.train, model.device, 1)
    for batches in unlike_batches(roberta):
        model.step(tokens, batches, 0.01, 1.0)
    [[first, other]] = recorded.values()
    assert other == first
    waits = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique")
    assert not [each for each in first if any(name in each for name in waits)]
    assert any(each.startswith("expand") for each in first) and any(each.startswith("adamw") for each in first)


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
    activate_and_update_slots()
    for kernel in kernels:
        kernel.device_caches.clear()  # nobody else is to launch them
    assert {kernel.name for kernel in compiled.values()} == {kernel.__name__ for kernel in kernels}
    for kernel in compiled.values():
        assert kernel.metadata.shared <= 227 * 1024, kernel.name
        if "tt.dot" in kernel.asm["ttir"]:
            assert "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"], kernel.name
