import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from agnews_lora.training.hf_trainer import AccuracyAndMacroF1
from agnews_lora.training.metrics import accuracy, accuracy_interval, by_length, macro_f1, mean_cross_entropy


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_scores_are_sklearns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    assert accuracy(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert macro_f1(predicted, labels) == pytest.approx(f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("scale", [1, 10, 1000])
def test_mean_cross_entropy_is_torchs(scale: float) -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(200, 4)).astype(np.float32) * scale
    labels = random.integers(0, 4, size=200)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert mean_cross_entropy(logits, labels) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_a_logit_that_is_not_finite_is_not_hidden(value: float) -> None:
    logits = np.array([[0.0, 1.0], [value, value]], dtype=np.float32)
    assert not np.isfinite(mean_cross_entropy(logits, np.array([0, 1])))


def test_the_metric_needs_no_hub_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    predicted, labels = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 1, 2, 1])
    got = AccuracyAndMacroF1(keep_in_memory=True).compute(predictions=predicted, references=labels)
    assert got == {"accuracy": 0.8, "macro_f1": macro_f1(predicted, labels)}


def test_the_interval_is_wilsons_and_seeds_widen_it() -> None:
    # By hand: (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert accuracy_interval(0.8, 10) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    low, high = accuracy_interval(1.0, 100)
    assert 0.95 < low < high == 1.0 and accuracy_interval(0.0, 100) == pytest.approx((0.0, 1 - low))
    # With as much variance between seeds as between rows, it is that of half as many rows.
    assert accuracy_interval(0.8, 100, seed_variance=0.16 / 100) == pytest.approx(accuracy_interval(0.8, 50))


@given(st.lists(st.integers(1, 99), min_size=1, max_size=99), st.integers(1, 20))
def test_by_length_covers_every_position_longest_first(lengths: list[int], batch_size: int) -> None:
    cut = by_length(np.array(lengths), batch_size)
    flat = [position for batch in cut for position in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[position] for position in flat] == sorted(lengths, reverse=True)
