"""Figures of a sweep, of its trials and of its winner, as PNG files.

Drawn with matplotlib's objects alone: pyplot's global figures are neither thread-safe nor freed. The style is
matplotlib's default, whatever a `matplotlibrc` of the working folder or of the user says.

Data frames that the functions read:
    trials: one row per trial, as `trials_frame` gives them. `score` is the objective, a share (NaN: none was reported;
        of a pruned trial the last reported one), `state` is Optuna's.
    points: one row per (trial, step) with the columns `trial`, `step`, `train/loss`, `eval/accuracy`, `eval/macro_f1`,
        `eval/loss` and `eval/rows` (more are ignored); NaN where a metric was not measured.
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
from matplotlib.legend import Legend
from matplotlib.style import context as in_style
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, PercentFormatter
from PIL import Image  # matplotlib's own reader of pictures

from agnews_lora.adapters.spec import PRESETS
from agnews_lora.paths import write_whole
from agnews_lora.search.results import SweepResult
from agnews_lora.tracking.descriptions import THUMBNAILS, one_line
from agnews_lora.training.interface import SCORES, Objective
from agnews_lora.training.metrics import accuracy_interval

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
DIMENSIONS: Final = ("targets", "rank", "alpha", "dropout", "learning_rate")

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
WHOLE_STYLE: Final[dict[str, Any]] = {"marker": "D", "markersize": 9, "markeredgecolor": "white", "linestyle": "none"}
BOX: Final = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind texts on lines

LOG_SPAN: Final = 10.0  # a positive dimension whose values span more than this gets a logarithmic axis
NUM_TICKS: Final = 6
LABEL_ROOM: Final = 0.26  # between an axis of parallel coordinates and its lines, on both sides: for its tick labels
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
    worked: pd.DataFrame | None = None,
) -> dict[str, Path]:
    """Draw the figures of `FIGURES` that there is data for.

    Args:
        result: the sweep's.
        curves: points by trial of the search.
        folder: for the files; created.
        worked: `stretches` of all trials, repetitions of the confirmation included; without them, there is no
            `slot_occupancy.png`.

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
        on_rows = f"validation {word}, {facts.num_validation_rows:,} rows"
        optimization_history(trials, on_rows, bound, *new("optimization_history.png"))
        score_against_parameters(trials, on_rows, facts.budget, *new("score_against_parameters.png"))
        parallel_coordinates(trials, word, *new("parallel_coordinates.png"))
    measured = [points for points in (_measured(each, f"eval/{objective}") for each in curves.values()) if len(points)]
    if measured:
        learning_curves(pd.concat(measured, ignore_index=True), trials, objective, *new("learning_curves.png"))
    if result.importances:
        parameter_importance(result.importances, word, *new("parameter_importance.png"))
    if worked is not None and not worked.empty:
        slot_occupancy(worked, *new("slot_occupancy.png"))
    if result.answers and result.winner:
        _, path = new("confusion_matrix.png")
        title = f"{result.winner.trial} on {facts.num_validation_rows:,} validation rows"
        title += ": what it confuses most" if len(facts.labels) > MAX_MATRIX else ""
        confusion_matrix(result.answers.confusion, facts.labels, title, path)
        calibration(result.answers.calibration, result.winner.trial, new("calibration.png")[1])
    return {name: drawn[name] for name in FIGURES if name in drawn}


def trials_frame(result: SweepResult) -> pd.DataFrame:
    """One row per trial of the search, by number: the fields of its summary and configuration, and `winner`."""
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
        }
        for row in result.trials
    ]
    names = ["trial", "number", "state", "baseline", "winner", "score", "trainable_parameters"]
    return pd.DataFrame(rows, columns=[*names, *DIMENSIONS]).astype({"baseline": bool, "winner": bool})


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
    accuracy, loss = drawn.values()
    _trial_curve(points, {"eval/macro_f1": "macro-F1", "eval/accuracy": "accuracy"}, title, accuracy)
    _trial_curve(points, {"train/loss": "training", "eval/loss": "validation"}, title, loss)
    return drawn | thumbnails(drawn, folder)


def _trial_curve(points: pd.DataFrame, lines: Mapping[str, str], title: str, path: Path) -> None:
    """Draw measures of one trial by step. lines: label by metric; the last one's last value is written beside it."""
    metric, shares = list(lines)[-1], "train/loss" not in lines
    on_way, split = _num_rows(points)
    figure, axes = _new_figure(title, "step", f"validation score{on_way}" if shares else "loss")
    for (name, label), color in zip(lines.items(), (SKY, BLUE) if shares else (GREY, VERMILION), strict=True):
        curve, whole = _same_rows(points, name)
        axes.plot(curve["step"], curve[name], color=color, marker="o", markersize=6, linewidth=3, label=label)
        axes.plot(whole["step"], whole[name], color=color, label=split, **WHOLE_STYLE)
    last = _measured(points, metric).iloc[-1]
    _label(axes, last["step"], last[metric], f"{last[metric]:.1%}" if shares else f"{last[metric]:.3f}", (12, 0))
    if shares:
        _share_axis(axes, np.concatenate([_measured(points, name)[name] for name in lines]))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _legend(axes, loc="lower right" if shares else "upper right")
    _save(figure, path)


def learning_curves(points: pd.DataFrame, trials: pd.DataFrame, objective: Objective, title: str, path: Path) -> None:
    """Draw the objective of all trials by step: winner and baseline stand out, pruned ones end in a cross.

    A curve has one set of rows; the score on the whole validation split is a mark of its own. Beside them is the end,
    for the better half of the trials that got there.
    """
    on_way, split = _num_rows(points)
    figure, axes = _new_figure(title, "step", f"validation {SCORES[objective]}{on_way}")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1))
    axes.set_subplotspec(grid[:, 0])
    end = figure.add_subplot(grid[1, 1])
    _dress(end, "", "")
    name = f"eval/{objective}"
    curves = {trial: _same_rows(points[points["trial"] == trial], name) for trial in trials["trial"]}
    shown = [row for row in trials.itertuples() if any(map(len, curves[row.trial]))]
    for row in sorted(shown, key=lambda row: (row.winner, row.baseline, row.state == "COMPLETE")):
        (curve, whole), style = curves[row.trial], _curve_style(row)
        for each in (axes, end):
            each.plot(curve["step"], curve[name], marker="o", markersize=4, **style)
            each.plot(whole["step"], whole[name], color=style["color"], **WHOLE_STYLE)
            if row.state == "PRUNED":
                each.plot(curve["step"].iloc[-1], curve[name].iloc[-1], "x", color=GREY, markersize=10, mew=2.5)
    if any(len(whole) for _, whole in curves.values()):
        axes.plot([], [], color=GREY, label=split, **WHOLE_STYLE)
    _share_axis(axes, points[name])
    axes.set_xlim(left=0)
    _legend(axes, upwards=True).set_in_layout(False)  # the winner on top; above the panel of the end
    steps = sorted(points["step"].unique())[-2:]
    last = points[points["step"] == steps[-1]]
    best = last["trial"][last[name] >= last[name].median()]
    _share_axis(end, points[points["trial"].isin(best) & points["step"].isin(steps)][name])
    room = max(0.15 * (steps[-1] - steps[0]), 0.5)
    end.set_xlim(steps[0] - room, steps[-1] + room)
    end.set_xticks(steps)
    end.set_title("last two evaluations", fontsize=SMALL_SIZE, loc="left")
    _save(figure, path)


def optimization_history(trials: pd.DataFrame, word: str, bound: float | None, title: str, path: Path) -> None:
    """Draw the score of every trial by number, the best so far, the baseline, and the best possible (`bound`).

    word: what the score is called; so in the figures below.
    """
    figure, axes = _new_figure(title, "trial", word)
    scored = _scored(trials).sort_values("number")
    complete, pruned = scored[scored["state"] == "COMPLETE"], scored[scored["state"] == "PRUNED"]
    lowest = _share_axis(axes, [*_shown_scores(scored), *([] if bound is None else [bound])])
    first, last = int(trials["number"].min()), int(trials["number"].max())
    if not complete.empty:
        numbers, best_so_far = [*complete["number"], last], [*complete["score"].cummax(), complete["score"].max()]
        axes.step(numbers, best_so_far, where="post", color=ORANGE, linewidth=3, label="best so far")
        axes.plot(complete["number"], complete["score"], "o", color=BLUE, markersize=10, label="complete")
        best = complete.loc[complete["score"].idxmax()]
        _label(axes, best["number"], best["score"], f"{best['score']:.1%}", (0, 12), ha="center")
    if not pruned.empty:
        heights = pruned["score"].clip(lower=lowest)
        axes.plot(pruned["number"], heights, "x", color=GREY, markersize=10, mew=2.5, label="pruned", clip_on=False)
    own = scored[scored["baseline"]]
    axes.plot(own["number"], own["score"], "*", color=BLACK, markersize=19, zorder=4)
    for baseline in own["score"]:
        axes.axhline(baseline, color=BLACK, linewidth=2, linestyle="--", label=f"baseline {baseline:.1%}")
    if bound is not None:
        axes.axhline(bound, color=GREEN, linewidth=2, linestyle=":", label=f"best possible {bound:.1%}")
    margin = 0.5 + 0.02 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes)
    _save(figure, path)


def score_against_parameters(trials: pd.DataFrame, word: str, budget: int, title: str, path: Path) -> None:
    """Draw the score by trainable parameters, coloured by preset, with the Pareto front and the budget."""
    figure, axes = _new_figure(title, "trainable parameters", word)
    scored = _scored(trials).sort_values("number")
    lowest = _share_axis(axes, _shown_scores(scored))
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
            heights = rows["score"].clip(lower=lowest)
            axes.scatter(rows["trainable_parameters"], heights, s=110, zorder=3, clip_on=False, **style)
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
    names = [name.replace("rank_share", "rank (share of the largest)").replace("_", " ") for _, name in known]
    bars = axes.barh([name.replace(" (", "\n(") for name in names], values, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], padding=6, fontsize=LABEL_SIZE)
    axes.set_xlim(0, max(values[-1], 0.01) * 1.15)
    axes.set_ylim(min(0, len(values) - 3) - 0.6, len(values) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    _save(figure, path)


def parallel_coordinates(trials: pd.DataFrame, word: str, title: str, path: Path) -> None:
    """Draw one line per trial through `DIMENSIONS` and its score.

    Pruned trials are pale; of the others, the better half is darker. Each axis is a pair of rules with its tick
    labels between them, so that no line crosses a label.
    """
    figure, axes = _new_figure(title, "", "")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    scored = _scored(trials).sort_values("score", kind="stable")
    scored["score"] = scored["score"].clip(lower=min(_shown_scores(scored)))
    names = [*DIMENSIONS, "score"]
    heights = np.column_stack([_dimension(axes, position, scored[name]) for position, name in enumerate(names)])
    complete, winner = (scored["state"] == "COMPLETE").to_numpy(), scored["winner"].to_numpy(dtype=bool)
    shades = np.clip(2 * pd.Series(heights[complete, -1]).rank(pct=True) - 1, 0, 1)
    gap = np.full(len(names) - 1, np.nan)
    places = np.arange(len(names) - 1)
    across = np.column_stack([places + LABEL_ROOM, places + 1 - LABEL_ROOM, gap]).ravel()

    def plot(line: npt.NDArray[np.float64], **style: Any) -> None:
        axes.plot(across, np.column_stack([line[:-1], line[1:], gap]).ravel(), solid_capstyle="butt", **style)

    for line in heights[~complete]:
        plot(line, color=PALE, linewidth=1.5, zorder=1, label="pruned")
    for line, shade in zip(heights[complete], shades, strict=True):
        plot(line, color=colormaps["viridis_r"](0.1 + 0.9 * shade), linewidth=1.5 + 1.5 * shade, zorder=2)
    for line, name in zip(heights[winner], scored["trial"][winner], strict=True):
        plot(line, color=ORANGE, linewidth=5, zorder=3, label=f"winner: {name}")
    if complete.any():
        for label, shade in (("best", 1.0), ("lower half", 0.1)):
            axes.plot([], [], color=colormaps["viridis_r"](shade), linewidth=2.5, label=label)
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)
    axes.set_xticks(range(len(names)), [*(name.replace("_", " ") for name in DIMENSIONS), word], fontsize=LABEL_SIZE)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_xlim(-LABEL_ROOM - 0.02, len(names) - 1 + LABEL_ROOM + 0.02)
    axes.set_ylim(-0.05, 1.05)
    _save(figure, path)


def slot_occupancy(intervals: pd.DataFrame, title: str, path: Path) -> None:
    """Draw a Gantt chart of trials by slot, coloured by how they ended. intervals: as `stretches` gives them."""
    shown, cuts = without_pauses(intervals)
    unit, name = (60.0, "minutes") if shown["ended"].max() >= 120 else (1.0, "seconds")
    figure, axes = _new_figure(title, f"{name} of training", "slot")
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
    axes.set_xlim(0, end)
    for cut in cuts:
        axes.axvline(cut / unit, color=BLACK, linewidth=2, linestyle=":", zorder=5, label="a pause, cut out")
    _legend(axes)
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


def busy_seconds(intervals: pd.DataFrame) -> float | None:
    """How long at least one interval was under way; None without any."""
    busy = at_once(intervals)
    return float(busy["time"].diff().shift(-1)[busy["count"] > 0].sum()) if len(intervals) else None


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
    title = f"{name}: {confidence_in_words(bins)}"
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


def confidence_in_words(bins: Sequence[Mapping[str, Any]]) -> str:
    """Say whether the answers are over- or under-confident: whether their accuracy's interval leaves out their mean
    confidence.
    """
    counts, names = [each["count"] for each in bins], ("accuracy", "confidence")
    share, confidence = (float(np.average([each[name] for each in bins], weights=counts)) for name in names)
    low, high = accuracy_interval(share, sum(counts))
    if low <= confidence <= high:
        return "neither over- nor under-confident"
    return f"{'under' if confidence < low else 'over'}-confident by {100 * abs(share - confidence):.1f} points"


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


def _share_axis(axes: Axes, values: Sequence[float] | npt.NDArray[np.float64] | pd.Series) -> float:
    """Set the y axis to percent, with room around `values`: two points or more, so that like values look alike.

    Returns:
        The height of values below the axis.
    """
    low, high = float(min(values)), float(max(values))
    room = max(0.1 * (high - low), 0.01)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))
    return low - 0.7 * room


def _shown_scores(scored: pd.DataFrame) -> pd.Series:
    """The scores that an axis spans: of complete trials, where there are any. Pruned ones below stand on its edge."""
    complete = scored["state"] == "COMPLETE"
    return scored["score"][complete if complete.any() else slice(None)]


def _legend(axes: Axes, *, upwards: bool = False, **place: Any) -> Legend:
    """Put the legend to the right of the axes, where it covers nothing, or in a given place; one entry per label."""
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    names = list(reversed(shown)) if upwards else list(shown)
    place = place or {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    return axes.legend([shown[name] for name in names], names, fontsize=TICK_SIZE, frameon=False, **place)


def _dimension(axes: Axes, position: int, values: pd.Series) -> npt.NDArray[np.float64]:
    """Draw one vertical axis with its tick labels; gives the height in [0, 1] of every value."""
    if pd.api.types.is_numeric_dtype(values):
        numbers = values.to_numpy(float)
        marks = _ticks(numbers, whole=pd.api.types.is_integer_dtype(values))
        labels = [f"{100 * mark:.3g}%" if values.name == "score" else f"{mark:.3g}" for mark in marks]
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

    for side in (-LABEL_ROOM, LABEL_ROOM):
        axes.axvline(position + side, color=GREY, linewidth=1, zorder=0)
    for place, label in zip(height(marks), labels, strict=True):
        axes.text(position, place, label, fontsize=SMALL_SIZE - 1, ha="center", va="center")
    return height(numbers)


def _ticks(numbers: npt.NDArray[np.float64], *, whole: bool) -> npt.NDArray[np.float64]:
    """Round numbers between the lowest and the highest, or these two where there are not two round ones."""
    low, high = numbers.min(), numbers.max()
    if _is_logarithmic(low, high):
        marks = LogLocator(subs=(1.0, 2.0, 5.0)).tick_values(low, high)
    else:
        marks = MaxNLocator(NUM_TICKS, integer=whole, steps=[1, 2, 5, 10]).tick_values(low, high)
    inside = marks[(low <= marks) & (marks <= high)]
    return inside if len(inside) > 1 else np.unique([low, high])


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


def _same_rows(points: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The points of a trial at which a metric was measured on the fewest rows, and those on more: the whole split."""
    measured = _measured(points, metric)
    whole = (measured["eval/rows"] > measured["eval/rows"].min()) & (not metric.startswith("train/"))
    return measured[~whole], measured[whole]


def _num_rows(points: pd.DataFrame) -> tuple[str, str]:
    """The number of rows that scores on the way are of, behind a comma, and of those at the end: in words."""
    low, high = points["eval/rows"].min(), points["eval/rows"].max()
    return ("", "whole split") if np.isnan(low) else (f", {low:,.0f} rows", f"all {high:,.0f} rows")


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that ended with a score: complete or pruned."""
    return trials[np.isfinite(trials["score"].astype(float)) & trials["state"].isin(["COMPLETE", "PRUNED"])]


def _label(axes: Axes, x: float, y: float, text: str, offset: tuple[float, float], **alignment: Any) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": LABEL_SIZE, "fontweight": "bold", "bbox": BOX}
    axes.annotate(text, (x, y), xytext=offset, **style, **alignment)
