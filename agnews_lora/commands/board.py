"""A study as data frames, and its figures drawn from them."""

from pathlib import Path

import optuna
import pandas as pd

from agnews_lora.reporting import figures
from agnews_lora.search.study import Standing
from agnews_lora.tracking.runs import SweepRuns

DIMENSIONS = ("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate")
MIN_TRIALS_FOR_IMPORTANCE = 4


def trials_frame(rows: list[Standing]) -> pd.DataFrame:
    """One row a trial, in the columns that `reporting.figures` reads."""
    return pd.DataFrame(
        [
            {
                "trial": row.trial,
                "number": row.number,
                "state": row.state,
                "baseline": row.baseline,
                "accuracy": row.accuracy if row.accuracy is not None else float("nan"),
                "macro_f1": row.macro_f1,
                "loss": row.loss,
                "trainable_parameters": row.trainable_parameters,
                "targets": row.spec.targets if row.spec else None,
                "lora_r": row.spec.rank if row.spec else None,
                "lora_alpha": row.spec.alpha if row.spec else None,
                "lora_dropout": row.spec.dropout if row.spec else None,
                "learning_rate": row.spec.learning_rate if row.spec else None,
                "head": row.spec.head if row.spec else None,
                "run_id": row.run_id,
                "reason": row.reason,
            }
            for row in rows
        ]
    )


def leaderboard(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials, the best first: complete ones by accuracy and loss, then pruned ones, then the rest."""
    order = {"COMPLETE": 0, "PRUNED": 1}
    ranked = trials.assign(place=trials["state"].map(order).fillna(len(order)))
    ranked = ranked.sort_values(["place", "accuracy", "loss", "number"], ascending=[True, False, True, True])
    return ranked.drop(columns="place").reset_index(drop=True)


def draw(
    study: optuna.Study, trials: pd.DataFrame, runs: SweepRuns, budget: int, bound: float | None, folder: Path
) -> dict[str, Path]:
    """The study's figures as files in `folder`, by artifact name."""
    name = study.study_name
    drawn = {
        figure: folder / f"{figure}.png"
        for figure in (
            "optimization_history",
            "accuracy_against_parameters",
            "learning_curves",
            "parallel_coordinates",
            "parameter_importance",
        )
    }
    baseline = trials.loc[trials["baseline"] & (trials["state"] == "COMPLETE"), "accuracy"]
    figures.optimization_history(
        trials,
        f"{name}: optimisation history",
        drawn["optimization_history"],
        baseline=float(baseline.iloc[0]) if len(baseline) else None,
        bound=bound,
    )
    figures.accuracy_against_parameters(
        trials, budget, f"{name}: accuracy against size", drawn["accuracy_against_parameters"]
    )
    points = pd.concat([runs.curve(trial) for trial in trials["trial"]], ignore_index=True)
    figures.learning_curves(points, trials, f"{name}: learning curves", drawn["learning_curves"])
    figures.parallel_coordinates(trials, DIMENSIONS, f"{name}: configurations", drawn["parallel_coordinates"])
    figures.parameter_importance(_importances(study), f"{name}: what matters", drawn["parameter_importance"])
    return {path.name: path for path in drawn.values()}


def _importances(study: optuna.Study) -> dict[str, float]:
    """Importance of the parameters that all finished trials share; empty where too few trials tell."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len([trial for trial in complete if trial.params]) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in complete if trial.params))
    if len({trial.value for trial in complete}) == 1 or not shared:
        return {}
    return optuna.importance.get_param_importances(study, params=sorted(shared))
