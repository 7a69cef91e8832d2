"""The adapter configuration of a trial, and the modules of a model that it adapts.

Imports no torch: the budget is counted from these alone.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from agnews_lora.adapters.families import (
    ATTENTION_OUTPUT,
    FFN_IN,
    FFN_OUT,
    KEY,
    LAYOUTS,
    QUERY,
    VALUE,
    Family,
    Layout,
)
from agnews_lora.errors import ConfigError

# The roles that each preset adapts in every encoder layer.
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
    """The sizes that the count of trainable parameters depends on."""

    family: Family
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_labels: int

    @property
    def layout(self) -> Layout:
        """Where the family's modules lie."""
        return LAYOUTS[self.family]


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


def is_adaptable(preset: str, family: Family) -> bool:
    """Tell whether a family has the matrices of a preset: a fused one is adapted whole or not at all."""
    layout, roles = LAYOUTS[family], PRESETS[preset]
    touched = {layout.modules[role] for role in roles}
    return all(role in roles for role, path in layout.modules.items() if path in touched)


def target_modules(preset: str, family: Family) -> tuple[str, ...]:
    """Paths below an encoder layer of the modules that a preset adapts.

    Raises:
        ConfigError: the family has some of them in one fused matrix with others.
    """
    modules = LAYOUTS[family].modules
    if not is_adaptable(preset, family):
        others = [other for other in PRESETS if is_adaptable(other, family)]
        raise ConfigError(
            f"Cannot adapt {preset} alone on {family}: its query, key and value are one matrix ({modules[QUERY]}). "
            f"Take targets {', '.join(others[:-1])} or {others[-1]}."
        )
    return tuple(dict.fromkeys(modules[role] for role in PRESETS[preset]))


def module_shape(module: str, shape: ModelShape) -> tuple[int, int]:
    """(out_features, in_features) of one adaptable matrix of an encoder layer, by its path."""
    layout = shape.layout
    out_features = in_features = shape.hidden_size
    if module == layout.modules[FFN_IN]:
        out_features = shape.intermediate_size
    if module == layout.modules[FFN_OUT]:
        in_features = shape.intermediate_size
    return out_features * layout.stacked.get(module, 1), in_features


def head_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the classifier's tensors, in its layers' order."""
    return {name: tuple(getattr(shape, size) for size in sizes) for name, sizes in shape.layout.head.items()}


def target_pattern(preset: str, family: Family) -> str:
    """Regular expression that a module's whole name matches if and only if the preset adapts it.

    For PEFT's `target_modules`: encoder layers only, never the pooler or the classifier, and `output.dense` of the
    feed-forward block without `attention.output.dense`.
    """
    modules = "|".join(re.escape(module) for module in target_modules(preset, family))
    return rf".*\b{re.escape(LAYOUTS[family].layers)}\.\d+\.({modules})"
