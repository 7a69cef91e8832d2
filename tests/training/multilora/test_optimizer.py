"""The update of slots against torch's AdamW, clipping and transformers' schedule, a slot at a time."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from agnews_lora.adapters.adapter_files import tensor_shapes
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import HEADS, TrialSpec
from agnews_lora.training.multilora import optimizer
from agnews_lora.training.multilora.slots import Slots, SlotState
from tests.tiny import tiny_shape

CPU = torch.device("cpu")
WEIGHT_DECAY, MAX_NORM = 0.3, 1.0
LEARNING_RATES = (3e-2, 1e-1)


def random_tensors(spec: TrialSpec, family: Family, seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, tiny_shape(family))
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def by_torch(spec: TrialSpec, start: dict[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]], rate: float):  # type: ignore[no-untyped-def]
    """(weights, norms) after torch's own steps; biases do not decay, and a frozen layer is no parameter."""
    frozen = [name for name in start if spec.head == "out_proj" and ".classifier.dense." in name]
    trained = {name: torch.nn.Parameter(t.clone()) for name, t in start.items() if name not in frozen}
    groups = [
        {"params": [p for name, p in trained.items() if not name.endswith("bias")], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in trained.items() if name.endswith("bias")], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate)
    norms = []
    for step in gradients:
        for name, parameter in trained.items():
            parameter.grad = step[name].clone()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM).item())
        adamw.step()
    return {name: trained[name].detach() if name in trained else tensor for name, tensor in start.items()}, norms


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("head", HEADS)
def test_every_slot_is_updated_as_by_adamw(family: Family, head: str) -> None:
    """Two slots of unlike ranks and rates; the second joins two steps later; the third is empty."""
    specs = [TrialSpec("qv", 3, 6, 0.0, 1e-3, head), TrialSpec("all-linear", 9, 6, 0.0, 1e-3)]
    slots = Slots(3, tiny_shape(family), CPU)
    starts = [random_tensors(spec, family, seed, 1.0) for seed, spec in enumerate(specs)]
    # The first slot's gradients are clipped, the second's are too small to be.
    scales = (1.0, 1e-4)
    steps = [[random_tensors(spec, family, 10 * n + s, scales[n]) for s in range(6)] for n, spec in enumerate(specs)]
    slots.place(0, specs[0], SlotState.fresh(starts[0]))
    norms: list[list[float]] = [[], []]
    for step in range(6):
        if step == 2:
            slots.place(1, specs[1], SlotState.fresh(starts[1]))
        active = [0, 1] if step >= 2 else [0]
        gradients = torch.zeros_like(slots.weights)
        for slot in active:
            number = step if slot == 0 else step - 2
            for name, part in slots.tensors(gradients[slot], specs[slot]):
                part.copy_(steps[slot][number][name])
        found = optimizer.clip(slots, gradients, MAX_NORM)
        for slot in active:
            norms[slot].append(found[slot].item())
        rates = [LEARNING_RATES[0], LEARNING_RATES[1] if 1 in active else 0.0, 0.0]
        steps_now = optimizer.SlotSteps.of(rates, [step + 1, max(1, step - 1), 1], CPU)
        optimizer.step(slots, gradients, steps_now, WEIGHT_DECAY)
    for slot, num_steps in ((0, 6), (1, 4)):
        weights, expected_norms = by_torch(specs[slot], starts[slot], steps[slot][:num_steps], LEARNING_RATES[slot])
        assert norms[slot] == pytest.approx(expected_norms, rel=1e-5)
        for name, tensor in slots.take(slot).weights.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)
    assert not slots.weights[2].any()


def test_a_norm_of_zero_clips_nothing() -> None:
    slots = Slots(1, tiny_shape("bert"), CPU)
    slots.place(
        0,
        TrialSpec("qv", 2, 4, 0.0, 1e-3),
        SlotState.fresh(random_tensors(TrialSpec("qv", 2, 4, 0.0, 1e-3), "bert", 0, 1.0)),
    )
    gradients = torch.full_like(slots.weights, 3.0)
    optimizer.clip(slots, gradients, max_norm=0.0)
    assert (gradients == 3.0).all()


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (1, 1)])
def test_the_schedule_is_transformers(warmup: int, total: int) -> None:
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(adamw, warmup, total)
    for step in range(total):
        assert optimizer.linear_rate(step, warmup, total) == schedule.get_last_lr()[0]
        adamw.step()
        schedule.step()
