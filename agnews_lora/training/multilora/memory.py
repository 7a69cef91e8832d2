"""How many slots fit the device."""

import torch

from agnews_lora.adapters.adapter_files import tensor_shapes
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.training.multilora.model import Core, SlotBatch
from agnews_lora.training.multilora.packing import TokenStore
from agnews_lora.training.multilora.slots import SlotState

MAX_SLOTS = 32
HEAVIEST = TrialSpec("all-linear", rank=32, alpha=1, dropout=0.1, learning_rate=1.0)  # adapts and drops everywhere
HEADROOM = 0.8  # share of the free memory that slots may fill: batches differ, and the allocator leaves gaps


def fitting_slots(free_bytes: int, slot_bytes: int) -> int:
    """Slots of `slot_bytes` each that fit, between 1 and `MAX_SLOTS`."""
    return max(1, min(MAX_SLOTS, int(HEADROOM * free_bytes) // max(1, slot_bytes)))


def choose_slots(core: Core, store: TokenStore, batch_size: int) -> int:
    """Slots to train with: as many as fit a CUDA device by the measured peak of one slot's step, one on a CPU.

    A CPU is busy with one trial already, and trials that end sooner teach the search sooner.
    """
    if core.device.type != "cuda":
        return 1
    core.resize(2)  # a layer compiled for a single slot would serve no other number of them
    occupy(core, HEAVIEST)
    heaviest_step(core, store, batch_size)  # the first one compiles, which takes memory of its own
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(core.device)
    torch.cuda.reset_peak_memory_stats(core.device)
    heaviest_step(core, store, batch_size)
    slot_bytes = torch.cuda.max_memory_allocated(core.device) - before
    core.resize(1)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(core.device)
    return fitting_slots(free_bytes, slot_bytes)


def occupy(core: Core, spec: TrialSpec) -> None:
    """Put a trial of zeros into the first slot."""
    zeros = {name: torch.zeros(shape) for name, shape in tensor_shapes(spec, core.shape).items()}
    core.slots.place(0, spec, SlotState.fresh(zeros))


def heaviest_step(core: Core, store: TokenStore, batch_size: int) -> None:
    """Train the first slot on the longest rows there are, at a rate of zero."""
    longest = store.lengths.argsort()[-batch_size:]
    core.step(store, [SlotBatch(0, longest.tolist(), learning_rate=0.0, step=1, seed=0)], 0.0, 0.0)
