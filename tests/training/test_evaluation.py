import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from agnews_lora.training.evaluation import by_length, macro_f1, scores
from agnews_lora.training.metric import AccuracyAndMacroF1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_macro_f1_is_sklearns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    assert macro_f1(predicted, labels) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_scores_are_sklearns() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(200, 4)).astype(np.float32) * 5
    labels = random.integers(0, 4, size=200)
    got = scores(logits, labels)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert got.accuracy == accuracy_score(labels, logits.argmax(axis=1))
    assert got.loss == pytest.approx(log_loss(labels, probabilities, labels=range(4)), rel=1e-6)


def test_the_metric_needs_no_hub_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    predicted, labels = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 1, 2, 1])
    got = AccuracyAndMacroF1(keep_in_memory=True).compute(predictions=predicted, references=labels)
    assert got == {"accuracy": 0.8, "macro_f1": macro_f1(predicted, labels)}


@given(st.lists(st.integers(1, 99), min_size=1, max_size=99), st.integers(1, 20))
def test_by_length_covers_every_position_longest_first(lengths: list[int], batch_size: int) -> None:
    cut = by_length(np.array(lengths), batch_size)
    flat = [position for batch in cut for position in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[position] for position in flat] == sorted(lengths, reverse=True)
