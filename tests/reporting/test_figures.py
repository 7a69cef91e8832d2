import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image

from agnews_lora.reporting import canvas
from agnews_lora.reporting.figures import (
    accuracy_against_parameters,
    accuracy_curve,
    learning_curves,
    loss_curve,
    optimization_history,
    parallel_coordinates,
    parameter_importance,
    pareto_front,
)

# A layout that does not fit, or equal limits; what other tests left to be collected is not theirs.
pytestmark = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")

COLUMNS = ("targets", "rank", "alpha_ratio", "dropout", "learning_rate")
POINT_COLUMNS = ["trial", "step", "train/loss", "eval/accuracy", "eval/loss"]
NAN = float("nan")


def study(num_trials: int) -> pd.DataFrame:
    """Trials of which the first is the baseline, every third was pruned and the sixth failed."""
    numbers = np.arange(num_trials)
    frame = pd.DataFrame(
        {
            "trial": [f"t{number:04d}" for number in numbers],
            "number": numbers,
            "state": np.where(numbers % 3 == 2, "PRUNED", "COMPLETE"),
            "accuracy": 0.74 + 0.02 * (numbers % 7),
            "baseline": numbers == 0,
            "trainable_parameters": 15_000 + 5_000 * numbers,
            "targets": [["qk", "qv", "all-linear"][number % 3] for number in numbers],
            "rank": 1 + numbers % 5,
            "alpha_ratio": 2 ** (numbers % 4),
            "dropout": 0.02 * (numbers % 7),
            "learning_rate": 1e-4 * 1.5**numbers,
        }
    )
    frame.loc[numbers == 5, ["state", "accuracy"]] = ["FAIL", NAN]
    return frame


def points_of(trials: pd.DataFrame) -> pd.DataFrame:
    steps = [25, 50, 75, 100]
    curves = [
        pd.DataFrame(
            {
                "trial": trial,
                "step": [*steps, *steps],
                "train/loss": [1.4, 0.9, 0.7, 0.6, NAN, NAN, NAN, NAN],
                "eval/accuracy": [NAN] * 4 + [accuracy - 0.2, accuracy - 0.1, accuracy - 0.05, accuracy],
                "eval/loss": [NAN] * 4 + [1.3, 1.0, 0.8, 0.7],
            }
        )
        for trial, accuracy in zip(trials["trial"], trials["accuracy"].astype(float), strict=True)
    ]
    return pd.concat(curves) if curves else pd.DataFrame(columns=POINT_COLUMNS)


DRAW: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Path], None]] = {
    "accuracy_curve": lambda points, _, path: accuracy_curve(points[points["trial"] == "t0000"], "t0000", path),
    "loss_curve": lambda points, _, path: loss_curve(points[points["trial"] == "t0000"], "t0000", path),
    "learning_curves": lambda points, trials, path: learning_curves(points, trials, "curves", path),
    "optimization_history": lambda _, trials, path: optimization_history(trials, "x", path, baseline=0.74, bound=0.945),
    "accuracy_against_parameters": lambda _, trials, path: accuracy_against_parameters(trials, 100_000, "size", path),
    "parallel_coordinates": lambda _, trials, path: parallel_coordinates(trials, COLUMNS, "space", path),
}
STUDIES = {
    "many": study(14),
    "one": study(1),
    "all pruned": study(14).assign(state="PRUNED", baseline=False),
    "identical": study(14).assign(accuracy=0.8, rank=4, learning_rate=1e-3, targets="qv", trainable_parameters=50_000),
    "nothing measured": study(14).assign(accuracy=NAN),
    "no trial": study(0),
}


def shows(path: Path, colour: str) -> bool:
    """Whether more than a few pixels have this colour, or nearly: thin lines are drawn paler, and so are edges."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return bool((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=-1) <= 40).sum() > 20)


@pytest.mark.parametrize("trials", STUDIES.values(), ids=STUDIES.keys())
@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW.keys())
def test_every_figure_of_every_study_is_one_whole_picture(
    draw: Callable[[pd.DataFrame, pd.DataFrame, Path], None], trials: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "figures" / "picture.png"
    draw(points_of(trials), trials, path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as image:
        assert image.size == (1500, 900)
        assert image.format == "PNG"


def test_a_curve_shows_its_measure_and_nothing_where_none_was_taken(tmp_path: Path) -> None:
    points = points_of(study(1))
    accuracy_curve(points, "t0000", tmp_path / "accuracy.png")
    loss_curve(points, "t0000", tmp_path / "loss.png")
    accuracy_curve(points.assign(**{"eval/accuracy": np.inf}), "t0000", tmp_path / "none.png")
    assert shows(tmp_path / "accuracy.png", canvas.BLUE)
    assert shows(tmp_path / "loss.png", canvas.VERMILION)
    assert not shows(tmp_path / "none.png", canvas.BLUE)


def test_history_shows_the_bound_and_the_best_so_far_only_where_there_are_some(tmp_path: Path) -> None:
    trials = study(14)
    optimization_history(trials, "history", tmp_path / "all.png", baseline=0.74, bound=0.945)
    optimization_history(trials.assign(state="PRUNED"), "history", tmp_path / "less.png")
    for colour in (canvas.GREEN, canvas.ORANGE, canvas.BLUE):
        assert shows(tmp_path / "all.png", colour)
        assert not shows(tmp_path / "less.png", colour)


def test_sizes_show_each_preset_in_its_own_colour(tmp_path: Path) -> None:
    trials = study(14)
    accuracy_against_parameters(trials, 100_000, "size", tmp_path / "all.png")
    accuracy_against_parameters(trials[trials["targets"] == "qv"], 100_000, "size", tmp_path / "one.png")
    assert shows(tmp_path / "all.png", canvas.SKY)
    assert shows(tmp_path / "one.png", canvas.BLUE)
    assert not shows(tmp_path / "one.png", canvas.SKY)


def test_learning_curves_tell_best_and_baseline_from_the_rest(tmp_path: Path) -> None:
    trials = study(14)
    learning_curves(points_of(trials), trials, "curves", tmp_path / "all.png")
    pruned = trials.assign(state="PRUNED")
    learning_curves(points_of(pruned), pruned, "curves", tmp_path / "pruned.png")
    assert shows(tmp_path / "all.png", canvas.ORANGE)
    assert shows(tmp_path / "all.png", canvas.SKY)
    assert not shows(tmp_path / "pruned.png", canvas.ORANGE)


def test_failed_trial_changes_no_picture_of_accuracies(tmp_path: Path) -> None:
    trials = study(6)
    with_accuracy = trials.assign(accuracy=trials["accuracy"].astype(float).fillna(0.1))  # reported before it failed
    for name, frame in (("nan", trials), ("reported", with_accuracy)):
        optimization_history(frame, "history", tmp_path / f"{name}.png")
    assert (tmp_path / "nan.png").read_bytes() == (tmp_path / "reported.png").read_bytes()


@pytest.mark.parametrize("importances", [{"rank": 0.7, "targets": 0.3}, {"rank_qv": 1.0}, {"a": 0.0, "b": 0.0}])
def test_importance_has_a_bar_for_what_mattered(importances: dict[str, float], tmp_path: Path) -> None:
    parameter_importance(importances, "importance", tmp_path / "importance.png")
    assert shows(tmp_path / "importance.png", canvas.BLUE) == any(importances.values())


@pytest.mark.parametrize("importances", [{}, {"rank": NAN}])
def test_importance_of_too_few_trials_has_no_bar(importances: dict[str, float], tmp_path: Path) -> None:
    parameter_importance(importances, "importance", tmp_path / "importance.png")
    assert not shows(tmp_path / "importance.png", canvas.BLUE)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.7, 0.8, 0.85, 0.9])), max_size=12))
def test_pareto_front_is_what_no_trial_beats(sizes_and_accuracies: list[tuple[int, float]]) -> None:
    trials = pd.DataFrame(sizes_and_accuracies, columns=["trainable_parameters", "accuracy"], dtype=float)
    front = set(pareto_front(trials).itertuples(index=False, name=None))
    assert front == {
        (size, accuracy)
        for size, accuracy in sizes_and_accuracies
        if not any(
            (other, better) != (size, accuracy) and other <= size and better >= accuracy
            for other, better in sizes_and_accuracies
        )
    }


def test_figures_do_without_pyplot() -> None:
    script = "import sys, agnews_lora.reporting.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
