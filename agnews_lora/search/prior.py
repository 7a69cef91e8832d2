"""Configurations that are known to be good, brought into a space: a search tries them first, and learns from them.

- Hu et al. 2021 (LoRA): table 9 has rank 8 on query and value, alpha 8, and rates of 4e-4 to 5e-4 for RoBERTa base, of
  2e-4 to 4e-4 for large; by table 5, lower ranks on all four matrices of the attention are better than higher ones on
  two, at equal parameters.
- Dettmers et al. 2023 (QLoRA), Biderman et al. 2024: all linear layers matter more than the rank; alpha = 2 r.
- Schulman et al. 2025 (LoRA without regret): the feed-forward blocks matter most, at ten times the rate of full
  fine-tuning (2e-5 to 5e-5 for RoBERTa base), or fifteen times in short trainings.
- Hayou et al. 2024 (LoRA+): B learns at about 16 times the rate of A, which under AdamW is alpha times 16. Tried where
  a large rank is spread over all matrices of the attention.
- The best adapter that was found for RoBERTa base on AG News has r = 2 on all linear layers, alpha 12, rate 2e-4.
"""

import math
from dataclasses import dataclass
from typing import Final

from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.search.space import heads_that_fit, outside


@dataclass(frozen=True)
class _Known:
    """rank: None for the largest that fits. rate: learning rate for RoBERTa base, of hidden size 768."""

    source: str
    targets: str
    rank: int | None
    alpha_ratio: int
    dropout: float
    rate: float


_RATE: Final = 4.5e-4
_KNOWN: Final = (
    _Known("Schulman et al. 2025", "ffn", None, 2, 0.0, 7.5e-4),
    _Known("Dettmers et al. 2023", "all-linear", None, 2, 0.1, _RATE),
    _Known("Hayou et al. 2024", "qkvo", None, 16, 0.0, _RATE),
    _Known("Hu et al. 2021, table 9", "qv", 8, 1, 0.0, _RATE),
    _Known("Hu et al. 2021, table 5", "qkvo", None, 1, 0.0, _RATE),
    _Known("best of RoBERTa base on AG News", "all-linear", 2, 6, 0.0, 2e-4),
)


def rate_for(shape: ModelShape, rate: float = _RATE) -> float:
    """A learning rate for RoBERTa base, scaled by the hidden size to the power of -1.5.

    This takes the mean rate of Hu et al. for RoBERTa base (4.5e-4) to theirs for large (2.9e-4), and to 1.3e-3 for
    MiniLM, of hidden size 384.
    """
    return rate * (768 / shape.hidden_size) ** 1.5


def known_good(space: Space, shape: ModelShape, budget: int, baseline: TrialSpec, at_most: int) -> dict[TrialSpec, str]:
    """{configuration: its source}, the most promising first, each once, inside the space and other than the baseline.

    The rank is cut to the largest that fits; learning rate and dropout to their ranges; the alpha ratio is the nearest
    choice by its logarithm. What the space or the budget has no preset for is left out.
    """
    found = {baseline: ""}
    for known in _KNOWN:
        heads = heads_that_fit(known.targets, space, shape, budget) if known.targets in space.targets else []
        if not heads:
            continue
        highest = max_rank(known.targets, heads[0], shape, budget)
        rank = min(known.rank or highest, highest)
        distances = {choice: abs(math.log(choice / known.alpha_ratio)) for choice in space.alpha_ratio}
        ratio = min(distances, key=distances.__getitem__)
        spec = TrialSpec(
            targets=known.targets,
            rank=rank,
            alpha=float(ratio * rank),
            dropout=min(max(known.dropout, space.dropout.low), space.dropout.high),
            learning_rate=min(max(rate_for(shape, known.rate), space.learning_rate.low), space.learning_rate.high),
            head=heads[0],
        )
        if not outside(spec, space, shape, budget):
            found.setdefault(spec, known.source)
    return dict(list(found.items())[1 : at_most + 1])
