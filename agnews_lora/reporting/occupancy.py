"""Which trials trained at the same time: a bar an interval, a line a slot, and how many there were at once.

intervals: one row an uninterrupted stretch of training. Columns `trial` (id), `began`, `ended` (seconds on one clock),
`state` (how the stretch ended: Optuna's `COMPLETE`, `PRUNED`, `FAIL`, or `STOPPED` where the trial went on later). A
trial that was stopped and resumed has several rows.
"""

import heapq
import re
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.ticker import MaxNLocator

from agnews_lora.reporting.canvas import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PALE,
    SMALL_SIZE,
    VERMILION,
    legend_beside,
    new_figure,
    panel_below,
    save,
    say,
)

# Colour, colour of the text on it, and what the legend says.
STATE_STYLES: Final = {
    "COMPLETE": (BLUE, "white", "complete"),
    "PRUNED": (PALE, BLACK, "pruned"),
    "FAIL": (VERMILION, "white", "failed"),
    "STOPPED": (ORANGE, BLACK, "stopped, resumed"),
}
OTHER: Final = (GREY, "white", "not ended")
PAUSE: Final = 0.05  # of the whole time: a longer pause in which nothing trains is cut out
CHARACTER_WIDTH: Final = 0.018  # share of the whole time that a bar needs for each character of its label
MAX_LABELLED_SLOTS: Final = 12


def slot_occupancy(intervals: pd.DataFrame, title: str, path: Path) -> None:
    """Gantt chart of trials by slot, coloured by how they ended, and the number at once below it."""
    figure, axes = new_figure(title, "", "slot")
    if intervals.empty:
        say(axes, "no trial has trained yet")
        return save(figure, path)
    shown, cuts = without_pauses(intervals)
    unit, name = (60.0, "minutes") if shown["ended"].max() >= 120 else (1.0, "seconds")
    shown = shown.assign(began=shown["began"] / unit, ended=shown["ended"] / unit, slot=assign_slots(shown))
    end, num_slots = shown["ended"].max() or 1.0, shown["slot"].max() + 1
    for row in shown.itertuples():
        color, ink, label = STATE_STYLES.get(row.state, OTHER)
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
    handles, labels = axes.get_legend_handles_labels()
    legend_beside(axes, dict(zip(labels, handles, strict=True)))
    below = panel_below(figure, axes, f"{name} of training", "at once")
    busy = at_once(shown)
    below.fill_between(busy["time"], busy["count"], step="post", color=BLUE, alpha=0.3, linewidth=0)
    below.step(busy["time"], busy["count"], where="post", color=BLUE, linewidth=3)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
    below.set_ylim(0, num_slots + 0.5)
    for each in (axes, below):
        each.set_xlim(0, end)
        for cut in cuts:
            each.axvline(cut / unit, color=BLACK, linewidth=2, linestyle=":", zorder=5)
    save(figure, path)


def assign_slots(intervals: pd.DataFrame) -> list[int]:
    """A slot for every interval, in the frame's order: the lowest that is free when it begins.

    No two intervals of a slot overlap, and there are as many slots as intervals at once, which is the fewest
    (interval partitioning by earliest start: Kleinberg and Tardos, Algorithm Design, 4.1).
    """
    order = sorted(
        range(len(intervals)), key=lambda index: (intervals["began"].iloc[index], intervals["ended"].iloc[index])
    )
    free: list[int] = []
    busy: list[tuple[float, int]] = []  # (until when, slot)
    slots = [0] * len(intervals)
    for index in order:
        while busy and busy[0][0] <= intervals["began"].iloc[index]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slots[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (float(intervals["ended"].iloc[index]), slots[index]))
    return slots


def at_once(intervals: pd.DataFrame) -> pd.DataFrame:
    """Number of intervals under way, from each `time` (ascending, each once) to the next: columns `time`, `count`."""
    changes = pd.concat([pd.Series(1, index=intervals["began"]), pd.Series(-1, index=intervals["ended"])])
    counts = changes.groupby(level=0).sum().sort_index().cumsum()
    return pd.DataFrame({"time": counts.index.to_numpy(dtype=float), "count": counts.to_numpy(dtype=int)})


def without_pauses(intervals: pd.DataFrame) -> tuple[pd.DataFrame, list[float]]:
    """The intervals from time 0 on, without the long pauses in which none was under way, and where those were cut.

    Every interval keeps its length, but for what rounding takes.
    """
    busy = at_once(intervals)
    busy["length"] = busy["time"].diff().shift(-1)  # NaN for the last moment, after which nothing is known
    worked = busy.loc[busy["count"] > 0, "length"].sum()
    pauses = busy[(busy["count"] == 0) & (busy["length"] > PAUSE * worked)]
    start = float(busy["time"].iloc[0])

    def shift(times: pd.Series) -> pd.Series:
        cut = sum((pause.length * (times > pause.time) for pause in pauses.itertuples()), start=0.0)
        return times - start - cut

    shown = intervals.assign(began=shift(intervals["began"]), ended=shift(intervals["ended"]))
    return shown, shift(pauses["time"]).tolist()
