"""AdamW over slots: one update for all, each with its own rate, step and clipping."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agnews_lora.training.multilora.packing import on_device
from agnews_lora.training.multilora.slots import Slots

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def linear_rate(step: int, warmup: int, total: int) -> float:
    """Compute a step's share of the peak learning rate (step from 0): transformers' linear schedule with warm-up."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass(frozen=True)
class SlotSteps:
    """The steps of all slots, each [K, 1]: learning rate (0: no step), and the bias corrections of the two moments,
    1 - beta^step (step from 1)."""

    learning_rates: Tensor
    first_corrections: Tensor
    second_corrections: Tensor

    @classmethod
    def of(cls, rates: Sequence[float], numbers: Sequence[int], device: torch.device) -> "SlotSteps":
        """Describe steps by learning rate and number."""
        return cls(*on_device([step_array(rates, numbers)], device)[0])


def step_array(rates: Sequence[float], numbers: Sequence[int]) -> npt.NDArray[np.float32]:
    """Compute the three parts of `SlotSteps` in fp64: in fp32, 1 - beta loses four digits."""
    corrections = [[1 - beta**number for number in numbers] for beta in BETAS]
    return np.array([rates, *corrections], dtype=np.float32)[:, :, None]


def clip(slots: Slots, gradients: Tensor, max_norm: float) -> Tensor:
    """Scale each slot's gradients [K, columns] in place to `max_norm` at most (0: not at all); norms [K] as they were.

    Frozen tensors of a slot get no gradient and add nothing to its norm.
    """
    slots.zero_frozen(gradients)
    norms = torch.linalg.vector_norm(gradients, dim=1)
    if max_norm > 0:
        gradients *= (max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]  # as torch.nn.utils.clip_grad_norm_
    return norms


def step(slots: Slots, gradients: Tensor, steps: SlotSteps, weight_decay: float) -> None:
    """Update every slot whose rate is not 0 by decoupled AdamW (Loshchilov & Hutter 2019).

    All memory is allocated before anything is changed: out of memory leaves the slots as they were.
    """
    first = slots.first_moment.lerp(gradients, 1 - BETAS[0])
    second = (slots.second_moment * BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
    denominator = (second / steps.second_corrections).sqrt_().add_(EPSILON)
    update = (
        (first / steps.first_corrections).div_(denominator).addcmul_(slots.weights, slots.decays, value=weight_decay)
    )
    slots.zero_frozen(update)
    update *= steps.learning_rates
    slots.weights -= update
    slots.first_moment.copy_(first)
    slots.second_moment.copy_(second)
