from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agnews_lora.reporting.winner import (
    NUM_BINS,
    calibration,
    classes,
    confusion,
    confusion_matrix,
    expected_calibration_error,
    mistakes,
    reliability,
)

pytestmark = pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")

CLASSES = ["World", "Sports", "Business", "Sci/Tech"]


def predictions(labels: list[int], probabilities: list[list[float]]) -> pd.DataFrame:
    given_to = np.asarray(probabilities, dtype=float).reshape(-1, len(CLASSES))
    names = np.asarray(CLASSES)
    columns = {name: given_to[:, index] for index, name in enumerate(CLASSES)}
    facts = {"row": range(len(labels)), "label": names[labels], "predicted": names[given_to.argmax(axis=1)]}
    return pd.DataFrame({**facts, **columns})


def answers(num_rows: int, seed: int, sharpness: float = 2.0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(CLASSES), num_rows)
    logits = generator.normal(size=(num_rows, len(CLASSES)))
    logits[np.arange(num_rows), labels] += sharpness
    odds = np.exp(logits)
    return predictions(labels.tolist(), (odds / odds.sum(axis=1, keepdims=True)).tolist())


FOUR = predictions(
    [0, 0, 1, 3], [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.05, 0.9, 0.03, 0.02], [0.1, 0.1, 0.75, 0.05]]
)


@pytest.mark.parametrize("draw", [confusion_matrix, calibration])
@pytest.mark.parametrize("num_rows", [0, 1, 1_000])
def test_every_figure_is_one_whole_picture(
    draw: Callable[[pd.DataFrame, str, Path], None], num_rows: int, tmp_path: Path
) -> None:
    path = tmp_path / "figures" / "picture.png"
    draw(answers(num_rows, 1) if num_rows else predictions([], []), "t0007 on the validation rows", path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as image:
        assert image.size == (1500, 900) and image.format == "PNG"


def test_classes_are_the_columns_after_the_facts_in_their_order() -> None:
    assert classes(FOUR) == CLASSES
    assert classes(predictions([], [])) == CLASSES


def test_confusion_counts_labels_down_and_predictions_across() -> None:
    assert confusion(FOUR).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_an_answer_on_an_edge_belongs_to_the_bin_below_and_empty_bins_are_left_out() -> None:
    frame = predictions([0, 0, 1], [[0.7, 0.1, 0.1, 0.1], [0.71, 0.09, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    bins = reliability(frame)
    assert bins["low"].tolist() == [0.6, 0.7, 0.9]
    assert bins["count"].tolist() == [1, 1, 1]
    assert bins["accuracy"].tolist() == [1.0, 1.0, 0.0]
    assert bins["confidence"].tolist() == [0.7, 0.71, 1.0]


def test_expected_calibration_error_is_the_mean_gap_over_the_answers() -> None:
    frame = predictions([0, 1, 0], [[0.8, 0.1, 0.05, 0.05], [0.8, 0.1, 0.05, 0.05], [0.95, 0.05, 0.0, 0.0]])
    # One bin of two answers, half of them right at a confidence of 0.8; one of one, right at 0.95.
    assert expected_calibration_error(reliability(frame)) == pytest.approx((2 * 0.3 + 0.05) / 3)


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.floats(0, 6))
def test_bins_hold_every_answer_once_between_their_edges(num_rows: int, seed: int, sharpness: float) -> None:
    frame = answers(num_rows, seed, sharpness)
    bins = reliability(frame)
    assert bins["count"].sum() == num_rows
    assert (bins["count"] > 0).all() and bins["low"].is_monotonic_increasing and bins["low"].is_unique
    assert (bins["confidence"] > bins["low"] - 1e-12).all()
    assert (bins["confidence"] <= bins["low"] + 1 / NUM_BINS + 1e-12).all()
    right = (frame["label"] == frame["predicted"]).mean()
    assert (bins["accuracy"] * bins["count"]).sum() == pytest.approx(right * num_rows)
    error = expected_calibration_error(bins)
    assert 0 <= error <= 1
    mean_gap = abs(right - frame[CLASSES].max(axis=1).mean())
    assert error >= mean_gap - 1e-9, "the gaps of bins can only cancel out in the mean"


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_confusion_holds_every_answer_once(num_rows: int, seed: int) -> None:
    frame = answers(num_rows, seed, 1.0)
    counts = confusion(frame)
    assert counts.sum() == num_rows
    assert counts.trace() == (frame["label"] == frame["predicted"]).sum()
    assert counts.sum(axis=1).tolist() == [(frame["label"] == name).sum() for name in CLASSES]


def test_mistakes_are_the_wrong_answers_surest_first_with_their_texts() -> None:
    texts = ["zero", "one", "two", "<b>three</b> | a\nb"]
    table = mistakes(FOUR, texts)
    assert table.columns.tolist() == ["row", "label", "predicted", "confidence", "text"]
    assert table.values.tolist() == [
        [3, "Sci/Tech", "Business", 0.75, "<b>three</b> | a\nb"],
        [1, "World", "Sports", 0.6, "one"],
    ]
    assert mistakes(FOUR, texts, count=1)["row"].tolist() == [3]


def test_mistakes_of_a_model_without_any_are_an_empty_table() -> None:
    table = mistakes(FOUR.iloc[[0, 2]], ["zero", "one", "two", "three"])
    assert table.empty and table.columns.tolist() == ["row", "label", "predicted", "confidence", "text"]


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_no_wrong_answer_that_was_surer_is_left_out(num_rows: int, seed: int, count: int) -> None:
    frame = answers(num_rows, seed, 0.5)
    table = mistakes(frame, [f"text {row}" for row in range(num_rows)], count)
    wrong = frame[frame["label"] != frame["predicted"]]
    assert len(table) == min(count, len(wrong))
    assert table["confidence"].is_monotonic_decreasing
    assert [f"text {row}" for row in table["row"]] == table["text"].tolist()
    left = wrong[~wrong["row"].isin(table["row"])]
    if len(left):
        assert left[CLASSES].max(axis=1).max() <= table["confidence"].min()
