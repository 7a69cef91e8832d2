"""Dropout masks that follow from (trial seed, step, layer, module, position) and from nothing else.

Each mask is drawn for one slot's segment from a generator seeded with those numbers: neighbours, and the number of
masks drawn before, change nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch

from agnews_lora.training.multilora.slots import MODULES


@dataclass(frozen=True)
class Draw:
    """Where a slot's masks of one step come from."""

    probability: float
    seed: int
    step: int


class Masks:
    """Draws masks on a device."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)

    def fill(self, mask: torch.Tensor, draw: Draw, layer: int, module: str) -> None:
        """Write 1 / (1 - p) where a feature is kept, 0 where it is dropped, into a slot's own segment [tokens, in]."""
        source = np.random.SeedSequence([draw.seed, draw.step, layer, MODULES.index(module)])
        self.generator.manual_seed(int(source.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        mask.bernoulli_(1 - draw.probability, generator=self.generator).div_(1 - draw.probability)
