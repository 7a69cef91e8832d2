"""AdamW over slots: one update for all, each with its own rate, step and clipping."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agnews_lora.training.multilora.slots import Slots

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def linear_rate(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate in step `step`, counted from 0: transformers' linear schedule with warm-up."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass(frozen=True)
class SlotSteps:
    """What differs between the slots' steps, each [K, 1]: learning rate (0: no step), and what the moments are too
    small by, 1 - beta^step (step from 1)."""

    learning_rates: Tensor
    first_corrections: Tensor
    second_corrections: Tensor

    @classmethod
    def of(cls, rates: Sequence[float], numbers: Sequence[int], device: torch.device) -> "SlotSteps":
        """From each slot's learning rate and the number of its step, in fp64: in fp32 1 - beta loses four digits."""
        corrections = [[1 - beta**number for number in numbers] for beta in BETAS]
        return cls(*torch.tensor([rates, *corrections], dtype=torch.float32).to(device).unsqueeze(-1))


def clip(slots: Slots, gradients: Tensor, max_norm: float) -> Tensor:
    """Scale each slot's gradients [K, columns] in place to `max_norm` at most (0: not at all); norms [K] as they were.

    What a slot does not train gets no gradient, and none of the norm.
    """
    slots.zero_frozen(gradients)
    norms = torch.linalg.vector_norm(gradients, dim=1)
    if max_norm > 0:
        gradients *= (max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]  # as torch.nn.utils.clip_grad_norm_
    return norms


def step(slots: Slots, gradients: Tensor, steps: SlotSteps, weight_decay: float) -> None:
    """One decoupled AdamW update (Loshchilov & Hutter 2019) of every slot whose rate is not 0.

    All that needs memory is computed before anything is changed: out of memory leaves the slots as they were.
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
