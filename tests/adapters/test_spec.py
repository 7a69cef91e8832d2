import pytest

from agnews_lora.adapters.spec import TrialSpec

VALID = {"targets": "qv", "rank": 8, "alpha": 16.0, "dropout": 0.1, "learning_rate": 1e-3, "head": "out_proj"}


def test_a_dict_and_back() -> None:
    assert TrialSpec(**TrialSpec(**VALID).as_dict()) == TrialSpec(**VALID)


def test_in_words() -> None:
    assert str(TrialSpec(**VALID)) == "qv r=8 alpha=16 dropout=0.1 lr=0.001 head=out_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank >= 1 must hold, but got 0"),
        ({"dropout": 1.0}, "0 <= dropout < 1 must hold, but got 1.0"),
        ({"dropout": -0.1}, "0 <= dropout < 1 must hold, but got -0.1"),
        ({"alpha": 0}, "alpha > 0 and learning_rate >= 0 must hold, but got 0, 0.001"),
        ({"learning_rate": -1e-3}, "alpha > 0 and learning_rate >= 0 must hold, but got 16.0, -0.001"),
    ],
)
def test_values_that_no_adapter_can_have(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrialSpec(**{**VALID, **change})
