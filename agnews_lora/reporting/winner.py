"""How a model answers, as pictures and as a table of its worst mistakes.

predictions: one row a row of the validation split. Columns `row` (its index in the split), `label` and `predicted`
(class names), then a column a class, named after it, with the probability that the model gave it.

A picture that has nothing to show says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.ticker import MultipleLocator, PercentFormatter

from agnews_lora.reporting.canvas import (
    BLACK,
    BLUE,
    LABEL_SIZE,
    ORANGE,
    SMALL_SIZE,
    TICK_SIZE,
    legend_beside,
    new_figure,
    save,
    say,
)

FACTS: Final = ("row", "label", "predicted")
NUM_BINS: Final = 10
DARK: Final = 0.5  # share of its row above which a cell is so dark that its text is white
FEW: Final = 10  # answers below which a bin's accuracy is noise: its bar is drawn pale
PALE_OPACITY: Final = 0.35


def classes(predictions: pd.DataFrame) -> list[str]:
    """Names of the classes, in the model's order."""
    return [str(column) for column in predictions.columns if column not in FACTS]


def confusion_matrix(predictions: pd.DataFrame, title: str, path: Path) -> None:
    """Counts of labels (down) against predictions (across); the darker, the larger the share of its label's rows."""
    figure, axes = new_figure(title, "predicted", "label")
    if predictions.empty:
        say(axes, "no prediction yet")
        return save(figure, path)
    names = classes(predictions)
    counts = confusion(predictions)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap=colormaps["Blues"], vmin=0, vmax=1, aspect="auto")
    for (down, across), count in np.ndenumerate(counts):
        ink = "white" if shares[down, across] > DARK else BLACK
        style: dict[str, Any] = {"ha": "center", "color": ink, "fontweight": "bold" if down == across else "normal"}
        axes.text(across, down - 0.02, f"{count:,}", fontsize=LABEL_SIZE + 6, va="bottom", **style)
        axes.text(across, down + 0.08, f"{shares[down, across]:.1%}", fontsize=TICK_SIZE, va="top", **style)
    axes.set_xticks(range(len(names)), names, fontsize=LABEL_SIZE)
    axes.set_yticks(range(len(names)), names, fontsize=LABEL_SIZE)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    save(figure, path)


def confusion(predictions: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Counts [label, predicted], both in the order of the classes."""
    names = classes(predictions)
    position = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (predictions["label"].map(position), predictions["predicted"].map(position)), 1)
    return counts


def calibration(predictions: pd.DataFrame, title: str, path: Path) -> None:
    """Reliability diagram: how often the model is right, by how sure it is, with the number of answers in each bin.

    The title ends with the expected calibration error.
    """
    bins = reliability(predictions)
    error = f": expected calibration error {expected_calibration_error(bins):.1%}" if len(bins) else ""
    figure, axes = new_figure(f"{title}{error}", "confidence of the answer", "share that is right")
    if bins.empty:
        say(axes, "no prediction yet")
        return save(figure, path)
    low, width = bins["low"].min(), 1 / NUM_BINS
    axes.plot([low, 1], [low, 1], color=BLACK, linewidth=2.5, linestyle="--", zorder=3, label="as sure as right")
    for bin_ in bins.itertuples():
        opacity = PALE_OPACITY if bin_.count < FEW else 1.0
        axes.bar(bin_.low, bin_.accuracy, width=0.94 * width, align="edge", color=BLUE, alpha=opacity)
        ends = [bin_.low, bin_.low + 0.94 * width]
        axes.plot(ends, [bin_.confidence] * 2, color=ORANGE, linewidth=5, solid_capstyle="butt", zorder=4)
        axes.text(bin_.low + width / 2, 1.01, f"{bin_.count:,}", ha="center", va="bottom", fontsize=SMALL_SIZE)
    axes.plot([], [], color=ORANGE, linewidth=5, label="mean confidence")
    axes.bar([low], [0], width=0, color=BLUE, label="right (above: answers)")
    if (bins["count"] < FEW).any():
        axes.bar([low], [0], width=0, color=BLUE, alpha=PALE_OPACITY, label=f"fewer than {FEW} answers")
    axes.set_xlim(low - 0.01, 1.01)
    axes.set_ylim(0, 1.08)
    axes.xaxis.set_major_locator(MultipleLocator(width))
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_beside(axes)
    save(figure, path)


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Answers by confidence, in bins of equal width over 0 to 1; a confidence on an edge belongs to the bin below.

    Columns `low` (the bin's lower edge), `count`, `confidence` (mean), `accuracy` (share right). Bins without an answer
    are left out.
    """
    confidence = _confidence(predictions)
    right = (predictions["label"] == predictions["predicted"]).to_numpy()
    # The tenths as they are written: 0.3 is an edge, though 3 * 0.1 lies beyond it.
    edges = np.arange(1, NUM_BINS) / NUM_BINS
    bins = np.searchsorted(edges, confidence, side="left")
    frame = pd.DataFrame({"low": bins / NUM_BINS, "confidence": confidence, "accuracy": right.astype(float)})
    grouped = frame.groupby("low", as_index=False)
    return grouped.agg(count=("low", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean"))


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Mean over the answers of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3)."""
    gaps = (bins["accuracy"] - bins["confidence"]).abs()
    return float((gaps * bins["count"]).sum() / bins["count"].sum())


def mistakes(predictions: pd.DataFrame, texts: Sequence[str], count: int = 20) -> pd.DataFrame:
    """The `count` wrong answers that the model was surest of, surest first (ties: the earlier row).

    texts: of the split, by row. Columns `row`, `label`, `predicted`, `confidence`, `text`.
    """
    wrong = predictions.assign(confidence=_confidence(predictions))
    wrong = wrong[wrong["label"] != wrong["predicted"]]
    wrong = wrong.sort_values(["confidence", "row"], ascending=[False, True]).head(count)
    table = wrong[[*FACTS, "confidence"]].assign(text=[texts[int(row)] for row in wrong["row"]])
    return table.reset_index(drop=True)


def _confidence(predictions: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Probability of the class that was predicted, [rows]."""
    names = classes(predictions)
    position = {name: index for index, name in enumerate(names)}
    across = predictions["predicted"].map(position).to_numpy(dtype=int)
    return predictions[names].to_numpy(dtype=float)[np.arange(len(predictions)), across]
