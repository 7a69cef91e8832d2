"""The search space under the budget: what a trial may be asked for, so that nothing infeasible ever is.

Ranks are bounded preset by preset (and head by head, where both are searched): every range is static, so that a study
can be resumed and the sampler learns. Every function takes the sweep's space, the base's shape and the budget, and
raises BudgetError where no preset fits.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from agnews_lora.adapters.budget import feasible_ranks, max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space

_Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


def distributions(space: Space, shape: ModelShape, budget: int) -> dict[str, _Distribution]:
    """{name: range} of every parameter that some trial is asked for.

    `targets` offers the presets that fit with a searched head. `rank_<preset>` is asked for the preset that was drawn;
    where both heads are searched it is `rank_<preset>_<head>`, and `head` is asked for the presets that fit with either
    (a preset that fits with one alone has that one).
    """
    ranks = feasible_ranks(list(space.targets), list(space.heads), shape, budget)
    presets = tuple(dict.fromkeys(preset for preset, _ in ranks))
    parameters: dict[str, _Distribution] = {"targets": CategoricalDistribution(presets)}
    if len(ranks) > len(presets):
        parameters["head"] = CategoricalDistribution(space.heads)
    for (preset, head), highest in ranks.items():
        parameters[_rank_name(preset, head, space)] = IntDistribution(1, highest)
    parameters["alpha_ratio"] = CategoricalDistribution(space.alpha_ratio)
    parameters["dropout"] = FloatDistribution(space.dropout.low, space.dropout.high)
    parameters["learning_rate"] = FloatDistribution(space.learning_rate.low, space.learning_rate.high, log=True)
    return parameters


def shared(space: Space, shape: ModelShape, budget: int) -> dict[str, BaseDistribution]:
    """Those of `distributions` that every trial is asked for, whatever preset it draws."""
    parameters = distributions(space, shape, budget)
    names = ["targets", "alpha_ratio", "dropout", "learning_rate"]
    if "head" in parameters and all(len(_heads(preset, space, parameters)) != 1 for preset in space.targets):
        names.append("head")
    return {name: parameters[name] for name in names}


def suggest(trial: BaseTrial, space: Space, shape: ModelShape, budget: int) -> TrialSpec:
    """Ask a trial for its configuration; what comes back fits the budget."""
    parameters = distributions(space, shape, budget)

    def ask(name: str) -> Any:
        match parameters[name]:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(name, choices)
            case IntDistribution(low=low, high=high):
                return trial.suggest_int(name, low, high)
            case FloatDistribution(low=low, high=high, log=log):
                return trial.suggest_float(name, low, high, log=log)

    targets = ask("targets")
    heads = _heads(targets, space, parameters)
    head = ask("head") if len(heads) > 1 else heads[0]
    rank = ask(_rank_name(targets, head, space))
    return TrialSpec(
        targets=targets,
        rank=rank,
        alpha=float(ask("alpha_ratio") * rank),
        dropout=ask("dropout"),
        learning_rate=ask("learning_rate"),
        head=head,
    )


def smallest(space: Space, shape: ModelShape, budget: int) -> dict[str, Any]:
    """The lowest value, or the first choice, of every parameter."""
    return {
        name: given.choices[0] if isinstance(given, CategoricalDistribution) else given.low
        for name, given in distributions(space, shape, budget).items()
    }


def parameters_of(spec: TrialSpec, space: Space, shape: ModelShape, budget: int) -> dict[str, Any]:
    """The parameters to enqueue so that `suggest` gives exactly this configuration.

    Raises:
        ValueError: the configuration lies outside the space.
    """
    faults = outside(spec, space, shape, budget)
    if faults:
        raise ValueError(f"{spec} lies outside the space: {'; '.join(faults)}")
    heads = _heads(spec.targets, space, distributions(space, shape, budget))
    head = {"head": spec.head} if len(heads) > 1 else {}
    return {
        "targets": spec.targets,
        **head,
        _rank_name(spec.targets, spec.head, space): spec.rank,
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


def describe(space: Space, shape: ModelShape, budget: int) -> dict[str, list[Any]]:
    """`distributions` as JSON: the choices of a categorical parameter, else [low, high]."""
    return {
        name: list(given.choices) if isinstance(given, CategoricalDistribution) else [given.low, given.high]
        for name, given in distributions(space, shape, budget).items()
    }


def _heads(preset: str, space: Space, parameters: dict[str, _Distribution]) -> list[str]:
    """The searched heads that a preset fits with."""
    return [head for head in space.heads if _rank_name(preset, head, space) in parameters]


def _rank_name(preset: str, head: str, space: Space) -> str:
    return f"rank_{preset}" if len(space.heads) == 1 else f"rank_{preset}_{head}"
