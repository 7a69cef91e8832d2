"""Slots: what goes in comes out, whatever the neighbours' ranks are."""

import torch

from agnews_lora.adapters.adapter_files import tensor_shapes
from agnews_lora.adapters.spec import PRESETS, TrialSpec
from agnews_lora.training.multilora.slots import Slots, SlotState
from tests.tiny import tiny_shape

CPU = torch.device("cpu")
SHAPE = tiny_shape("roberta")


def state(spec: TrialSpec, seed: int) -> SlotState:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(spec, SHAPE)
    return SlotState(*({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3)))


def same(first: SlotState, second: SlotState) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second, strict=True)
    )


def test_what_a_slot_holds_outlasts_wider_neighbours() -> None:
    specs = [TrialSpec(preset, 3 + 5 * n, 4, 0.0, 1e-3) for n, preset in enumerate(PRESETS)]
    slots = Slots(len(specs), SHAPE, CPU)
    states = [state(spec, n) for n, spec in enumerate(specs)]
    for n, spec in enumerate(specs):
        slots.place(n, spec, states[n])
    for n in range(len(specs)):
        assert same(slots.take(n), states[n])
    slots.place(1, specs[0], states[0])
    slots.clear(2)
    assert same(slots.take(1), states[0])
    assert same(slots.take(3), states[3])
    assert not slots.weights[2].any() and not slots.second_moment[2].any()


def test_scales_are_zero_where_a_module_is_not_adapted() -> None:
    slots = Slots(3, SHAPE, CPU)
    slots.place(0, TrialSpec("qk", 2, 8, 0.0, 1e-3), state(TrialSpec("qk", 2, 8, 0.0, 1e-3), 0))
    slots.place(2, TrialSpec("qv", 4, 2, 0.0, 1e-3), state(TrialSpec("qv", 4, 2, 0.0, 1e-3), 0))
    scales = {module: values.tolist() for module, values in slots.scales.items()}
    assert scales == {
        "query": [4.0, 0.0, 0.5],
        "key": [4.0, 0.0, 0.0],
        "value": [0.0, 0.0, 0.5],
    }


def test_a_taken_state_is_a_copy() -> None:
    slots, spec = Slots(1, SHAPE, CPU), TrialSpec("ffn", 1, 1, 0.0, 1e-3)
    slots.place(0, spec, state(spec, 0))
    taken = slots.take(0)
    slots.clear(0)
    assert same(taken, state(spec, 0))
