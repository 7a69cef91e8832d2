"""Figures that the runs do not have: of a sweep that is under way, and the winner's training, which only this shows."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agnews_lora.reporting import figures
from agnews_lora.reporting.canvas import BLUE, GREY, LABEL_SIZE, TICK_SIZE, VERMILION, WIDTH_INCHES, accuracy_axis, save
from agnews_lora.reporting.report import gallery
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.winner import calibration, confusion_matrix

HEIGHT_INCHES = 3.8
DPI = 180
DIMENSIONS = ("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate")


def draw(
    dossier: Dossier, curves: Mapping[str, Callable[[], pd.DataFrame]], wanted: Mapping[str, Path]
) -> dict[str, Path]:
    """Draw those of the wanted figures that there is something to see in; gives their files by name.

    curves: by trial, what reads its points, in the columns that `reporting.figures` says. wanted: files by the names of
    `gallery`.
    """
    artists: dict[str, Callable[[Path], None]] = {}
    if dossier.trials["accuracy"].notna().any():
        artists |= _of_search(dossier, curves)
    if dossier.winner in curves:
        artists[gallery.TRAINING] = lambda path: training(curves[str(dossier.winner)](), path)
    predictions = dossier.answers.winner
    if predictions is not None and not predictions.empty:
        artists[gallery.CONFUSION] = partial(confusion_matrix, predictions, f"{dossier.winner}: labels and predictions")
        artists[gallery.CALIBRATION] = partial(calibration, predictions, f"{dossier.winner}: calibration")
    drawn = {name: path for name, path in wanted.items() if name in artists}
    for name, path in drawn.items():
        artists[name](path)
    return drawn


def _of_search(dossier: Dossier, curves: Mapping[str, Callable[[], pd.DataFrame]]) -> dict[str, Callable[[Path], None]]:
    study, baseline = dossier.study, dossier.trial(dossier.baseline)
    trials = dossier.trials.assign(winner=dossier.trials["trial"] == dossier.winner)
    level = baseline.accuracy if baseline is not None and baseline.state == "COMPLETE" else None

    def learning(path: Path) -> None:
        points = pd.concat([read() for read in curves.values()], ignore_index=True)
        figures.learning_curves(points, trials, f"{study}: learning curves", path)

    def history(path: Path) -> None:
        title = f"{study}: optimisation history"
        figures.optimization_history(trials, title, path, baseline=level, bound=dossier.bound)

    return {
        gallery.HISTORY: history,
        gallery.CURVES: learning,
        gallery.SIZE: partial(
            figures.accuracy_against_parameters, trials, dossier.budget, f"{study}: accuracy against size"
        ),
        gallery.PARALLEL: partial(figures.parallel_coordinates, trials, DIMENSIONS, f"{study}: configurations"),
    }


def training(points: pd.DataFrame, path: Path) -> None:
    """Accuracy (left) and losses (right) by step. points: of one trial, as `reporting.figures` reads them."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    evaluation: dict[str, Any] = {"linewidth": 3, "marker": "o", "markersize": 7}
    accuracy = points[points["eval/accuracy"].notna()]
    left.plot(accuracy["step"], accuracy["eval/accuracy"], color=BLUE, **evaluation)
    if not accuracy.empty:
        accuracy_axis(left, accuracy["eval/accuracy"])
    train, validation = points[points["train/loss"].notna()], points[points["eval/loss"].notna()]
    right.plot(train["step"], train["train/loss"], color=GREY, linewidth=2, marker=".", label="training")
    right.plot(validation["step"], validation["eval/loss"], color=VERMILION, label="validation", **evaluation)
    losses = [loss for column in ("train/loss", "eval/loss") for loss in points[column].dropna()]
    right.set_ylim(0, 1.15 * max(losses, default=1.0))
    right.legend(fontsize=TICK_SIZE, frameon=False)
    for axes, label in ((left, "validation accuracy"), (right, "loss")):
        _dress(axes, label)
    save(figure, path)


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel("step", fontsize=LABEL_SIZE)
    axes.set_ylabel(label, fontsize=LABEL_SIZE)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.grid(color="#E3E3E3", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
