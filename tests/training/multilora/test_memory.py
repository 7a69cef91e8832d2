"""How many slots fit, and the step that their memory is measured by."""

import pytest
import torch

from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.spec import PRESETS
from agnews_lora.training.device import peak_memory_bytes
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.engine import (
    MAX_SLOTS,
    choose_slots,
    fitting_slots,
    heaviest_step,
    place_heaviest,
)
from agnews_lora.training.multilora.model import MultiLoraModel
from agnews_lora.training.multilora.packing import DeviceTokens
from tests.training.conftest import Lab

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("free_gib", "slot_gib", "expected"), [(100, 10, 8), (100, 100, 1), (1, 100, 1), (1000, 1, MAX_SLOTS)]
)
def test_slots_fill_most_of_the_free_memory(free_gib: int, slot_gib: int, expected: int) -> None:
    assert fitting_slots(free_gib << 30, slot_gib << 30) == expected


def test_the_measured_step_goes_through_every_module(roberta: Lab) -> None:
    core = MultiLoraModel(Encoder(load_base(roberta.base, 4), "roberta", CPU, torch.float32), roberta.base.shape, 1)
    place_heaviest(core)
    assert core.slots.ranks.keys() == set(PRESETS["all-linear"])
    heaviest_step(core, DeviceTokens(roberta.corpus.train, CPU, flat=False), batch_size=8)
    assert core.slots.first_moment.any()
    assert not core.slots.weights.any()


def test_a_cpu_trains_one_trial_at_a_time(roberta: Lab) -> None:
    core = MultiLoraModel(Encoder(load_base(roberta.base, 4), "roberta", CPU, torch.float32), roberta.base.shape, 4)
    assert choose_slots(core, DeviceTokens(roberta.corpus.train, CPU, flat=False), 8) == 1
    assert peak_memory_bytes(CPU) > 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_as_many_as_its_memory_says(roberta: Lab) -> None:
    device = torch.device("cuda", 0)
    core = MultiLoraModel(Encoder(load_base(roberta.base, 4), "roberta", device, torch.bfloat16), roberta.base.shape, 1)
    assert choose_slots(core, DeviceTokens(roberta.corpus.train, device, flat=True), 8) == MAX_SLOTS
    assert core.compiler.compiles and core.slots.specs == [None]
