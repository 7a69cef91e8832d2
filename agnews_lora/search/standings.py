"""How the trials of a study stand, as a reader wants it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search.study import (
    BASELINE,
    LOSS,
    MACRO_F1,
    NAME,
    REASON,
    RUN_ID,
    SEED,
    SPEC,
    TRAINABLE,
)


@dataclass(frozen=True)
class Standing:
    """One trial of a study as a reader wants it. accuracy: final, or the last reported one of a pruned trial.

    seed: of its initialisation, dropout and data order; None where an earlier version of this package ran it.
    """

    trial: str
    number: int
    state: str
    spec: TrialSpec | None
    baseline: bool
    accuracy: float | None
    loss: float | None
    macro_f1: float | None
    trainable_parameters: int | None
    run_id: str | None
    reason: str | None
    seed: int | None = None


def trial_name(number: int) -> str:
    """`t0007`."""
    return f"t{number:04d}"


def name_of(trial: optuna.Trial | FrozenTrial) -> str:
    """What a trial is called: by its number, or by the name that the confirmation gave it (`t0007-s2`)."""
    return str(trial.user_attrs.get(NAME) or trial_name(trial.number))


def standings(study: optuna.Study) -> list[Standing]:
    """All trials that were ever started, by number."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if SPEC not in attributes and trial.state is TrialState.WAITING:
            continue
        reported = trial.intermediate_values
        value = trial.value if trial.state is TrialState.COMPLETE else reported[max(reported)] if reported else None
        rows.append(
            Standing(
                trial=name_of(trial),
                number=trial.number,
                state=trial.state.name,
                spec=TrialSpec(**attributes[SPEC]) if SPEC in attributes else None,
                baseline=bool(attributes.get(BASELINE)),
                accuracy=value,
                loss=attributes.get(LOSS),
                macro_f1=attributes.get(MACRO_F1),
                trainable_parameters=attributes.get(TRAINABLE),
                run_id=attributes.get(RUN_ID),
                reason=attributes.get(REASON),
                seed=attributes.get(SEED),
            )
        )
    return rows


def baseline_of(rows: Sequence[Standing]) -> Standing | None:
    """The experiment's own configuration, where it has finished."""
    return next((row for row in rows if row.baseline and row.state == "COMPLETE"), None)


def count_ended(rows: Sequence[Standing]) -> dict[str, int]:
    """How many trials ended how: `complete`, `pruned` and `failed`."""
    states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    return {word: sum(row.state == state for row in rows) for word, state in states.items()}


def best_first(rows: list[Standing]) -> list[Standing]:
    """The finished trials by final accuracy; ties go to the lower loss, then to the earlier trial."""

    def rank(row: Standing) -> tuple[float, float, int]:
        assert row.accuracy is not None, "Optuna completes no trial without a value"
        return -row.accuracy, math.inf if row.loss is None or math.isnan(row.loss) else row.loss, row.number

    return sorted((row for row in rows if row.state == "COMPLETE"), key=rank)


def best_of(rows: list[Standing]) -> Standing | None:
    """The first of `best_first`."""
    return next(iter(best_first(rows)), None)
