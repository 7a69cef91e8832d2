from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image

from agnews_lora.reporting import canvas
from agnews_lora.reporting.occupancy import assign_slots, at_once, slot_occupancy, without_pauses

pytestmark = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")

COLUMNS = ["trial", "began", "ended", "state"]


def frame(*intervals: tuple[float, float], state: str = "COMPLETE") -> pd.DataFrame:
    rows = [(f"t{number:04d}", began, ended, state) for number, (began, ended) in enumerate(intervals)]
    return pd.DataFrame(rows, columns=COLUMNS)


@st.composite
def stretches(draw: st.DrawFn) -> pd.DataFrame:
    """Whole seconds, so that lengths are kept to the last bit."""
    starts = draw(st.lists(st.integers(0, 500), min_size=1, max_size=40))
    return frame(*((float(start), float(start + draw(st.integers(1, 60)))) for start in starts))


def shows(path: Path, colour: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return bool((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 20).any())


@pytest.mark.parametrize(
    "intervals",
    [
        frame(),
        frame((0, 10)),
        frame((0, 10), (10, 20), (3_600, 3_700)),
        frame(*((number // 16 * 100.0, number // 16 * 100.0 + 90) for number in range(160))),
        frame((5, 5)),
    ],
    ids=["nothing", "one", "a pause", "many slots", "no length"],
)
def test_every_study_is_one_whole_picture(intervals: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "figures" / "picture.png"
    slot_occupancy(intervals, "embedded: which trials trained when", path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as image:
        assert image.size == (1500, 900) and image.format == "PNG"


def test_how_a_trial_ended_shows(tmp_path: Path) -> None:
    both = pd.concat([frame((0, 10)), frame((0, 20), state="FAIL"), frame((10, 20), state="STOPPED")])
    slot_occupancy(both, "x", tmp_path / "both.png")
    slot_occupancy(frame((0, 10)), "x", tmp_path / "complete.png")
    assert shows(tmp_path / "both.png", canvas.VERMILION) and shows(tmp_path / "both.png", canvas.ORANGE)
    assert not shows(tmp_path / "complete.png", canvas.VERMILION)
    assert shows(tmp_path / "complete.png", canvas.BLUE)


def test_the_lowest_free_slot_is_taken_and_one_that_ends_makes_room_at_once() -> None:
    assert assign_slots(frame((0, 10), (0, 30), (10, 20), (15, 40))) == [0, 1, 0, 2]
    assert assign_slots(frame()) == []


@given(stretches())
def test_no_two_overlap_in_a_slot_and_no_fewer_slots_would_do(intervals: pd.DataFrame) -> None:
    slots = assign_slots(intervals)
    for slot in set(slots):
        taken = intervals[[each == slot for each in slots]].sort_values("began")
        assert (taken["began"].to_numpy()[1:] >= taken["ended"].to_numpy()[:-1]).all()
    assert sorted(set(slots)) == list(range(max(slots) + 1))
    assert max(slots) + 1 == at_once(intervals)["count"].max()


@given(stretches())
def test_number_at_once_is_the_number_under_way_at_every_moment(intervals: pd.DataFrame) -> None:
    counts = at_once(intervals)
    assert counts["time"].is_monotonic_increasing and counts["time"].is_unique
    assert counts["count"].iloc[-1] == 0
    for moment, count in counts.itertuples(index=False):
        assert count == ((intervals["began"] <= moment) & (moment < intervals["ended"])).sum()


@given(stretches())
def test_cutting_pauses_keeps_every_length_and_what_ran_at_once(intervals: pd.DataFrame) -> None:
    shown, cuts = without_pauses(intervals)
    assert ((shown["ended"] - shown["began"]) == (intervals["ended"] - intervals["began"])).all()
    assert shown["began"].min() == 0
    assert at_once(shown)["count"].max() == at_once(intervals)["count"].max()
    assert assign_slots(shown) == assign_slots(intervals)
    assert all(((shown["began"] >= cut) | (shown["ended"] <= cut)).all() for cut in cuts)


def test_a_long_pause_is_cut_and_a_short_one_is_not() -> None:
    shown, cuts = without_pauses(frame((100, 200), (201, 300), (9_300, 9_400)))
    assert shown["began"].tolist() == [0, 101, 200] and shown["ended"].tolist() == [100, 200, 300]
    assert cuts == [200]
