"""The trials of a study as values: what each was, how it ended and what it scored."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search import study as study_keys
from agnews_lora.training.interface import Objective
from agnews_lora.training.metrics import unpacked

ENDED_BY_OTHERS: Final = "ended in the study by somebody else"
ENDED_STATES: Final = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}


def trial_name(trial: optuna.Trial | FrozenTrial) -> str:
    """`t0007`, or the name that the confirmation gave the trial (`t0007-s2`)."""
    return str(trial.user_attrs.get(study_keys.NAME) or f"t{trial.number:04d}")


@dataclass(frozen=True)
class TrialSummary:
    """One trial of a study.

    state: Optuna's; `FAIL` of a trial that somebody else ended, whatever they told the study. accuracy, macro_f1, loss:
    final, or the last ones of a trial that ended before. steps: the last one that was evaluated. rows_seen,
    train_seconds, eval_seconds, peak_memory_bytes: its costs; None until it has ended. enqueued: on top of the
    sweep's own. right: which validation rows a complete trial answered correctly [rows]; None where it is not known.
    """

    trial: str
    number: int
    state: str
    baseline: bool
    spec: TrialSpec | None
    accuracy: float | None
    macro_f1: float | None
    loss: float | None
    trainable_parameters: int | None
    seed: int | None
    run_id: str | None
    reason: str | None
    steps: int
    rows_seen: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    peak_memory_bytes: int | None = None
    enqueued: bool = False
    right: npt.NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_trial(cls, trial: FrozenTrial, objective: Objective = "accuracy") -> Self:
        """Read it from a trial of a study. A score that is not finite counts as none: JSON has no word for it.

        objective: the score that the study's values are.
        """
        attributes, reported = trial.user_attrs, trial.intermediate_values
        attributes = {key: value for key, value in attributes.items() if value is not None}
        driven = study_keys.IDENTITY not in attributes or attributes.keys() & {study_keys.SCORES, study_keys.REASON}
        by_others = trial.state.is_finished() and not driven
        state = TrialState.FAIL if by_others else trial.state
        value = trial.value if state is TrialState.COMPLETE else reported[max(reported)] if reported else None
        # Until it ends, and where others ended it, there is its value alone. Older studies have two more on their own.
        scores = {"macro_f1": attributes.get("macro_f1"), "loss": attributes.get("loss")} | {objective: value}
        scores |= attributes.get(study_keys.SCORES, {})
        answers = trial.system_attrs.get(f"{study_keys.RIGHT}{max(reported, default=0)}")
        rows = scores.get("rows") if state is TrialState.COMPLETE else None
        return cls(
            trial=trial_name(trial),
            number=trial.number,
            state=state.name,
            baseline=bool(attributes.get(study_keys.BASELINE)),
            spec=TrialSpec(**attributes[study_keys.SPEC]) if study_keys.SPEC in attributes else None,
            accuracy=_finite(scores.get("accuracy")),
            macro_f1=_finite(scores["macro_f1"]),
            loss=_finite(scores["loss"]),
            trainable_parameters=attributes.get(study_keys.TRAINABLE),
            seed=attributes.get(study_keys.SEED),
            run_id=attributes.get(study_keys.RUN_ID),
            reason=attributes.get(study_keys.REASON, ENDED_BY_OTHERS if by_others else None),
            steps=max(reported, default=0),
            enqueued=study_keys.ENQUEUED in attributes,
            right=unpacked(answers, int(rows)) if answers and rows else None,
            **attributes.get(study_keys.COSTS, {}),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where the answers to single rows have no place."""
        return {name: value for name, value in asdict(replace(self, right=None)).items() if name != "right"}

    def score(self, objective: Objective) -> float | None:
        """The score that a sweep searches by."""
        return self.accuracy if objective == "accuracy" else self.macro_f1


def summaries(study: optuna.Study) -> list[TrialSummary]:
    """All trials of a study that were ever started, by number."""
    objective = study_keys.objective_of(study)
    foreign = {trial.number for trial in study.added()} if isinstance(study, study_keys.SweepStudy) else ()
    return [
        TrialSummary.from_trial(trial, objective)
        for trial in study.get_trials(deepcopy=False)
        if trial.number not in foreign
        and (trial.user_attrs.get(study_keys.SPEC) or trial.state is not TrialState.WAITING)
    ]


def best_first(rows: Sequence[TrialSummary], objective: Objective) -> list[TrialSummary]:
    """The finished trials by final score; ties go to the lower loss, then to the earlier trial."""

    def rank(row: TrialSummary) -> tuple[float, float, int]:
        score = row.score(objective)
        assert score is not None, "Optuna completes no trial without a value"
        return -score, math.inf if row.loss is None else row.loss, row.number

    return sorted((row for row in rows if row.state == "COMPLETE"), key=rank)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
