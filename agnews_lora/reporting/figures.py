"""Pictures of a study and of its trials: data frames in, PNG files out. One with nothing to show yet says so.

points: what trials reported, one row a (trial, step), NaN where a metric was not measured. Columns `trial` (id),
`step`, `train/loss`, `eval/accuracy`, `eval/loss` (more are ignored): as `SweepRuns.curve` gives them.

trials: one row a trial. Columns `trial` (id), `number` (int), `state` (Optuna's: `COMPLETE`, `PRUNED`, `FAIL`, …),
`accuracy` (share; of a pruned trial the last reported one; NaN where there is none), `baseline` (bool),
`trainable_parameters` (int), `targets` (preset) and, for the parallel coordinates, one column a dimension of the space.
`winner` (bool), where there is one, marks the trial that was chosen; without it the best by accuracy stands out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from agnews_lora.adapters.spec import PRESETS
from agnews_lora.reporting.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LABEL_SIZE,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    TICK_SIZE,
    VERMILION,
    accuracy_axis,
    legend_beside,
    new_figure,
    save,
    say,
)

PRESET_STYLES: Final = dict(  # colour and marker
    zip(PRESETS, zip((SKY, BLUE, GREEN, ORANGE, PURPLE, VERMILION), "os^DvP", strict=True), strict=True)
)
STATE_LABELS: Final = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
LOG_SPAN: Final = 20.0  # a positive dimension whose values span more than this is drawn on a logarithmic axis
NUM_TICKS: Final = 4
BOX: Final = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind texts on lines
TICK_SPACING: Final = 0.06  # share of an axis' height below which two tick labels would overlap


def accuracy_curve(points: pd.DataFrame, title: str, path: Path) -> None:
    """Validation accuracy of one trial by step; the last point is labelled with its value."""
    figure, axes = new_figure(title, "step", "validation accuracy")
    curve = _measured(points, "eval/accuracy")
    if curve.empty:
        say(axes, "no evaluation yet")
    else:
        axes.plot(curve["step"], curve["eval/accuracy"], color=BLUE, marker="o", markersize=8, linewidth=3)
        step, accuracy = curve["step"].iloc[-1], curve["eval/accuracy"].iloc[-1]
        _label(axes, step, accuracy, f"{accuracy:.1%}", (12, 0), va="center")
        accuracy_axis(axes, curve["eval/accuracy"])
        axes.set_xlim(left=0)
    save(figure, path)


def loss_curve(points: pd.DataFrame, title: str, path: Path) -> None:
    """Training and validation loss of one trial by step."""
    figure, axes = new_figure(title, "step", "loss")
    train, evaluation = _measured(points, "train/loss"), _measured(points, "eval/loss")
    if train.empty and evaluation.empty:
        say(axes, "no loss yet")
        return save(figure, path)
    axes.plot(train["step"], train["train/loss"], color=GREY, linewidth=2, marker=".", label="training")
    style: dict[str, Any] = {"color": VERMILION, "linewidth": 3, "marker": "o", "markersize": 8}
    axes.plot(evaluation["step"], evaluation["eval/loss"], label="validation", **style)
    if not evaluation.empty:
        step, loss = evaluation["step"].iloc[-1], evaluation["eval/loss"].iloc[-1]
        _label(axes, step, loss, f"{loss:.3f}", (12, 0), va="center")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=TICK_SIZE, frameon=False)
    save(figure, path)


def learning_curves(points: pd.DataFrame, trials: pd.DataFrame, title: str, path: Path) -> None:
    """Validation accuracy of all trials by step: the best and the baseline stand out, pruned ones end in a cross."""
    figure, axes = new_figure(title, "step", "validation accuracy")
    measured = _measured(points, "eval/accuracy")
    curves = {trial: measured[measured["trial"] == trial] for trial in trials["trial"]}
    shown = [row for row in trials.itertuples() if not curves[row.trial].empty]
    if not shown:
        say(axes, "no evaluation yet")
        return save(figure, path)
    best = _best(trials)
    for row in sorted(shown, key=lambda row: (row.trial == best, row.baseline, row.state == "COMPLETE")):
        curve = curves[row.trial]
        style = _curve_style(row.state, baseline=row.baseline, best=row.trial == best, trial=row.trial)
        axes.plot(curve["step"], curve["eval/accuracy"], marker="o", markersize=4, **style)
        if row.state == "PRUNED":
            axes.plot(curve["step"].iloc[-1], curve["eval/accuracy"].iloc[-1], "x", color=GREY, markersize=10, mew=2.5)
    accuracy_axis(axes, pd.concat([curves[row.trial] for row in shown])["eval/accuracy"])
    axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(reversed(labels), reversed(handles), strict=True))  # one entry a kind, the best on top
    legend_beside(axes, unique)
    save(figure, path)


def optimization_history(
    trials: pd.DataFrame, title: str, path: Path, *, baseline: float | None = None, bound: float | None = None
) -> None:
    """Accuracy of every trial by number, the best so far, the baseline's accuracy and the best possible one."""
    figure, axes = new_figure(title, "trial", "validation accuracy")
    scored = _scored(trials).sort_values("number")
    if scored.empty:
        say(axes, "no trial has ended yet")
        return save(figure, path)
    complete, pruned = scored[scored["state"] == "COMPLETE"], scored[scored["state"] == "PRUNED"]
    first, last = int(trials["number"].min()), int(trials["number"].max())
    if not complete.empty:
        numbers, best_so_far = [*complete["number"], last], [*complete["accuracy"].cummax(), complete["accuracy"].max()]
        axes.step(numbers, best_so_far, where="post", color=ORANGE, linewidth=3, label="best so far")
        axes.plot(complete["number"], complete["accuracy"], "o", color=BLUE, markersize=10, label="complete")
        best = complete.loc[complete["accuracy"].idxmax()]
        _label(axes, best["number"], best["accuracy"], f"{best['accuracy']:.1%}", (0, 12), ha="center")
    if not pruned.empty:
        axes.plot(pruned["number"], pruned["accuracy"], "x", color=GREY, markersize=10, mew=2.5, label="pruned")
    own = scored[scored["baseline"].astype(bool)]
    axes.plot(own["number"], own["accuracy"], "*", color=BLACK, markersize=19, zorder=4)
    lines = [value for value in (baseline, bound) if value is not None]
    if baseline is not None:
        axes.axhline(baseline, color=BLACK, linewidth=2, linestyle="--", label=f"baseline {baseline:.1%}")
    if bound is not None:
        axes.axhline(bound, color=GREEN, linewidth=2, linestyle=":", label=f"best possible {bound:.1%}")
    accuracy_axis(axes, [*scored["accuracy"], *lines])
    margin = 0.5 + 0.02 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_beside(axes)
    save(figure, path)


def accuracy_against_parameters(trials: pd.DataFrame, budget: int, title: str, path: Path) -> None:
    """Accuracy by trainable parameters, coloured by preset, with the Pareto front of what ended and the budget."""
    figure, axes = new_figure(title, "trainable parameters", "validation accuracy")
    scored = _scored(trials).sort_values("number")
    if scored.empty:
        say(axes, "no trial has ended yet")
        return save(figure, path)
    axes.axvline(budget, color=VERMILION, linewidth=2.5, linestyle="--", label=f"budget {budget:,}")
    front = pareto_front(scored[scored["state"] == "COMPLETE"])
    if not front.empty:
        sizes, best = [*front["trainable_parameters"], budget], [*front["accuracy"], front["accuracy"].iloc[-1]]
        axes.step(sizes, best, where="post", color=GREY, linewidth=2.5, zorder=1, label="Pareto front")
    for preset, (color, marker) in PRESET_STYLES.items():
        of_preset = scored[scored["targets"] == preset]
        for state, face in (("COMPLETE", color), ("PRUNED", "none")):
            rows = of_preset[of_preset["state"] == state]
            style: dict[str, Any] = {"marker": marker, "edgecolors": color, "facecolors": face, "linewidths": 2}
            axes.scatter(rows["trainable_parameters"], rows["accuracy"], s=110, zorder=3, **style)
        if not of_preset.empty:
            axes.scatter([], [], s=110, marker=marker, color=color, label=preset)
    if (scored["state"] == "PRUNED").any():
        axes.scatter([], [], s=110, facecolors="none", edgecolors=GREY, linewidths=2, label="hollow: pruned")
    accuracy_axis(axes, scored["accuracy"])
    smallest, largest = min(scored["trainable_parameters"]), max(*scored["trainable_parameters"], budget)
    room = 0.08 * max(largest - smallest, 0.1 * budget)
    axes.set_xlim(smallest - room, largest + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend_beside(axes)
    save(figure, path)


def pareto_front(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that none of fewer or equal parameters matches, by ascending parameters and accuracy."""
    ordered = trials.sort_values(["trainable_parameters", "accuracy"], ascending=[True, False])
    return ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=-np.inf)]


def parameter_importance(importances: Mapping[str, float], title: str, path: Path) -> None:
    """Bars of the share of the accuracy's variance that each dimension of the space explains, largest on top."""
    figure, axes = new_figure(title, "share of the accuracy's variance explained", "")
    known = sorted((value, name) for name, value in importances.items() if np.isfinite(value))
    if not known:
        say(axes, "too few finished trials to tell")
        return save(figure, path)
    values = [value for value, _ in known]
    bars = axes.barh([name.replace("_", " ") for _, name in known], values, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=6, fontsize=LABEL_SIZE)
    axes.set_xlim(0, max(values[-1], 0.01) * 1.15)
    axes.set_ylim(min(0, len(values) - 3) - 0.6, len(values) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    save(figure, path)


def parallel_coordinates(trials: pd.DataFrame, columns: Sequence[str], title: str, path: Path) -> None:
    """One line a trial through the dimensions `columns` and its accuracy: the darker the better, pruned ones pale."""
    figure, axes = new_figure(title, "", "")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    scored, best = _scored(trials).sort_values("accuracy", kind="stable"), _best(trials)
    if scored.empty:
        say(axes, "no trial has ended yet")
        return save(figure, path)
    names = [*columns, "accuracy"]
    positions = range(len(names))
    heights = np.column_stack([_dimension(axes, position, scored[names[position]]) for position in positions])
    complete = (scored["state"] == "COMPLETE").to_numpy()
    for line in heights[~complete]:
        axes.plot(positions, line, color=PALE, linewidth=1.5, zorder=1, label="pruned")
    for line in heights[complete]:
        axes.plot(positions, line, color=colormaps["viridis_r"](0.05 + 0.95 * line[-1]), linewidth=2.5, zorder=2)
    for line in heights[(scored["trial"] == best).to_numpy()]:
        axes.plot(positions, line, color=ORANGE, linewidth=5, zorder=3, label=f"winner: {best}")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": 2}
    axes.legend(unique.values(), unique.keys(), fontsize=TICK_SIZE, frameon=False, **below)
    axes.set_xticks(positions, [name.replace("_", " ") for name in names], fontsize=LABEL_SIZE)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.05, 1.05)
    save(figure, path)


def _dimension(axes: Axes, position: int, values: pd.Series) -> npt.NDArray[np.float64]:
    """Draw one vertical axis with its tick labels; gives the height in [0, 1] of every value."""
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(float)
        marks = _ticks(numbers, whole=pd.api.types.is_integer_dtype(values))
        labels = [f"{mark:.1%}" if values.name == "accuracy" else f"{mark:.2g}" for mark in marks]
    else:
        kinds = sorted(values.unique(), key=lambda kind: (list(PRESETS).index(kind) if kind in PRESETS else -1, kind))
        numbers = values.map({kind: float(index) for index, kind in enumerate(kinds)}).to_numpy()
        marks, labels = np.arange(len(kinds), dtype=float), [str(kind) for kind in kinds]
    low, high = numbers.min(), numbers.max()
    scale = np.log if _is_logarithmic(low, high) else np.asarray

    def height(number: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if high == low:
            return np.full(len(number), 0.5)
        return (scale(number) - scale(low)) / (scale(high) - scale(low))

    axes.axvline(position, color=BLACK, linewidth=1.5, zorder=0)
    below = -1.0
    for place, label in zip(height(marks), labels, strict=True):
        if place - below >= TICK_SPACING:
            axes.text(position + 0.04, place, label, fontsize=TICK_SIZE - 1, va="center", zorder=5, bbox=BOX)
            below = place
    return height(numbers)


def _ticks(numbers: npt.NDArray[np.float64], *, whole: bool) -> npt.NDArray[np.float64]:
    """Every value where they are few whole numbers, else the two ends and values between them."""
    low, high = numbers.min(), numbers.max()
    distinct = np.unique(numbers)
    if low == high or (whole and len(distinct) <= 2 * NUM_TICKS):
        return distinct
    spread = np.geomspace if _is_logarithmic(low, high) else np.linspace
    return np.unique(spread(low, high, NUM_TICKS).round()) if whole else spread(low, high, NUM_TICKS)


def _is_logarithmic(low: float, high: float) -> bool:
    return low > 0 and high / low > LOG_SPAN


def _curve_style(state: str, *, baseline: bool, best: bool, trial: str) -> dict[str, Any]:
    if best:
        return {"color": ORANGE, "linewidth": 4, "label": f"winner: {trial}{' (baseline)' if baseline else ''}"}
    if baseline:
        return {"color": BLACK, "linewidth": 3, "linestyle": "--", "label": "baseline"}
    color = SKY if state == "COMPLETE" else GREY
    return {"color": color, "linewidth": 1.5, "alpha": 0.8, "label": STATE_LABELS.get(state, state.lower())}


def _best(trials: pd.DataFrame) -> str | None:
    complete = _scored(trials).query("state == 'COMPLETE'")
    chosen = complete[complete["winner"]] if "winner" in complete else complete.iloc[:0]
    best = chosen if len(chosen) else complete.nlargest(1, "accuracy")
    return str(best["trial"].iloc[0]) if len(best) else None


def _measured(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The points at which a metric was measured and is finite, by step."""
    return points[np.isfinite(points[metric].astype(float))].sort_values("step", kind="stable")


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that ended with an accuracy: complete or pruned."""
    return trials[np.isfinite(trials["accuracy"].astype(float)) & trials["state"].isin(["COMPLETE", "PRUNED"])]


def _label(axes: Axes, x: float, y: float, text: str, offset: tuple[float, float], **alignment: Any) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": LABEL_SIZE, "fontweight": "bold", "bbox": BOX}
    axes.annotate(text, (x, y), xytext=offset, **style, **alignment)
