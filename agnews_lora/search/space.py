"""The search space under the budget: what a trial may be asked for, so that nothing infeasible ever is.

The rank is searched as `rank_share`, a share of the largest rank that fits the budget with the trial's preset and head:
one parameter that all trials have, which a sampler can learn from whatever the preset. Every range is static, so that a
study can be resumed. Every function takes the sweep's space, the base's shape and the budget, and raises BudgetError
where no preset fits.
"""

import math
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import BaseTrial, FixedTrial

from agnews_lora.adapters.budget import feasible_ranks, max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space

_MOST_SHARES = 1e6  # of the largest rank, in what a person enqueued: the rank can still be computed

_Distribution = CategoricalDistribution | FloatDistribution


def distributions(space: Space, shape: ModelShape, budget: int) -> dict[str, _Distribution]:
    """{name: range} of every parameter that some trial is asked for.

    `targets` offers the presets that fit with a searched head. `head` is asked for the presets that fit with both heads
    (a preset that fits with one alone has that one).
    """
    ranks = feasible_ranks(list(space.targets), list(space.heads), shape, budget)
    presets = tuple(dict.fromkeys(preset for preset, _ in ranks))
    heads = {"head": CategoricalDistribution(space.heads)} if len(ranks) > len(presets) else {}
    return {
        "targets": CategoricalDistribution(presets),
        **heads,
        "rank_share": FloatDistribution(0.0, 1.0),
        "alpha_ratio": CategoricalDistribution(space.alpha_ratio),
        "dropout": FloatDistribution(space.dropout.low, space.dropout.high),
        "learning_rate": FloatDistribution(space.learning_rate.low, space.learning_rate.high, log=True),
    }


def shared(space: Space, shape: ModelShape, budget: int) -> dict[str, BaseDistribution]:
    """Those of `distributions` that every trial is asked for, whatever preset it draws."""
    asked = distributions(space, shape, budget)
    always = all(len(heads_that_fit(preset, space, shape, budget)) != 1 for preset in space.targets)
    return {name: given for name, given in asked.items() if name != "head" or always}


def suggest(trial: BaseTrial, space: Space, shape: ModelShape, budget: int) -> TrialSpec:
    """Ask a trial for its configuration; what comes back fits the budget."""
    parameters = distributions(space, shape, budget)

    def ask(name: str) -> Any:
        match parameters[name]:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(name, choices)
            case FloatDistribution(low=low, high=high, log=log):
                return trial.suggest_float(name, low, high, log=log)

    targets = ask("targets")
    heads = heads_that_fit(targets, space, shape, budget)
    head = ask("head") if len(heads) > 1 else heads[0]
    rank = rank_of(ask("rank_share"), max_rank(targets, head, shape, budget))
    return TrialSpec(
        targets=targets,
        rank=rank,
        alpha=float(ask("alpha_ratio") * rank),
        dropout=ask("dropout"),
        learning_rate=ask("learning_rate"),
        head=head,
    )


def rank_of(share: float, highest: int) -> int:
    """The rank that a share of the largest rank stands for: share * highest, rounded up, and at least 1.

    Every rank up to the highest stands for an equal part of (0, 1]. A share above 1, which a person enqueued, stands
    for a rank above the highest: the budget refuses it.
    """
    return max(1, math.ceil(share * highest - 1e-9))  # 3 / 11 * 11 may come out a little above 3


def smallest(space: Space, shape: ModelShape, budget: int) -> dict[str, Any]:
    """The lowest value, or the first choice, of every parameter."""
    return {
        name: given.choices[0] if isinstance(given, CategoricalDistribution) else given.low
        for name, given in distributions(space, shape, budget).items()
    }


def completed(given: Mapping[str, Any], space: Space, shape: ModelShape, budget: int) -> TrialSpec:
    """The configuration of parameters without `faults`, completed by the smallest values."""
    return suggest(FixedTrial(smallest(space, shape, budget) | dict(given)), space, shape, budget)


def parameters_of(spec: TrialSpec, space: Space, shape: ModelShape, budget: int) -> dict[str, Any]:
    """Parameters to enqueue, with which `suggest` gives exactly this configuration.

    Raises:
        ValueError: the configuration lies outside the space.
    """
    faults = outside(spec, space, shape, budget)
    if faults:
        raise ValueError(f"{spec} lies outside the space: {'; '.join(faults)}")
    heads = heads_that_fit(spec.targets, space, shape, budget)
    head = {"head": spec.head} if len(heads) > 1 else {}
    return {
        "targets": spec.targets,
        **head,
        "rank_share": spec.rank / max_rank(spec.targets, spec.head, shape, budget),
        "alpha_ratio": int(spec.alpha / spec.rank),
        "dropout": spec.dropout,
        "learning_rate": spec.learning_rate,
    }


def outside(spec: TrialSpec, space: Space, shape: ModelShape, budget: int) -> list[str]:
    """Why a configuration lies outside the space, a line each; empty where it lies inside."""
    ratio, faults = spec.alpha / spec.rank, []
    if spec.targets not in space.targets:
        faults.append(f"targets {spec.targets} is not among {', '.join(space.targets)}")
    if spec.head not in space.heads:
        faults.append(f"head {spec.head} is not among {', '.join(space.heads)}")
    highest = max_rank(spec.targets, spec.head, shape, budget)
    if spec.rank > highest:
        faults.append(f"rank {spec.rank} is above {highest}, the largest that fits the budget {budget:,}")
    if ratio not in space.alpha_ratio:
        faults.append(f"alpha / rank {ratio:g} is not among {', '.join(map(str, space.alpha_ratio))}")
    for name, value, limits in (
        ("dropout", spec.dropout, space.dropout),
        ("learning_rate", spec.learning_rate, space.learning_rate),
    ):
        if not limits.low <= value <= limits.high:
            faults.append(f"{name} {value:g} is not within {limits.low:g} to {limits.high:g}")
    return faults


def faults(given: Mapping[str, Any], space: Space, shape: ModelShape, budget: int) -> list[str]:
    """Why no trial can have the parameters that a person enqueued, a line each; empty where one can.

    A rank above the highest is none of them: the budget refuses it.
    """
    known, found = distributions(space, shape, budget), []
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match known.get(name):
            case None:
                found.append(f"{name} ({value!r}) is no parameter of the space, which has {', '.join(known)}")
            case CategoricalDistribution(choices=choices):
                if isinstance(value, bool) or value not in choices:
                    found.append(f"{name} {value!r} is not among {', '.join(map(repr, choices))}")
            case FloatDistribution(low=low, high=high):
                highest = _MOST_SHARES if name == "rank_share" else high
                if not number or not low <= value <= highest:
                    found.append(f"{name} {value!r} is no number within {low:g} to {high:g}")
    both = not found and {"head", "targets"} <= given.keys()
    if both and given["head"] not in heads_that_fit(given["targets"], space, shape, budget):
        found.append(f"head {given['head']!r} does not fit the budget with targets {given['targets']}")
    return found


def describe(space: Space, shape: ModelShape, budget: int) -> dict[str, list[Any]]:
    """`distributions` as JSON: the choices of a categorical parameter, else [low, high]."""
    return {
        name: list(given.choices) if isinstance(given, CategoricalDistribution) else [given.low, given.high]
        for name, given in distributions(space, shape, budget).items()
    }


def heads_that_fit(preset: str, space: Space, shape: ModelShape, budget: int) -> list[str]:
    """The searched heads that a preset fits with."""
    return [head for head in space.heads if max_rank(preset, head, shape, budget) > 0]
