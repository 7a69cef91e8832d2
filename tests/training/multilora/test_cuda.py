"""Passes over all slots at once on a GPU: near to fp32 on a CPU, independent of one another, without a wait."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agnews_lora.adapters.adapter_files import load_base, tensor_shapes
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.packing import DeviceTokens
from agnews_lora.training.multilora.slots import SlotState
from tests.training.conftest import SETTINGS, TinySetup, losses, plan
from tests.training.multilora.test_engine import DROPPING, UNLIKE, gpu, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = TrialSpec("all-linear", rank=3, alpha=6, dropout=0.3, learning_rate=1e-3)
EIGHT = [replace(spec, rank=number + 1) for number, spec in enumerate([SPEC, *UNLIKE])]


def model_of(
    setup: TinySetup, num_slots: int, device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16
) -> MultiLoraModel:
    """Slots over the base with its first layer three times: a first layer, a last, and two between."""
    encoder = Encoder(load_base(setup.base, 4), setup.base.shape.family, device, dtype)
    first, last = encoder.layers
    encoder.layers = [first, first, first, last]
    model = MultiLoraModel(encoder, replace(setup.base.shape, num_layers=4), num_slots)
    model.threads = None  # all slots in one pass, on a CPU too
    return model


def place(model: MultiLoraModel, slot: int, spec: TrialSpec) -> None:
    """Random weights, the same for the same trial wherever it is placed."""
    generator = torch.Generator().manual_seed(spec.rank)
    shapes = tensor_shapes(spec, model.shape)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model.slots.place(slot, spec, SlotState.fresh(weights))


def batch(slot: int) -> SlotBatch:
    return SlotBatch(slot, list(range(5 * slot, 5 * slot + 9 - slot % 3)), 1e-3, step=5, seed=slot)


def gradients(model: MultiLoraModel, tokens: DeviceTokens, batches: list[SlotBatch]) -> tuple[Tensor, Tensor]:
    packed = tokens.pack([(each.slot, each.rows) for each in batches])
    return model.choice.run(lambda: model.gradients(packed, model._dropout_keys(batches)))


@gpu
def test_bf16_on_a_gpu_is_near_to_fp32_on_a_cpu(roberta: TinySetup, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for device, dtype in ((CPU, torch.float32), (CUDA, torch.bfloat16)):
        model = model_of(roberta, len(EIGHT), device, dtype)
        tokens = DeviceTokens(roberta.corpus.train, device, padding_id=1)
        for slot, spec in enumerate(EIGHT):
            place(model, slot, spec)
        found_losses, own = gradients(model, tokens, [batch(slot) for slot in range(len(EIGHT))])
        model.slots.zero_frozen(own)
        logits = torch.empty(len(EIGHT), 21, 4)
        for positions, part in model.logits(tokens, range(21), range(len(EIGHT)), batch_size=6):
            logits[:, positions] = part.cpu()
        found.append((found_losses.cpu(), own.cpu(), logits))
    (exact_losses, own, logits), (rounded_losses, rounded, rounded_logits) = found
    assert not caplog.messages  # that faster kernels failed
    torch.testing.assert_close(rounded_losses, exact_losses, rtol=0.1, atol=0.05)
    assert ((rounded - own).norm(dim=1) / own.norm(dim=1)).max() < 0.15
    torch.testing.assert_close(rounded_logits, logits, rtol=0, atol=0.1 * logits.abs().max().item())


@gpu
def test_a_slot_among_seven_others_is_as_alone(roberta: TinySetup) -> None:
    tokens = DeviceTokens(roberta.corpus.train, CUDA, padding_id=1)
    found = []
    for slots in ([0], range(8)):
        model = model_of(roberta, 8)
        for slot in slots:
            place(model, slot, EIGHT[slot])
        found_losses, own = gradients(model, tokens, [batch(slot) for slot in slots])
        own_tensors = {name: part.clone() for name, part in model.slots.tensors(own[0], SPEC)}
        found.append(own_tensors | {"loss": found_losses[0]})
    alone, among = found
    for name, part in alone.items():
        assert (among[name] - part).norm() <= 0.05 * part.norm(), name


@gpu
def test_a_step_does_not_wait_for_the_device(roberta: TinySetup) -> None:
    model = model_of(roberta, 4)
    tokens = DeviceTokens(roberta.corpus.train, CUDA, padding_id=1)
    for slot in range(3):
        place(model, slot, EIGHT[slot])
    batches = [batch(slot) for slot in range(3)]
    for _ in range(2):  # compiled, then captured, which may wait
        model.step(tokens, batches, 0.01, 1.0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.step(tokens, batches, 0.01, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_replayed_steps_give_the_numbers_of_launched_ones(roberta: TinySetup) -> None:
    tokens = DeviceTokens(roberta.corpus.train, CUDA, padding_id=1)
    found = []
    for reason in ("", "launched one by one"):
        model = model_of(roberta, 4)
        model.graphs.reason = reason
        for slot in range(3):
            place(model, slot, EIGHT[slot])
        values = []
        for number in range(6):
            batches = [replace(batch(slot), step=number + 1) for slot in range(3)]
            values.append(model.step(tokens, batches, 0.01, 1.0))
        found.append(torch.stack(values).cpu())
        assert len(model.graphs.captured) == (not reason) and model.graphs.reason == reason
    replayed, launched = found
    torch.testing.assert_close(replayed, launched, rtol=0.02, atol=0.02)  # in bf16, by products of other sizes


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
