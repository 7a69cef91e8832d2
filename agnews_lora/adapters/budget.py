"""The hard budget: the exact number of trainable parameters of a trial, in pure integers.

Equal to PEFT's own count (`model.get_nb_trainable_parameters()`) for every preset, rank and head: a LoRA pair on a
matrix [out, in] adds rank · (in + out) parameters (Hu et al. 2021, section 4.1), and the classifier trains beside it.
"""

from dataclasses import replace
from math import prod

from agnews_lora.adapters.spec import (
    HEADS,
    PRESETS,
    ModelShape,
    TrialSpec,
    head_shapes,
    is_adaptable,
    module_shape,
    target_modules,
)
from agnews_lora.errors import BudgetError


def head_parameters(head: str, shape: ModelShape) -> int:
    """Trainable parameters of the classifier: all of it (`full`), or its last layer alone (`out_proj`)."""
    layout = shape.layout
    return sum(prod(sizes) for name, sizes in head_shapes(shape).items() if not layout.is_frozen(name, head))


def parameters_per_rank(preset: str, shape: ModelShape) -> int:
    """Parameters of one more rank: in + out, summed over the adapted matrices of all layers.

    Raises:
        ConfigError: the base's family cannot adapt the preset.
    """
    return shape.num_layers * sum(sum(module_shape(module, shape)) for module in target_modules(preset, shape.family))


def trainable_parameters(spec: TrialSpec, shape: ModelShape) -> int:
    """Exact number of trainable parameters of a trial, classifier head included."""
    return head_parameters(spec.head, shape) + spec.rank * parameters_per_rank(spec.targets, shape)


def max_rank(preset: str, head: str, shape: ModelShape, budget: int) -> int:
    """The largest rank of a preset that fits the budget; 0 where even rank 1 does not fit, or the family lacks it."""
    if not is_adaptable(preset, shape.family):
        return 0
    room = budget - head_parameters(head, shape)
    return max(0, room // parameters_per_rank(preset, shape))


def require_within_budget(spec: TrialSpec, shape: ModelShape, budget: int) -> int:
    """Count a trial's trainable parameters, and refuse more than the budget.

    Raises:
        BudgetError: more than `budget`; the message names the count, the budget and the largest rank that fits.
    """
    count = trainable_parameters(spec, shape)
    if count > budget:
        raise BudgetError(breach(spec, shape, budget, count))
    return count


def breach(spec: TrialSpec, shape: ModelShape, budget: int, count: int) -> str:
    """Describe a breach of the budget: the numbers, and what to do."""
    if fits := max_rank(spec.targets, spec.head, shape, budget):
        remedy = f"Lower the rank: the largest rank that fits is {fits}"
    else:
        other = "`head: out_proj`" if max_rank(spec.targets, "out_proj", shape, budget) else "another preset"
        needed = trainable_parameters(replace(spec, rank=1), shape)
        remedy = f"Take {other}, or a budget of at least {needed:,}: no rank of it fits"
    configuration = f"rank {spec.rank} on {spec.targets}, head {spec.head}"
    return f"{count:,} trainable parameters > budget {budget:,} ({configuration}). {remedy}"


def feasible_ranks(presets: list[str], heads: list[str], shape: ModelShape, budget: int) -> dict[tuple[str, str], int]:
    """{(preset, head): largest rank} of every combination that fits, in the order given.

    Raises:
        BudgetError: none of them fits.
    """
    ranks = {(preset, head): max_rank(preset, head, shape, budget) for preset in presets for head in heads}
    feasible = {key: rank for key, rank in ranks.items() if rank}
    if not feasible:
        adaptable = [preset for preset in presets if is_adaptable(preset, shape.family)]

        def cheapest(head: str) -> int:
            return head_parameters(head, shape) + min(parameters_per_rank(preset, shape) for preset in adaptable)

        needed, alone = min(map(cheapest, heads)), min(head_parameters(head, shape) for head in heads)
        remedy = "Set `heads: [out_proj]` in `space`"
        if cheapest("out_proj") > budget:
            remedy = (
                f"Offer a smaller preset in `space.targets` (presets: {', '.join(PRESETS)}; heads: {', '.join(HEADS)})"
            )
        raise BudgetError(
            f"Cannot search: budget {budget:,} fits no adapter. The cheapest of {', '.join(adaptable)} with head "
            f"{' or '.join(heads)} needs {needed:,} trainable parameters at rank 1, {alone:,} of them in the head. "
            f"{remedy}, or raise `budget` to at least {needed:,}."
        )
    return feasible
