"""A compiled layer: the same numbers as an uncompiled one, compiled seldom, and training that outlives a failure."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from agnews_lora.adapters.adapter_files import load_base, tensor_shapes
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.training.multilora import compile, optimizer
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.packing import DeviceTokens
from agnews_lora.training.multilora.slots import SlotState
from tests.training.conftest import SETTINGS, TinySetup, losses, plan
from tests.training.multilora.test_engine import DROPPING, UNLIKE, gpu, train

CPU = torch.device("cpu")
NUM_LAYERS = 4  # a first, a last, and two between that share what is compiled
SPEC = TrialSpec("all-linear", rank=3, alpha=6, dropout=0.3, learning_rate=1e-3)


def by_row(q: Tensor, k: Tensor, v: Tensor, query_offsets: Tensor, offsets: Tensor) -> Iterator[tuple[Any, ...]]:
    """Give each row's slices of queries and tokens, and by head its queries, keys, values and shares."""
    for row in range(len(offsets) - 1):
        own, seen = slice(*query_offsets[row : row + 2].tolist()), slice(*offsets[row : row + 2].tolist())
        of_row = [part.transpose(0, 1) for part in (q[own], k[seen], v[seen])]
        yield own, seen, *of_row, (of_row[0] @ of_row[1].transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)


@torch.library.custom_op("agnews_lora_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, query_offsets: Tensor, offsets: Tensor, m: int, n: int) -> Tensor:
    """Attend as flash attention over variable lengths does, opaque to a compiler, on devices without it."""
    assert m >= query_offsets.diff().max() and n >= offsets.diff().max()
    out = torch.empty_like(q)
    for own, _, _, _, values, shares in by_row(q, k, v, query_offsets, offsets):
        out[own] = (shares @ values).transpose(0, 1)
    return out


@torch.library.custom_op("agnews_lora_tests::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, query_offsets: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (torch.empty_like(part) for part in (q, k, v))
    for own, seen, queries, keys, values, shares in by_row(q, k, v, query_offsets, offsets):
        context = gradient[own].transpose(0, 1)
        of_shares = context @ values.transpose(1, 2)
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        of_q[own] = (of_scores @ keys).transpose(0, 1)
        of_k[seen] = (of_scores.transpose(1, 2) @ queries).transpose(0, 1)
        of_v[seen] = (shares.transpose(1, 2) @ context).transpose(0, 1)
    return of_q, of_k, of_v


attend.register_fake(lambda q, *_: torch.empty_like(q))
attend_backward.register_fake(lambda _, *parts: tuple(torch.empty_like(part) for part in parts[:3]))
attend.register_autograd(
    lambda ctx, gradient: (*attend_backward(gradient, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
)


def model_of(
    setup: TinySetup, num_slots: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> MultiLoraModel:
    """Slots over the base with its first layer three times."""
    encoder = Encoder(load_base(setup.base, 4), setup.base.shape.family, device, dtype)
    first, last = encoder.layers
    encoder.layers = [first, first, first, last]
    model = MultiLoraModel(encoder, shape_of(setup), num_slots)
    model.threads = None  # all slots in one pass, as on a GPU
    return model


def shape_of(setup: TinySetup) -> ModelShape:
    return replace(setup.base.shape, num_layers=NUM_LAYERS)


def place(model: MultiLoraModel, slot: int, spec: TrialSpec) -> None:
    """Random weights, the same for the same trial wherever it is placed."""
    generator = torch.Generator().manual_seed(spec.rank)
    shapes = tensor_shapes(spec, model.shape)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model.slots.place(slot, spec, SlotState.fresh(weights))


def batch(slot: int, rows: list[int], seed: int = 7) -> SlotBatch:
    return SlotBatch(slot, rows, 1e-3, step=5, seed=seed)


def gradients(model: MultiLoraModel, tokens: DeviceTokens, batches: list[SlotBatch]) -> tuple[Tensor, Tensor]:
    packed = tokens.pack([(each.slot, each.rows) for each in batches])
    return model.compiler.run(lambda: model.gradients(packed, model._dropout_keys(batches)))


@pytest.fixture
def compiled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers traced, differentiated, decomposed and cut in two as for CUDA, but run operation by operation: no C++
    compiler is needed."""
    torch._dynamo.reset()
    traced = compile.compile_layer("aot_eager_decomp_partition")
    monkeypatch.setattr(compile, "_compiled", lambda: traced)
    monkeypatch.setattr(varlen, "varlen_attn", attend)


@pytest.mark.usefixtures("compiled_on_cpu")
def test_few_compilations_serve_all_layers_sizes_slots_and_ranks(roberta: TinySetup) -> None:
    """Five in all: three places in training, two in scoring; and each computes what the uncompiled layer does."""
    tokens = DeviceTokens(roberta.corpus.train, CPU, flat=True, padding_id=1)
    before = counters["stats"]["unique_graphs"]

    def same(model: MultiLoraModel, *batches: SlotBatch) -> None:
        found = []
        for model.compiler.compiles in (False, True):
            found.append(gradients(model, tokens, list(batches)))
        (exact_losses, own), (compiled_losses, compiled) = found
        torch.testing.assert_close(compiled_losses, exact_losses, rtol=1e-3, atol=0)  # bf16, rounded in other places
        assert ((compiled - own).norm(dim=1) <= 0.01 * own.norm(dim=1)).all()

    model = model_of(roberta, 3, CPU)
    place(model, 0, SPEC)
    same(model, batch(0, [1, 2, 3]))
    place(model, 2, replace(SPEC, targets="qv", rank=7, dropout=0.0))
    same(model, batch(0, [4, 5]), batch(2, list(range(10, 17))))
    place(model, 1, replace(SPEC, targets="qkvo", rank=20))
    same(model, batch(0, [7, 8, 9]), batch(1, [50, 51]), batch(2, [3, 4]))
    model = model_of(roberta, 5, CPU)
    place(model, 4, replace(SPEC, rank=9))
    same(model, batch(4, [40, 41, 42, 43]))
    assert counters["stats"]["unique_graphs"] - before == 3
    for batch_size in (6, 7):  # a single row would be one more: to a compiler, a size of 1 is a constant
        for model.compiler.compiles in (False, True):
            scored = [logits for _, logits in model.logits(tokens, range(21), [4], batch_size)]
            assert np.isfinite(np.concatenate(scored, axis=1)).all()
    assert counters["stats"]["unique_graphs"] - before == 5


@pytest.mark.usefixtures("compiled_on_cpu")
def test_training_goes_on_where_compiling_fails(
    roberta: TinySetup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> Any:
        raise RuntimeError("Failed to find a C compiler")

    broken = compile.compile_layer(no_compiler)
    monkeypatch.setattr(compile, "_compiled", lambda: broken)
    tokens = DeviceTokens(roberta.corpus.train, CPU, flat=True, padding_id=1)
    model = model_of(roberta, 1, CPU)
    place(model, 0, SPEC)
    batches = [batch(0, [1, 2, 3])]
    expected = gradients(model, tokens, batches)
    model.compiler.compiles = True
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(gradients(model, tokens, batches), expected, rtol=0, atol=0)
    [warning] = caplog.messages
    assert "uncompiled" in warning and "Failed to find a C compiler" in warning


def test_a_fault_of_the_program_is_raised(roberta: TinySetup) -> None:
    model = model_of(roberta, 1, CPU)
    model.compiler.compiles = True
    for fault, calls in ((ZeroDivisionError, 2), (torch.OutOfMemoryError, 1)):
        called = []

        def failing(fault: type[Exception] = fault, called: list[int] = called) -> None:
            called.append(1)
            raise fault("no")

        model.compiler.compiles = True
        with pytest.raises(fault):
            model.compiler.run(failing)
        assert len(called) == calls
    assert model.compiler.compiles  # out of memory is no fault of the compiler


# On a GPU -------------------------------------------------------------------------------------------------------------


EIGHT = [replace(spec, rank=number + 1) for number, spec in enumerate([SPEC, *UNLIKE])]


def rows_of(number: int) -> list[int]:
    return list(range(5 * number, 5 * number + 9 - number % 3))


@gpu
def test_compiled_bf16_follows_uncompiled_fp32(roberta: TinySetup, caplog: pytest.LogCaptureFixture) -> None:
    """Flat tokens, flash attention, grouped products and compiled dropout against padded rows on a CPU."""
    found = []
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda", 0), torch.bfloat16)):
        model = model_of(roberta, len(EIGHT), device, dtype)
        tokens = DeviceTokens(roberta.corpus.train, device, flat=device.type == "cuda", padding_id=1)
        for slot, spec in enumerate(EIGHT):
            place(model, slot, spec)
        batches = [batch(slot, rows_of(slot), seed=slot) for slot in range(len(EIGHT))]
        found_losses, own = gradients(model, tokens, batches)
        model.slots.zero_frozen(own)
        logits = np.empty((len(EIGHT), 21, 4), dtype=np.float32)
        for positions, part in model.logits(tokens, range(21), range(len(EIGHT)), batch_size=6):
            logits[:, positions] = part
        found.append((found_losses.cpu(), own.cpu(), logits))
    (exact_losses, own, logits), (rounded_losses, rounded, rounded_logits) = found
    assert not caplog.messages  # that it was not compiled
    torch.testing.assert_close(rounded_losses, exact_losses, rtol=0.1, atol=0.05)
    assert ((rounded - own).norm(dim=1) / own.norm(dim=1)).max() < 0.15
    np.testing.assert_allclose(rounded_logits, logits, atol=0.1 * np.abs(logits).max())


@gpu
def test_a_slot_among_seven_others_is_as_alone(roberta: TinySetup) -> None:
    device = torch.device("cuda", 0)
    tokens = DeviceTokens(roberta.corpus.train, device, flat=True, padding_id=1)
    found = []
    for others in ([], range(1, 8)):
        model = model_of(roberta, 8, device)
        place(model, 0, SPEC)
        for slot in others:
            place(model, slot, EIGHT[slot])
        batches = [batch(0, rows_of(0)), *(batch(slot, rows_of(slot), seed=slot) for slot in others)]
        found_losses, own = gradients(model, tokens, batches)
        own_tensors = {name: part.clone() for name, part in model.slots.tensors(own[0], SPEC)}
        found.append(own_tensors | {"loss": found_losses[0]})
    alone, among = found
    for name, part in alone.items():
        assert (among[name] - part).norm() <= 0.05 * part.norm(), name


@gpu
def test_a_step_does_not_wait_for_the_device(roberta: TinySetup) -> None:
    device = torch.device("cuda", 0)
    model = model_of(roberta, 4, device)
    tokens = DeviceTokens(roberta.corpus.train, device, flat=True, padding_id=1)
    for slot in range(3):
        place(model, slot, EIGHT[slot])
    batches = [batch(slot, rows_of(slot)) for slot in range(3)]
    model.step(tokens, batches, 0.01, 1.0)  # compiles, which may wait
    try:
        torch.cuda.set_sync_debug_mode("error")
        _, own = gradients(model, tokens, batches)
        optimizer.clip(model.slots, own, 1.0)
        optimizer.step(model.slots, own, model._steps(batches), 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.compiler.compiles


@gpu
def test_trials_end_to_end(roberta: TinySetup, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eight unlike trials through three slots in bf16, dropout on: each learns what it learns alone."""
    settings = replace(SETTINGS, precision="bf16")
    plans = [plan(tmp_path / "all", f"t{n}", spec) for n, spec in enumerate([DROPPING, *UNLIKE])]
    together = train(roberta, plans, settings, slots=3)
    assert not together.failures and len(together.results) == 8
    assert all(result.adapter is not None for result in together.results)
    alone = train(roberta, [plan(tmp_path / "alone", "t0", DROPPING)], settings, slots=3)
    np.testing.assert_allclose(losses(together, "t0")[:10], losses(alone, "t0")[:10], rtol=0.1)
    assert not caplog.messages
