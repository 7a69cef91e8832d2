import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context, rcParams
from matplotlib.colors import to_rgb
from PIL import Image

from agnews_lora.reporting import figures
from agnews_lora.search.trials import TrialSummary
from tests.reporting import results
from tests.reporting.results import NAN, TRIALS, curve, curves, result

# A layout that does not fit, or equal limits; what other tests left to be collected is not theirs.
pytestmark = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")

STATES = {row.trial: row.state for row in TRIALS} | {"t0001-s2": "COMPLETE"}
TIMES = {row.trial: [10.0 * row.number, 10.0 * row.number + 25] for row in TRIALS} | {"t0001-s2": [5_000.0, 5_030.0]}
WORKED = figures.stretches(TIMES, STATES)


def shows(path: Path, colour: str) -> bool:
    """Whether more than a few pixels have this colour, or nearly: thin lines are drawn paler, and so are edges."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return bool((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 40).sum() > 20)


def is_whole(path: Path) -> bool:
    with Image.open(path) as image:
        return image.size == (1500, 900) and image.format == "PNG"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All figures of a finished sweep."""
    return figures.draw(result(), curves(result()), tmp_path_factory.mktemp("figures") / "new", WORKED)


def test_a_finished_sweep_has_every_figure_and_nothing_beside_them(drawn: dict[str, Path]) -> None:
    assert list(drawn) == list(figures.FIGURES)
    assert all(is_whole(path) for path in drawn.values())
    assert sorted(path.name for path in next(iter(drawn.values())).parent.iterdir()) == sorted(drawn)


@pytest.mark.parametrize(
    ("name", "colours"),
    {
        "optimization_history.png": (figures.GREEN, figures.ORANGE, figures.BLUE),  # bound, best so far, trials
        "score_against_parameters.png": (figures.SKY, figures.BLUE, figures.VERMILION),  # two presets, the budget
        "learning_curves.png": (figures.ORANGE, figures.SKY, figures.BLACK),  # winner, others, baseline
        "parallel_coordinates.png": (figures.ORANGE,),
        "parameter_importance.png": (figures.BLUE,),
        "slot_occupancy.png": (figures.BLUE, figures.PALE, figures.VERMILION),  # complete, pruned, failed
        "calibration.png": (figures.BLUE, figures.ORANGE),
    }.items(),
)
def test_a_figure_shows_its_parts(name: str, colours: tuple[str, ...], drawn: dict[str, Path]) -> None:
    assert [colour for colour in colours if not shows(drawn[name], colour)] == []


FAILED = tuple(replace(row, state="FAIL", accuracy=None) for row in TRIALS)
OF_TRIALS = {"optimization_history.png", "score_against_parameters.png", "parallel_coordinates.png"}
EDGES: dict[str, tuple[tuple[TrialSummary, ...], set[str]]] = {
    "no trial": ((), set()),
    "all failed": (FAILED, set()),
    "one trial": (TRIALS[:1], OF_TRIALS),
    "all pruned": (tuple(replace(row, state="PRUNED", accuracy=0.6, baseline=False) for row in TRIALS), OF_TRIALS),
    "all alike": (tuple(replace(TRIALS[1], number=n, trial=f"t{n:04d}") for n in range(9)), OF_TRIALS),
}


@pytest.mark.parametrize("case", EDGES)
def test_figures_without_data_are_left_out_and_the_others_are_whole(case: str, tmp_path: Path) -> None:
    trials, expected = EDGES[case]
    drawn = figures.draw(results.bare(trials=trials), {}, tmp_path)
    assert set(drawn) == expected
    assert all(is_whole(path) for path in drawn.values())


def test_curves_of_a_trial_show_its_measures_and_come_with_thumbnails(tmp_path: Path) -> None:
    points = curve(TRIALS[1])
    drawn = figures.trial_curves(points, "t0001", tmp_path)
    names = ("accuracy_curve.png", "loss_curve.png")
    assert list(drawn) == [*names, *(f"thumbnails/{name}" for name in names)]
    assert shows(drawn["accuracy_curve.png"], figures.BLUE) and shows(drawn["loss_curve.png"], figures.VERMILION)
    with Image.open(drawn["thumbnails/loss_curve.png"]) as image:
        assert image.size == (330, 198)
    assert figures.trial_curves(points.assign(**{"eval/accuracy": NAN}), "t0001", tmp_path) == {}


def test_a_style_of_the_user_changes_no_picture(tmp_path: Path) -> None:
    with rc_context(
        {"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20, "axes.prop_cycle": "cycler(lw=[9])"}
    ):
        styled = figures.trial_curves(curve(TRIALS[1]), "t0001", tmp_path / "styled")
        assert rcParams["font.size"] == 30, "elsewhere it is kept"
    plain = figures.trial_curves(curve(TRIALS[1]), "t0001", tmp_path / "plain")
    assert {name: path.read_bytes() for name, path in styled.items()} == {
        name: path.read_bytes() for name, path in plain.items()
    }


def test_a_failed_trial_changes_no_picture_of_scores(tmp_path: Path) -> None:
    reported = [replace(row, accuracy=0.1) if row.state == "FAIL" else row for row in TRIALS]  # before it failed
    for name, rows in (("none", TRIALS), ("reported", tuple(reported))):
        trials = figures.trials_frame(result(trials=rows))
        figures.optimization_history(trials, "accuracy", None, "history", tmp_path / f"{name}.png")
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "reported.png").read_bytes()


ODD = (
    "a b, c",
    "a|b",
    "<b>",
    "$5 to $10 $\\frac$",
    "_a_",
    "x" * 60,
    "😀",
    "שלום",
    "标签",
    "a\tb\nc",
    "#1",
    "-",
    "é",
    "\\",
)


@pytest.mark.parametrize("num_classes", [2, 14, 20, 21, 150, 1000])
def test_any_number_of_labels_with_any_names_is_one_picture(num_classes: int, tmp_path: Path) -> None:
    labels = tuple(f"{ODD[label % len(ODD)]} {label}" for label in range(num_classes))
    right = tuple((label, label, 5) for label in range(num_classes))
    wrong = tuple((label, (label + 1) % num_classes, 1 + label % 3) for label in range(num_classes))
    for name, confusion in (("right", right), ("some", right + wrong), ("none", ())):
        figures.confusion_matrix(confusion, labels, "t0001 on 250 validation rows", tmp_path / f"{name}.png")
        assert is_whole(tmp_path / f"{name}.png")
    many = num_classes > figures.MAX_MATRIX
    assert shows(tmp_path / f"{'some' if many else 'right'}.png", "#9AD2F2" if many else "#08306B")


@given(st.text(max_size=80))
def test_a_name_is_cut_in_its_middle_so_that_those_of_one_kind_are_told_apart(name: str) -> None:
    shown = figures.short(name)
    assert len(shown) <= figures.NAME_LENGTH and "\n" not in shown
    assert figures.short("category/subcategory/" + "x" * 60 + "one") != figures.short("category/" + "x" * 60 + "two")


def test_by_macro_f1_the_figures_show_it_and_not_the_bound_of_the_accuracy(tmp_path: Path) -> None:
    drawn = figures.draw(result(facts=results.facts(objective="macro_f1")), curves(result()), tmp_path)
    history = drawn["optimization_history.png"]
    assert shows(history, figures.ORANGE) and not shows(history, figures.GREEN)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.7, 0.8, 0.85, 0.9])), max_size=12))
def test_pareto_front_is_what_no_trial_beats(sizes_and_accuracies: list[tuple[int, float]]) -> None:
    trials = pd.DataFrame(sizes_and_accuracies, columns=["trainable_parameters", "score"], dtype=float)
    front = set(figures.pareto_front(trials).itertuples(index=False, name=None))
    assert front == {
        (size, accuracy)
        for size, accuracy in sizes_and_accuracies
        if not any(
            (other, better) != (size, accuracy) and other <= size and better >= accuracy
            for other, better in sizes_and_accuracies
        )
    }


def test_expected_calibration_error_is_the_mean_gap_over_the_answers() -> None:
    bins = [
        {"low": 0.7, "count": 2, "confidence": 0.8, "accuracy": 0.5},
        {"low": 0.9, "count": 1, "confidence": 0.95, "accuracy": 1.0},
    ]
    assert figures.expected_calibration_error(bins) == pytest.approx((2 * 0.3 + 0.05) / 3)


def intervals(*given: tuple[float, float], state: str = "COMPLETE") -> pd.DataFrame:
    rows = [(f"t{number:04d}", began, ended, state) for number, (began, ended) in enumerate(given)]
    return pd.DataFrame(rows, columns=["trial", "began", "ended", "state"])


@st.composite
def some_intervals(draw: st.DrawFn) -> pd.DataFrame:
    """Whole seconds, so that lengths are kept to the last bit."""
    starts = draw(st.lists(st.integers(0, 500), min_size=1, max_size=40))
    return intervals(*((float(start), float(start + draw(st.integers(1, 60)))) for start in starts))


@pytest.mark.parametrize(
    "shown",
    [
        intervals(*((number // 16 * 100.0, number // 16 * 100.0 + 90) for number in range(160))),
        intervals((5, 5)),
    ],
    ids=["many slots", "no length"],
)
def test_slots_of_every_study_are_one_whole_picture(shown: pd.DataFrame, tmp_path: Path) -> None:
    figures.slot_occupancy(shown, "embedded: slots over time", tmp_path / "picture.png")
    assert is_whole(tmp_path / "picture.png")


def test_a_long_silence_divides_a_trial_and_a_short_one_does_not() -> None:
    moments = [0.0, 5.0, 10.0, 15.0, 500.0, 505.0]
    found = figures.stretches({"t0000": moments, "t0001": [7.0], "t0002": []}, {"t0000": "PRUNED", "t0001": "FAIL"})
    assert found.to_numpy().tolist() == [
        ["t0000", 0.0, 15.0, "STOPPED"],
        ["t0000", 500.0, 505.0, "PRUNED"],
        ["t0001", 7.0, 7.0, "FAIL"],
    ]
    slow = [100.0 * step for step in range(9)]  # a slow trial, which reports every 100 s
    assert len(figures.stretches({"t0000": [*slow, 1_600.0]}, {"t0000": "COMPLETE"})) == 1


@given(st.lists(st.floats(0, 10 * figures.STOP_SECONDS), min_size=1, max_size=30))
def test_stretches_are_ordered_and_cover_every_report(gaps: list[float]) -> None:
    moments = list(accumulate(gaps))
    found = figures.stretches({"t0000": moments}, {"t0000": "PRUNED"})
    assert found["began"].iloc[0] == moments[0] and found["ended"].iloc[-1] == moments[-1]
    assert (found["began"].to_numpy()[1:] > found["ended"].to_numpy()[:-1]).all()
    assert found["state"].tolist() == ["STOPPED"] * (len(found) - 1) + ["PRUNED"]
    assert all(((found["began"] <= moment) & (moment <= found["ended"])).any() for moment in moments)


def test_the_lowest_free_slot_is_taken_and_one_that_ends_makes_room_at_once() -> None:
    assert figures.assign_slots(intervals((0, 10), (0, 30), (10, 20), (15, 40))) == [0, 1, 0, 2]


@given(some_intervals())
def test_no_two_overlap_in_a_slot_and_no_fewer_slots_would_do(shown: pd.DataFrame) -> None:
    slots = figures.assign_slots(shown)
    for slot in set(slots):
        taken = shown[[each == slot for each in slots]].sort_values("began")
        assert (taken["began"].to_numpy()[1:] >= taken["ended"].to_numpy()[:-1]).all()
    assert sorted(set(slots)) == list(range(max(slots) + 1))
    assert max(slots) + 1 == figures.at_once(shown)["count"].max()


@given(some_intervals())
def test_cutting_pauses_keeps_every_length_and_what_ran_at_once(shown: pd.DataFrame) -> None:
    cut, cuts = figures.without_pauses(shown)
    assert ((cut["ended"] - cut["began"]) == (shown["ended"] - shown["began"])).all()
    assert cut["began"].min() == 0
    assert figures.assign_slots(cut) == figures.assign_slots(shown)
    assert all(((cut["began"] >= place) | (cut["ended"] <= place)).all() for place in cuts)


def test_a_long_pause_is_cut_and_a_short_one_is_not() -> None:
    shown, cuts = figures.without_pauses(intervals((100, 200), (201, 300), (9_300, 9_400)))
    assert shown["began"].tolist() == [0, 101, 200] and shown["ended"].tolist() == [100, 200, 300]
    assert cuts == [200]


def test_the_time_of_a_study_is_that_in_which_something_trained_over_all_its_starts() -> None:
    assert figures.busy_seconds(WORKED) == pytest.approx(95 + 30)  # trials overlap; the pause is none of it
    assert figures.busy_seconds(figures.stretches({}, {})) is None


def test_a_curve_has_one_set_of_rows_and_the_whole_split_is_a_mark_of_its_own() -> None:
    on_way, whole = figures._same_rows(curve(TRIALS[1]), "eval/accuracy")
    assert (on_way["step"].tolist(), whole["step"].tolist()) == ([20, 40], [60])
    assert len(figures._same_rows(curve(TRIALS[1]), "train/loss")[1]) == 0
    alike = curve(TRIALS[1]).assign(**{"eval/rows": 250})
    assert len(figures._same_rows(alike, "eval/accuracy")[0]) == 3


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.96, "under-confident by 6.0 points"),
        (0.84, "over-confident by 6.0 points"),
        (0.91, "neither over- nor under-confident"),  # within the interval of the accuracy
    ],
)
def test_confidence_is_judged_by_the_interval_of_the_accuracy(accuracy: float, words: str) -> None:
    bins = [{"count": 600, "accuracy": accuracy, "confidence": 0.9}]
    assert figures.confidence_in_words(bins) == words


def test_figures_do_without_pyplot() -> None:
    script = "import sys, agnews_lora.reporting.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
