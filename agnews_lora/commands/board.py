"""A study as data frames, and its figures drawn from them."""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Final

import optuna
import pandas as pd

from agnews_lora.commands.markdown import THUMBNAILS
from agnews_lora.reporting import figures
from agnews_lora.reporting.figures import slot_occupancy, stretches, thumbnail
from agnews_lora.search.confirmation import Confirmed
from agnews_lora.search.standings import Standing, baseline_of, count_ended
from agnews_lora.tracking.runs import SweepRuns

DIMENSIONS = ("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate")
MIN_TRIALS_FOR_IMPORTANCE = 4

# Figures of a study, by file name, with what they show.
FIGURES: Final = {
    "optimization_history.png": "Optimisation history",
    "accuracy_against_parameters.png": "Accuracy against size",
    "learning_curves.png": "Learning curves",
    "parallel_coordinates.png": "Configurations",
    "parameter_importance.png": "What matters",
    "slot_occupancy.png": "Slots over time",
}


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


def confirmation_frame(rounds: list[Confirmed]) -> pd.DataFrame:
    """One row a confirmed trial, the chosen one first. runs: JSON, a list of `{trial, seed, accuracy}`."""
    return pd.DataFrame(
        [
            {
                "trial": row.own.trial,
                "seeds": len(row.runs),
                "failed": row.num_failed,
                "own_accuracy": row.own.accuracy,
                "mean_accuracy": row.mean_accuracy,
                "std_accuracy": row.std_accuracy,
                "drop": row.drop,
                "chosen": place == 0,
                "runs": json.dumps(
                    [{"trial": run.trial, "seed": run.seed, "accuracy": run.accuracy} for run in row.runs]
                ),
            }
            for place, row in enumerate(rounds)
        ]
    )


def confirmation_metrics(chosen: Confirmed) -> dict[str, float]:
    """What the parent run says of the chosen trial's repetitions."""
    spread = {} if chosen.std_accuracy is None else {"confirmation/std_accuracy": chosen.std_accuracy}
    return {"confirmation/mean_accuracy": chosen.mean_accuracy, "confirmation/drop": chosen.drop, **spread}


def result_metrics(rows: Sequence[Standing], winner: Standing | None) -> dict[str, float]:
    """What the parent run says of its trials: counts by state, the best one's scores, the baseline's, and the gain."""
    found: dict[str, float | None] = {f"trials/{word}": count for word, count in count_ended(rows).items()}
    baseline = row.accuracy if (row := baseline_of(rows)) else None
    if winner is not None and winner.accuracy is not None:
        found |= {
            "best/accuracy": winner.accuracy,
            "best/macro_f1": winner.macro_f1,
            "best/loss": winner.loss,
            "best/trainable_parameters": winner.trainable_parameters,
            "baseline/accuracy": baseline,
            "best/gain": None if baseline is None else winner.accuracy - baseline,
        }
    return {name: value for name, value in found.items() if value is not None and isfinite(value)}


def confirmation_tags(chosen: Confirmed) -> dict[str, str]:
    """What a registered version says of the repetitions of its trial."""
    spread = {} if chosen.std_accuracy is None else {"confirmation_std_accuracy": str(chosen.std_accuracy)}
    return {
        "confirmation_seeds": str(len(chosen.runs)),
        "confirmation_mean_accuracy": str(chosen.mean_accuracy),
        **spread,
    }


def leaderboard(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials, the best first: complete ones by accuracy and loss, then pruned ones, then the rest."""
    order = {"COMPLETE": 0, "PRUNED": 1}
    ranked = trials.assign(place=trials["state"].map(order).fillna(len(order)))
    ranked = ranked.sort_values(["place", "accuracy", "loss", "number"], ascending=[True, False, True, True])
    return ranked.drop(columns="place").reset_index(drop=True)


def draw(
    study: optuna.Study,
    trials: pd.DataFrame,
    repeats: Sequence[Standing],
    runs: SweepRuns,
    budget: int,
    bound: float | None,
    folder: Path,
) -> dict[str, Path]:
    """The study's figures as files in `folder`, by artifact name: those of `FIGURES`. repeats: of the confirmation."""
    name = study.study_name
    drawn = {figure: folder / figure for figure in FIGURES}
    baseline = trials.loc[trials["baseline"] & (trials["state"] == "COMPLETE"), "accuracy"]
    figures.optimization_history(
        trials,
        f"{name}: optimisation history",
        drawn["optimization_history.png"],
        baseline=float(baseline.iloc[0]) if len(baseline) else None,
        bound=bound,
    )
    figures.accuracy_against_parameters(
        trials, budget, f"{name}: accuracy against size", drawn["accuracy_against_parameters.png"]
    )
    points = pd.concat([runs.curve(trial) for trial in trials["trial"]], ignore_index=True)
    figures.learning_curves(points, trials, f"{name}: learning curves", drawn["learning_curves.png"])
    figures.parallel_coordinates(trials, DIMENSIONS, f"{name}: configurations", drawn["parallel_coordinates.png"])
    figures.parameter_importance(_importances(study), f"{name}: what matters", drawn["parameter_importance.png"])
    states = dict(zip(trials["trial"], trials["state"], strict=True)) | {row.trial: row.state for row in repeats}
    intervals = stretches({trial: runs.times(trial) for trial in states}, states)
    slot_occupancy(intervals, f"{name}: which trials trained when", drawn["slot_occupancy.png"])
    return drawn


def thumbnails(drawn: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Small copies of figures, made in `folder`, by artifact name."""
    small = {f"{THUMBNAILS}/{name}": folder / THUMBNAILS / name for name in drawn}
    for (name, path), to in zip(drawn.items(), small.values(), strict=True):
        assert name.endswith(".png")
        thumbnail(path, to)
    return small


def _importances(study: optuna.Study) -> dict[str, float]:
    """Importance of the parameters that all finished trials share; empty where too few trials tell."""
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len([trial for trial in complete if trial.params]) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in complete if trial.params))
    if len({trial.value for trial in complete}) == 1 or not shared:
        return {}
    return optuna.importance.get_param_importances(study, params=sorted(shared))
