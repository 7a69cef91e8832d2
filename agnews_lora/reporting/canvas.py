"""The one look of all figures: palette, type sizes, axes, and how a file comes to be.

Drawn with matplotlib's objects alone: pyplot's global figures would be neither thread-safe nor freed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image  # matplotlib's own reader of pictures

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

# 1000 x 600 pixels, with type large enough for a thumbnail.
WIDTH_INCHES: Final = 10.0
HEIGHT_INCHES: Final = 6.0
DPI: Final = 150
THUMBNAIL_PIXELS: Final = 330
TITLE_SIZE: Final = 22
LABEL_SIZE: Final = 18
TICK_SIZE: Final = 16
SMALL_SIZE: Final = 15


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty figure and its axes."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=TITLE_SIZE, loc="left", pad=14)
    _dress(axes, x_label, y_label)
    return figure, axes


def panel_below(figure: Figure, axes: Axes, x_label: str, y_label: str) -> Axes:
    """More axes below the figure's own, a third as high, over the same x axis, which is labelled there alone."""
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1))
    axes.set_subplotspec(grid[0])
    axes.tick_params(labelbottom=False)
    below = figure.add_subplot(grid[1])
    _dress(below, x_label, y_label)
    figure.align_ylabels([axes, below])
    return below


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=LABEL_SIZE)
    axes.set_ylabel(y_label, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.grid(color="#E3E3E3", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG file, beside and renamed: it is either whole or not there. Its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png")
    beside.replace(path)


def thumbnail(path: Path, to: Path) -> None:
    """A third of a picture's size, for a page that shows many; its folder is created."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
        size = (THUMBNAIL_PIXELS, round(image.height * THUMBNAIL_PIXELS / image.width))
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(to, format="PNG", optimize=True)


def accuracy_axis(axes: Axes, values: Sequence[float] | pd.Series) -> None:
    """The y axis in percent, with room around `values`: two points or more, so that like values look alike."""
    low, high = float(min(values)), float(max(values))
    room = max(0.1 * (high - low), 0.01)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))


def legend_beside(axes: Axes, entries: Mapping[str, Artist] | None = None) -> None:
    """The legend to the right of the axes, where it covers nothing. entries: artists by label; all where not given."""
    handles, labels = axes.get_legend_handles_labels()
    shown = entries or dict(zip(labels, handles, strict=True))
    axes.legend(
        shown.values(), shown.keys(), fontsize=TICK_SIZE, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )


def say(axes: Axes, text: str) -> None:
    """A sentence in the place of a picture that has nothing to show yet."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=LABEL_SIZE, color=GREY)
