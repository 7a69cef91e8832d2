"""Figures of a sweep, of its trials and of its winner, as PNG files.

Drawn with matplotlib's objects alone: pyplot's global figures are neither thread-safe nor freed. The style is
matplotlib's default, whatever a `matplotlibrc` of the working folder or of the user says.

Data frames that the functions read:
    trials: one row a trial, as `trials_frame` gives them. `score` is the objective, a share (NaN: none was reported; of
        a pruned trial the last reported one), `state` is Optuna's.
    points: one row a (trial, step) with the columns `trial`, `step`, `train/loss`, `eval/accuracy`, `eval/macro_f1` and
        `eval/loss` (more are ignored); NaN where a metric was not measured.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.style import context as in_style
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter
from PIL import Image  # matplotlib's own reader of pictures

from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import PRESETS, TrialSpec
from agnews_lora.paths import write_whole
from agnews_lora.search.results import SweepFacts, SweepResult
from agnews_lora.tracking.descriptions import THUMBNAILS, one_line
from agnews_lora.training.interface import SCORES, Objective

# Figures of a sweep by file name, with their titles, in the order to show them.
FIGURES: Final = {
    "optimization_history.png": "Optimisation history",
    "score_against_parameters.png": "Score against size",
    "learning_curves.png": "Learning curves",
    "parallel_coordinates.png": "Configurations",
    "parameter_importance.png": "Parameter importance",
    "slot_occupancy.png": "Slots over time",
    "confusion_matrix.png": "Confusion matrix of the winner",
    "calibration.png": "Calibration of the winner",
}
ANSWER_FIGURES: Final = {name: FIGURES[name] for name in ("confusion_matrix.png", "calibration.png")}  # of the winner
DIMENSIONS: Final = ("targets", "rank_share", "alpha", "dropout", "learning_rate")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREEN: Final = "#009E73"
VERMILION: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"
BLACK: Final = "#222222"
GREY: Final = "#9A9A9A"
PALE: Final = "#D0D0D0"
PRESET_STYLES: Final = dict(  # colour and marker
    zip(PRESETS, zip((SKY, BLUE, GREEN, ORANGE, PURPLE, VERMILION), "os^DvP", strict=True), strict=True)
)
STATE_LABELS: Final = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
SLOT_STYLES: Final = {  # colour, colour of the text on it, label
    "COMPLETE": (BLUE, "white", "complete"),
    "PRUNED": (PALE, BLACK, "pruned"),
    "FAIL": (VERMILION, "white", "failed"),
    "STOPPED": (ORANGE, BLACK, "stopped, resumed"),
}

# 1500 x 900 pixels, with type large enough for a thumbnail.
SIZE_INCHES: Final = (10.0, 6.0)
DPI: Final = 150
THUMBNAIL_PIXELS: Final = 330
TITLE_SIZE: Final = 22
LABEL_SIZE: Final = 18
TICK_SIZE: Final = 16
SMALL_SIZE: Final = 15
BOX: Final = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind texts on lines

LOG_SPAN: Final = 20.0  # a positive dimension whose values span more than this gets a logarithmic axis
NUM_TICKS: Final = 4
TICK_SPACING: Final = 0.06  # share of an axis' height below which two tick labels would overlap
FEW: Final = 10  # answers below which a bin's accuracy is noise: its bar is pale
PALE_OPACITY: Final = 0.35
# A trial reports at least every few seconds; one that reported nothing for longer was stopped meanwhile.
STOP_SECONDS: Final = 30.0
STOP_FACTOR: Final = 10.0
CUT_SHARE: Final = 0.05  # of the whole time: a longer pause in which nothing trains is cut out
CHARACTER_WIDTH: Final = 0.018  # share of the whole time that a bar needs for each character of its label
MAX_LABELLED_SLOTS: Final = 12
MAX_MATRIX: Final = 20  # classes of a confusion matrix; of more, the most confused pairs are drawn
FEW_CLASSES: Final = 6  # of which a matrix has room for shares
MAX_PAIRS: Final = 15
NAME_LENGTH: Final = 24  # characters of a label that are shown
LINE_LENGTH: Final = 40  # characters that fit below a matrix without a slope


@in_style("default")
def draw(
    result: SweepResult,
    curves: Mapping[str, pd.DataFrame],
    folder: Path,
    times: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Path]:
    """Draw the figures of `FIGURES` that there is data for.

    Args:
        result: the sweep's.
        curves: points by trial of the search.
        folder: for the files; created.
        times: moments by trial at which it reported, ascending, in seconds since 1970, repetitions of the confirmation
            included; without them, there is no `slot_occupancy.png`.

    Returns:
        The files by name.
    """
    drawn: dict[str, Path] = {}

    def new(name: str) -> tuple[str, Path]:
        drawn[name] = folder / name
        return f"{result.study}: {FIGURES[name].lower()}", drawn[name]

    trials, facts, objective, word = trials_frame(result), result.facts, result.objective, SCORES[result.objective]
    if not _scored(trials).empty:
        bound = facts.bound if objective == "accuracy" else None
        optimization_history(trials, word, bound, *new("optimization_history.png"))
        score_against_parameters(trials, word, facts.budget, *new("score_against_parameters.png"))
        parallel_coordinates(trials, word, *new("parallel_coordinates.png"))
    measured = [points for points in (_measured(each, f"eval/{objective}") for each in curves.values()) if len(points)]
    if measured:
        learning_curves(pd.concat(measured, ignore_index=True), trials, objective, *new("learning_curves.png"))
    if result.importances:
        parameter_importance(result.importances, word, *new("parameter_importance.png"))
    if times and any(times.values()):
        repeats = [row for each in result.confirmed for row in each.repeats]
        states = {row.trial: row.state for row in (*result.trials, *repeats)}
        slot_occupancy(stretches(times, states), *new("slot_occupancy.png"))
    if result.answers and result.winner:
        _, path = new("confusion_matrix.png")
        title = f"{result.winner.trial} on {facts.num_validation_rows:,} validation rows"
        title += ": what it confuses most" if len(facts.labels) > MAX_MATRIX else ""
        confusion_matrix(result.answers.confusion, facts.labels, title, path)
        calibration(result.answers.calibration, result.winner.trial, new("calibration.png")[1])
    return {name: drawn[name] for name in FIGURES if name in drawn}


def trials_frame(result: SweepResult) -> pd.DataFrame:
    """One row a trial of the search, by number: the fields of its summary and configuration, and `winner`."""
    winner = result.winner.trial if result.winner else None
    rows = [
        {
            "trial": row.trial,
            "number": row.number,
            "state": row.state,
            "baseline": row.baseline,
            "winner": row.trial == winner,
            "score": float("nan") if (score := row.score(result.objective)) is None else score,
            "trainable_parameters": row.trainable_parameters or 0,
            **{name: getattr(row.spec, name, None) for name in DIMENSIONS},
            "rank_share": _rank_share(row.spec, result.facts),
        }
        for row in result.trials
    ]
    names = ["trial", "number", "state", "baseline", "winner", "score", "trainable_parameters"]
    return pd.DataFrame(rows, columns=[*names, *DIMENSIONS]).astype({"baseline": bool, "winner": bool})


def _rank_share(spec: TrialSpec | None, facts: SweepFacts) -> float | None:
    """The rank as a share of the largest that fits the budget: comparable between presets, as the rank is not."""
    highest = max_rank(spec.targets, spec.head, facts.shape, facts.budget) if spec else 0
    return spec.rank / highest if spec and highest else None


def thumbnails(drawn: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Write copies of figures of `THUMBNAIL_PIXELS` width below `folder`; gives them by artifact name."""
    small = {f"{THUMBNAILS}/{name}": folder / THUMBNAILS / name for name in drawn}
    (folder / THUMBNAILS).mkdir(parents=True, exist_ok=True)
    for path, to in zip(drawn.values(), small.values(), strict=True):
        with Image.open(path) as image:
            size = (THUMBNAIL_PIXELS, round(image.height * THUMBNAIL_PIXELS / image.width))
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(to, format="PNG", optimize=True)
    return small


@in_style("default")
def trial_curves(points: pd.DataFrame, title: str, folder: Path) -> dict[str, Path]:
    """Draw scores and loss of one trial into `folder`; gives figures and thumbnails by artifact name.

    A trial that was never evaluated has none.
    """
    if _measured(points, "eval/accuracy").empty:
        return {}
    drawn = {name: folder / name for name in ("accuracy_curve.png", "loss_curve.png")}
    accuracy_curve(points, title, drawn["accuracy_curve.png"])
    loss_curve(points, title, drawn["loss_curve.png"])
    return drawn | thumbnails(drawn, folder)


def accuracy_curve(points: pd.DataFrame, title: str, path: Path) -> None:
    """Draw validation accuracy and macro-F1 of one trial by step; the last accuracy is labelled with its value."""
    figure, axes = _new_figure(title, "step", "validation score")
    curve, shown = _measured(points, "eval/accuracy"), _measured(points, "eval/macro_f1")
    axes.plot(shown["step"], shown["eval/macro_f1"], color=SKY, marker="s", markersize=6, linewidth=2, label="macro-F1")
    axes.plot(
        curve["step"], curve["eval/accuracy"], color=BLUE, marker="o", markersize=8, linewidth=3, label="accuracy"
    )
    step, accuracy = curve["step"].iloc[-1], curve["eval/accuracy"].iloc[-1]
    _label(axes, step, accuracy, f"{accuracy:.1%}", (12, 0), va="center")
    _share_axis(axes, [*curve["eval/accuracy"], *shown["eval/macro_f1"]])
    axes.set_xlim(left=0)
    axes.legend(fontsize=TICK_SIZE, frameon=False, loc="lower right")
    _save(figure, path)


def loss_curve(points: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the training and validation loss of one trial by step."""
    figure, axes = _new_figure(title, "step", "loss")
    train, evaluation = _measured(points, "train/loss"), _measured(points, "eval/loss")
    axes.plot(train["step"], train["train/loss"], color=GREY, linewidth=2, marker=".", label="training")
    style: dict[str, Any] = {"color": VERMILION, "linewidth": 3, "marker": "o", "markersize": 8}
    axes.plot(evaluation["step"], evaluation["eval/loss"], label="validation", **style)
    step, loss = evaluation["step"].iloc[-1], evaluation["eval/loss"].iloc[-1]
    _label(axes, step, loss, f"{loss:.3f}", (12, 0), va="center")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=TICK_SIZE, frameon=False)
    _save(figure, path)


def learning_curves(points: pd.DataFrame, trials: pd.DataFrame, objective: Objective, title: str, path: Path) -> None:
    """Draw the objective of all trials by step: winner and baseline stand out, pruned ones end in a cross."""
    figure, axes = _new_figure(title, "step", f"validation {SCORES[objective]}")
    name = f"eval/{objective}"
    curves = {trial: points[points["trial"] == trial] for trial in trials["trial"]}
    shown = [row for row in trials.itertuples() if not curves[row.trial].empty]
    for row in sorted(shown, key=lambda row: (row.winner, row.baseline, row.state == "COMPLETE")):
        curve = curves[row.trial]
        axes.plot(curve["step"], curve[name], marker="o", markersize=4, **_curve_style(row))
        if row.state == "PRUNED":
            axes.plot(curve["step"].iloc[-1], curve[name].iloc[-1], "x", color=GREY, markersize=10, mew=2.5)
    _share_axis(axes, points[name])
    axes.set_xlim(left=0)
    _legend(axes, upwards=True)  # the winner on top
    _save(figure, path)


def optimization_history(trials: pd.DataFrame, word: str, bound: float | None, title: str, path: Path) -> None:
    """Draw the score of every trial by number, the best so far, the baseline, and the best possible (`bound`).

    word: what the score is called; so in the figures below.
    """
    figure, axes = _new_figure(title, "trial", f"validation {word}")
    scored = _scored(trials).sort_values("number")
    complete, pruned = scored[scored["state"] == "COMPLETE"], scored[scored["state"] == "PRUNED"]
    first, last = int(trials["number"].min()), int(trials["number"].max())
    if not complete.empty:
        numbers, best_so_far = [*complete["number"], last], [*complete["score"].cummax(), complete["score"].max()]
        axes.step(numbers, best_so_far, where="post", color=ORANGE, linewidth=3, label="best so far")
        axes.plot(complete["number"], complete["score"], "o", color=BLUE, markersize=10, label="complete")
        best = complete.loc[complete["score"].idxmax()]
        _label(axes, best["number"], best["score"], f"{best['score']:.1%}", (0, 12), ha="center")
    if not pruned.empty:
        axes.plot(pruned["number"], pruned["score"], "x", color=GREY, markersize=10, mew=2.5, label="pruned")
    own = scored[scored["baseline"]]
    axes.plot(own["number"], own["score"], "*", color=BLACK, markersize=19, zorder=4)
    for baseline in own["score"]:
        axes.axhline(baseline, color=BLACK, linewidth=2, linestyle="--", label=f"baseline {baseline:.1%}")
    if bound is not None:
        axes.axhline(bound, color=GREEN, linewidth=2, linestyle=":", label=f"best possible {bound:.1%}")
    _share_axis(axes, [*scored["score"], *([] if bound is None else [bound])])
    margin = 0.5 + 0.02 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes)
    _save(figure, path)


def score_against_parameters(trials: pd.DataFrame, word: str, budget: int, title: str, path: Path) -> None:
    """Draw the score by trainable parameters, coloured by preset, with the Pareto front and the budget."""
    figure, axes = _new_figure(title, "trainable parameters", f"validation {word}")
    scored = _scored(trials).sort_values("number")
    axes.axvline(budget, color=VERMILION, linewidth=2.5, linestyle="--", label=f"budget {budget:,}")
    front = pareto_front(scored[scored["state"] == "COMPLETE"])
    if not front.empty:
        sizes, best = [*front["trainable_parameters"], budget], [*front["score"], front["score"].iloc[-1]]
        axes.step(sizes, best, where="post", color=GREY, linewidth=2.5, zorder=1, label="Pareto front")
    for preset, (color, marker) in PRESET_STYLES.items():
        of_preset = scored[scored["targets"] == preset]
        for state, face in (("COMPLETE", color), ("PRUNED", "none")):
            rows = of_preset[of_preset["state"] == state]
            style: dict[str, Any] = {"marker": marker, "edgecolors": color, "facecolors": face, "linewidths": 2}
            axes.scatter(rows["trainable_parameters"], rows["score"], s=110, zorder=3, **style)
        if not of_preset.empty:
            axes.scatter([], [], s=110, marker=marker, color=color, label=preset)
    for row in scored[scored["baseline"]].itertuples():
        axes.scatter(row.trainable_parameters, row.score, s=380, zorder=4, marker="*", color=BLACK)
        axes.scatter([], [], s=200, marker="*", color=BLACK, label="baseline")
    for row in scored[scored["winner"]].itertuples():
        ring: dict[str, Any] = {"s": 380, "facecolors": "none", "edgecolors": BLACK, "linewidths": 2.5}
        axes.scatter(row.trainable_parameters, row.score, zorder=4, **ring)
        axes.scatter([], [], label=f"winner: {row.trial}", **ring | {"s": 160})
    if (scored["state"] == "PRUNED").any():
        axes.scatter([], [], s=110, facecolors="none", edgecolors=GREY, linewidths=2, label="hollow: pruned")
    _share_axis(axes, scored["score"])
    smallest, largest = min(scored["trainable_parameters"]), max(*scored["trainable_parameters"], budget)
    room = 0.08 * max(largest - smallest, 0.1 * budget)
    axes.set_xlim(smallest - room, largest + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes)
    _save(figure, path)


def pareto_front(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that none of fewer or equal parameters matches, by ascending parameters and score."""
    ordered = trials.sort_values(["trainable_parameters", "score"], ascending=[True, False])
    return ordered[ordered["score"] > ordered["score"].cummax().shift(fill_value=-np.inf)]


def parameter_importance(importances: Mapping[str, float], word: str, title: str, path: Path) -> None:
    """Draw the share of the score's variance that each parameter of the space explains, the largest on top."""
    figure, axes = _new_figure(title, f"share of the variance of {word} explained", "")
    known = sorted((value, name) for name, value in importances.items())
    values = [value for value, _ in known]
    bars = axes.barh([name.replace("_", " ") for _, name in known], values, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=6, fontsize=LABEL_SIZE)
    axes.set_xlim(0, max(values[-1], 0.01) * 1.15)
    axes.set_ylim(min(0, len(values) - 3) - 0.6, len(values) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    _save(figure, path)


def parallel_coordinates(trials: pd.DataFrame, word: str, title: str, path: Path) -> None:
    """Draw one line a trial through `DIMENSIONS` and its score: the darker the better, pruned ones pale."""
    figure, axes = _new_figure(title, "", "")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    scored = _scored(trials).sort_values("score", kind="stable")
    names = [*DIMENSIONS, "score"]
    positions = range(len(names))
    heights = np.column_stack([_dimension(axes, position, scored[names[position]]) for position in positions])
    complete, winner = (scored["state"] == "COMPLETE").to_numpy(), scored["winner"].to_numpy(dtype=bool)
    for line in heights[~complete]:
        axes.plot(positions, line, color=PALE, linewidth=1.5, zorder=1, label="pruned")
    for line in heights[complete]:
        axes.plot(positions, line, color=colormaps["viridis_r"](0.05 + 0.95 * line[-1]), linewidth=2.5, zorder=2)
    for line, name in zip(heights[winner], scored["trial"][winner], strict=True):
        axes.plot(positions, line, color=ORANGE, linewidth=5, zorder=3, label=f"winner: {name}")
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    axes.set_xticks(positions, [*(name.replace("_", " ") for name in DIMENSIONS), word], fontsize=LABEL_SIZE)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.05, 1.05)
    _save(figure, path)


def slot_occupancy(intervals: pd.DataFrame, title: str, path: Path) -> None:
    """Draw a Gantt chart of trials by slot, coloured by how they ended, and the number of trials at once below it.

    intervals: as `stretches` gives them.
    """
    figure, axes = _new_figure(title, "", "slot")
    shown, cuts = without_pauses(intervals)
    unit, name = (60.0, "minutes") if shown["ended"].max() >= 120 else (1.0, "seconds")
    shown = shown.assign(began=shown["began"] / unit, ended=shown["ended"] / unit, slot=assign_slots(shown))
    end, num_slots = shown["ended"].max() or 1.0, shown["slot"].max() + 1
    for row in shown.itertuples():
        color, ink, label = SLOT_STYLES.get(row.state, (GREY, "white", "not ended"))
        width = row.ended - row.began
        edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.5}
        axes.barh(row.slot, width, left=row.began, height=0.86, color=color, label=label, **edge)
        number = re.sub(r"^t0*(?=\d)", "", row.trial)
        if width >= CHARACTER_WIDTH * len(number) * end and num_slots <= MAX_LABELLED_SLOTS:
            place: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True}
            axes.text(row.began + width / 2, row.slot, number, color=ink, fontsize=SMALL_SIZE, **place)
    axes.set_ylim(num_slots - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda slot, _: f"{slot + 1:.0f}")
    axes.grid(visible=False, axis="y")
    _legend(axes)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1))
    axes.set_subplotspec(grid[0])
    axes.tick_params(labelbottom=False)
    below = figure.add_subplot(grid[1])
    _dress(below, f"{name} of training", "at once")
    figure.align_ylabels([axes, below])
    busy = at_once(shown)
    below.fill_between(busy["time"], busy["count"], step="post", color=BLUE, alpha=0.3, linewidth=0)
    below.step(busy["time"], busy["count"], where="post", color=BLUE, linewidth=3)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
    below.set_ylim(0, num_slots + 0.5)
    for each in (axes, below):
        each.set_xlim(0, end)
        for cut in cuts:
            each.axvline(cut / unit, color=BLACK, linewidth=2, linestyle=":", zorder=5)
    _save(figure, path)


def stretches(times: Mapping[str, Sequence[float]], states: Mapping[str, str]) -> pd.DataFrame:
    """Uninterrupted stretches of training. A long silence divides a trial: it was stopped, and resumed later.

    Args:
        times: moments by trial at which it reported, ascending, in seconds.
        states: of the trials.

    Returns:
        One row a stretch: `trial`, `began`, `ended`, `state` (the trial's; `STOPPED` where it was resumed).
    """
    rows = []
    for trial, moments in times.items():
        if not moments:
            continue
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        longest = max(STOP_SECONDS, STOP_FACTOR * median(gaps)) if gaps else STOP_SECONDS
        breaks = [index + 1 for index, gap in enumerate(gaps) if gap > longest]
        for start, end in zip([0, *breaks], [*breaks, len(moments)], strict=True):
            state = states[trial] if end == len(moments) else "STOPPED"
            rows.append({"trial": trial, "began": moments[start], "ended": moments[end - 1], "state": state})
    return pd.DataFrame(rows, columns=["trial", "began", "ended", "state"])


def assign_slots(intervals: pd.DataFrame) -> list[int]:
    """A slot for every interval, in the frame's order: the lowest that is free when it begins.

    No two intervals of a slot overlap, and there are as many slots as intervals at once, which is the fewest
    (interval partitioning by earliest start: Kleinberg and Tardos, Algorithm Design, 4.1).
    """
    spans = list(zip(intervals["began"], intervals["ended"], strict=True))
    until: list[float] = []  # when each slot's last interval ends
    slots = [0] * len(spans)
    for index in sorted(range(len(spans)), key=spans.__getitem__):
        began, ended = spans[index]
        slots[index] = next((slot for slot, end in enumerate(until) if end <= began), len(until))
        until[slots[index] : slots[index] + 1] = [ended]
    return slots


def at_once(intervals: pd.DataFrame) -> pd.DataFrame:
    """Number of intervals under way, from each `time` (ascending, each once) to the next: columns `time`, `count`."""
    changes = pd.concat([pd.Series(1, index=intervals["began"]), pd.Series(-1, index=intervals["ended"])])
    counts = changes.groupby(level=0).sum().sort_index().cumsum()
    return pd.DataFrame({"time": counts.index.to_numpy(dtype=float), "count": counts.to_numpy(dtype=int)})


def without_pauses(intervals: pd.DataFrame) -> tuple[pd.DataFrame, list[float]]:
    """The intervals from time 0 on, without the long pauses in which none was under way, and where those were cut.

    Every interval keeps its length, but for rounding.
    """
    busy = at_once(intervals)
    busy["length"] = busy["time"].diff().shift(-1)  # NaN for the last moment, after which nothing is known
    worked = busy.loc[busy["count"] > 0, "length"].sum()
    pauses = busy[(busy["count"] == 0) & (busy["length"] > CUT_SHARE * worked)]
    start = float(busy["time"].iloc[0])

    def shift(times: pd.Series) -> pd.Series:
        cut = sum((pause.length * (times > pause.time) for pause in pauses.itertuples()), start=0.0)
        return times - start - cut

    shown = intervals.assign(began=shift(intervals["began"]), ended=shift(intervals["ended"]))
    return shown, shift(pauses["time"]).tolist()


def confusion_matrix(confusion: Sequence[tuple[int, int, int]], labels: Sequence[str], title: str, path: Path) -> None:
    """Draw how many rows of each label (down) got which answer (across); of many classes, `_confused_pairs`.

    confusion: (label, predicted, rows). labels: names of the classes.
    """
    if len(labels) > MAX_MATRIX:
        _confused_pairs(confusion, labels, title, path)
        return
    figure, axes = _new_figure(title, "predicted", "label")
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for label, predicted, rows in confusion:
        counts[label, predicted] = rows
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap=colormaps["Blues"], vmin=0, vmax=1, aspect="auto")
    few = len(labels) <= FEW_CLASSES
    for (down, across), count in np.ndenumerate(counts):
        ink = "white" if shares[down, across] > 0.5 else BLACK
        style: dict[str, Any] = {"ha": "center", "color": ink, "fontweight": "bold" if down == across else "normal"}
        if few:
            axes.text(across, down - 0.02, f"{count:,}", fontsize=LABEL_SIZE + 6, va="bottom", **style)
            axes.text(across, down + 0.08, f"{shares[down, across]:.1%}", fontsize=TICK_SIZE, va="top", **style)
        elif count:
            axes.text(across, down, f"{count:,}", fontsize=150 / len(labels), va="center", **style)
    names = [_drawable(name, number) for number, name in enumerate(labels)]
    ticks: dict[str, Any] = {"fontsize": LABEL_SIZE if few else SMALL_SIZE - 3, "parse_math": False}
    axes.set_yticks(range(len(names)), names, **ticks)
    if max(map(len, names)) * len(names) > LINE_LENGTH:
        ticks |= {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **ticks)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _confused_pairs(confusion: Sequence[tuple[int, int, int]], labels: Sequence[str], title: str, path: Path) -> None:
    """Draw a bar for each of the `MAX_PAIRS` pairs of a label and a wrong answer that have the most rows."""
    figure, axes = _new_figure(title, "rows", "")
    totals = Counter[int]()
    for label, _, rows in confusion:
        totals[label] += rows
    pairs = sorted((pair for pair in confusion if pair[0] != pair[1]), key=lambda pair: -pair[2])[:MAX_PAIRS]
    axes.barh(range(len(pairs)), [rows for _, _, rows in pairs], color=SKY, alpha=0.6, height=0.84)
    for place, (label, predicted, _) in enumerate(pairs):
        # One text each: in one line, names that are read from right to left would change places.
        texts = (_drawable(labels[label], label), "\N{RIGHTWARDS ARROW}", _drawable(labels[predicted], predicted))
        for share, text in zip((0.01, 0.4, 0.45), texts, strict=True):
            where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
            axes.text(share, place, text, fontsize=SMALL_SIZE, **where)
    shares = [f"{rows:,} of {totals[label]:,}" for label, _, rows in pairs]
    axes.set_yticks(range(len(pairs)), shares, fontsize=SMALL_SIZE)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(pairs), MAX_PAIRS) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=False, axis="y")
    _save(figure, path)


def short(name: str, length: int = NAME_LENGTH) -> str:
    """A label's name on one line, its middle left out where it is long: names of one kind often begin alike."""
    line = one_line(name)
    return line if len(line) <= length else f"{line[: length - length // 3 - 1]}…{line[-(length // 3) :]}"


def _drawable(name: str, number: int) -> str:
    """A label's short name in the characters that figures have, with its number where some are left out."""
    known = "".join(character for character in short(name) if _font().get_char_index(ord(character)))
    return known if known == short(name) and known else f"#{number} {known}".strip()


@cache
def _font() -> FT2Font:
    return get_font(findfont("DejaVu Sans"))


def calibration(bins: Sequence[Mapping[str, Any]], name: str, path: Path) -> None:
    """Draw a reliability diagram: accuracy by confidence, with the number of answers in each bin.

    Args:
        bins: `{low, count, confidence, accuracy}` each, a tenth wide, ascending; empty ones may be left out.
        name: the model's.
    """
    title = f"{name}: expected calibration error {expected_calibration_error(bins):.1%}"
    figure, axes = _new_figure(title, "confidence of the answer", "share that is correct")
    low, width = bins[0]["low"], 0.1
    axes.plot([low, 1], [low, 1], color=BLACK, linewidth=2.5, linestyle="--", zorder=3, label="perfect calibration")
    for each in bins:
        opacity = PALE_OPACITY if each["count"] < FEW else 1.0
        axes.bar(each["low"], each["accuracy"], width=0.94 * width, align="edge", color=BLUE, alpha=opacity)
        ends = [each["low"], each["low"] + 0.94 * width]
        axes.plot(ends, [each["confidence"]] * 2, color=ORANGE, linewidth=5, solid_capstyle="butt", zorder=4)
        place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": SMALL_SIZE}
        axes.text(each["low"] + width / 2, 1.01, f"{each['count']:,}", **place)
    axes.plot([], [], color=ORANGE, linewidth=5, label="mean confidence")
    axes.bar([low], [0], width=0, color=BLUE, label="correct (above: answers)")
    if any(each["count"] < FEW for each in bins):
        axes.bar([low], [0], width=0, color=BLUE, alpha=PALE_OPACITY, label=f"fewer than {FEW} answers")
    axes.set_xlim(low - 0.01, 1.01)
    axes.set_ylim(0, 1.08)
    axes.xaxis.set_major_locator(MultipleLocator(width if low > 0.3 else 2 * width))
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)
    _save(figure, path)


def expected_calibration_error(bins: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the answers of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3)."""
    gaps = sum(abs(each["accuracy"] - each["confidence"]) * each["count"] for each in bins)
    return float(gaps / sum(each["count"] for each in bins))


def _new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty figure and its axes."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=TITLE_SIZE, loc="left", pad=14, parse_math=False)
    _dress(axes, x_label, y_label)
    return figure, axes


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=LABEL_SIZE)
    axes.set_ylabel(y_label, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.grid(color="#E3E3E3", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG file. Its folder is created."""
    content = BytesIO()
    figure.savefig(content, format="png")
    write_whole(path, content.getvalue())


def _share_axis(axes: Axes, values: Sequence[float] | pd.Series) -> None:
    """Set the y axis to percent, with room around `values`: two points or more, so that like values look alike."""
    low, high = float(min(values)), float(max(values))
    room = max(0.1 * (high - low), 0.01)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))


def _legend(axes: Axes, *, upwards: bool = False, **place: Any) -> None:
    """Put the legend to the right of the axes, where it covers nothing, or in a given place; one entry a label."""
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    names = list(reversed(shown)) if upwards else list(shown)
    place = place or {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend([shown[name] for name in names], names, fontsize=TICK_SIZE, frameon=False, **place)


def _dimension(axes: Axes, position: int, values: pd.Series) -> npt.NDArray[np.float64]:
    """Draw one vertical axis with its tick labels; gives the height in [0, 1] of every value."""
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(float)
        marks = _ticks(numbers, whole=pd.api.types.is_integer_dtype(values))
        labels = [f"{mark:.1%}" if values.name == "score" else f"{mark:.2g}" for mark in marks]
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


def _curve_style(row: Any) -> dict[str, Any]:
    if row.winner:
        label = f"winner: {row.trial}{' (baseline)' if row.baseline else ''}"
        return {"color": ORANGE, "linewidth": 4, "label": label}
    if row.baseline:
        return {"color": BLACK, "linewidth": 3, "linestyle": "--", "label": "baseline"}
    color = SKY if row.state == "COMPLETE" else GREY
    return {"color": color, "linewidth": 1.5, "alpha": 0.8, "label": STATE_LABELS.get(row.state, row.state.lower())}


def _measured(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The points at which a metric was measured and is finite, by step."""
    return points[np.isfinite(points[metric].astype(float))].sort_values("step", kind="stable")


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that ended with a score: complete or pruned."""
    return trials[np.isfinite(trials["score"].astype(float)) & trials["state"].isin(["COMPLETE", "PRUNED"])]


def _label(axes: Axes, x: float, y: float, text: str, offset: tuple[float, float], **alignment: Any) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": LABEL_SIZE, "fontweight": "bold", "bbox": BOX}
    axes.annotate(text, (x, y), xytext=offset, **style, **alignment)
