"""The adapter configuration of a trial, and the modules of a model that it adapts.

Imports no torch: the budget is counted from these alone.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Family = Literal["roberta", "bert"]

# The matrices of one encoder layer, by their path below `encoder.layer.<i>.`. The paths are the same in Hugging Face's
# RoBERTa and BERT. Full paths, since the bare suffix `output.dense` would also match `attention.output.dense`.
QUERY: Final = "attention.self.query"
KEY: Final = "attention.self.key"
VALUE: Final = "attention.self.value"
ATTENTION_OUTPUT: Final = "attention.output.dense"
FFN_IN: Final = "intermediate.dense"
FFN_OUT: Final = "output.dense"

PRESETS: Final[dict[str, tuple[str, ...]]] = {
    "qk": (QUERY, KEY),
    "qv": (QUERY, VALUE),
    "qkv": (QUERY, KEY, VALUE),
    "qkvo": (QUERY, KEY, VALUE, ATTENTION_OUTPUT),
    "ffn": (FFN_IN, FFN_OUT),
    "all-linear": (QUERY, KEY, VALUE, ATTENTION_OUTPUT, FFN_IN, FFN_OUT),
}
HEADS: Final = ("full", "out_proj")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the count of trainable parameters depends on.

    `roberta` carries a two-layer classification head (`dense`, `out_proj`), `bert` one linear layer on its pooler.
    """

    family: Family
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_labels: int


@dataclass(frozen=True)
class TrialSpec:
    """One adapter configuration.

    Args:
        targets: name of a preset in `PRESETS`.
        rank: LoRA r.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        dropout: probability on the adapter's input.
        learning_rate: peak of the schedule.
        head: part of the classifier that trains, one of `HEADS`.

    Raises:
        ValueError: a value that no adapter can have.
    """

    targets: str
    rank: int
    alpha: float
    dropout: float
    learning_rate: float
    head: str = "full"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank >= 1 must hold, but got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"0 <= dropout < 1 must hold, but got {self.dropout}")
        if self.alpha <= 0 or self.learning_rate < 0:
            raise ValueError(f"alpha > 0 and learning_rate >= 0 must hold, but got {self.alpha}, {self.learning_rate}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `TrialSpec(**d)` is its inverse."""
        return asdict(self)

    def __str__(self) -> str:
        head = "" if self.head == "full" else f" head={self.head}"
        scale = f"r={self.rank} alpha={self.alpha:g}"
        return f"{self.targets} {scale} dropout={self.dropout:.3g} lr={self.learning_rate:.3g}{head}"


def module_shape(module: str, shape: ModelShape) -> tuple[int, int]:
    """(out_features, in_features) of one adaptable matrix of an encoder layer."""
    if module == FFN_IN:
        return shape.intermediate_size, shape.hidden_size
    if module == FFN_OUT:
        return shape.hidden_size, shape.intermediate_size
    return shape.hidden_size, shape.hidden_size


def target_pattern(targets: str) -> str:
    """Regular expression that a module's whole name matches if and only if the preset adapts it.

    For PEFT's `target_modules`: encoder layers only, never the pooler or the classifier, and `output.dense` of the
    feed-forward block without `attention.output.dense`.
    """
    modules = "|".join(re.escape(module) for module in PRESETS[targets])
    return rf".*\bencoder\.layer\.\d+\.({modules})"
