"""Profiles of rows: every number counted by hand, and rows that would be scored after training on them."""

import pytest

from agnews_lora.data.profile import profile, require_apart
from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import encode, load_tokenizer
from agnews_lora.errors import DataError
from tests.tiny import tiny_base

SPLITS = {
    "train": Rows(("a", "a", "b", "c"), (0, 1, 0, 1)),
    "validation": Rows(("b", "d"), (0, 1)),
    "test": Rows(("d", "c", "e"), (0, 1, 1)),
}


def test_every_number_is_counted():
    found = profile(SPLITS, ("no", "yes"), {}, 80)
    assert found["rows"] == {"train": 4, "validation": 2, "test": 3}
    assert found["classes"]["yes"] == {"train": 2, "validation": 1, "test": 2}
    assert found["duplicates"] == {"train": 1, "validation": 0, "test": 0}
    assert found["conflicting"] == 4  # a twice in train, d in validation and in test
    assert found["shared"] == {"train-validation": 1, "train-test": 1, "validation-test": 1}
    assert len(found["warnings"]) == 5


def test_rows_without_fault_give_no_warning():
    splits = {name: Rows((f"{name} 0", f"{name} 1"), (0, 1)) for name in SPLITS}
    assert profile(splits, ("no", "yes"), {}, 80)["warnings"] == []
    lacking = splits | {"test": Rows(("x",), (1,))}
    assert profile(lacking, ("no", "yes"), {}, 80)["warnings"] == ["The test split has no row of 'no'."]


def test_lengths_are_those_before_the_cut(tmp_path):
    tokenizer = load_tokenizer(tiny_base(tmp_path / "base", "roberta"))
    rows = Rows(tuple("Oil prices rose to a record. " * count for count in (1, 2, 5, 40)), (0, 1, 0, 1))
    whole = [len(tokenizer(text)["input_ids"]) for text in rows.texts]
    max_length = whole[1]
    table = encode(rows, tokenizer, max_length)
    assert table.uncut.tolist() == whole
    assert table.lengths.tolist() == [whole[0], *[max_length] * 3]
    [lengths] = profile(dict.fromkeys(SPLITS, rows), ("no", "yes"), {"train": table}, max_length)["tokens"].values()
    assert (lengths["median"], lengths["max"], lengths["cut"]) == (whole[2], whole[3], 0.5)


def rows(*parts: tuple[str, int]) -> Rows:
    texts = tuple(f"{name} {number}" for name, count in parts for number in range(count))
    return Rows(texts, (0,) * len(texts))


@pytest.mark.parametrize("source", ["train", "validation"])
def test_test_rows_that_are_among_the_others_are_refused_above_one_in_a_hundred(source):
    splits = {"train": rows(("train", 300)), "validation": rows(("validation", 100))}
    require_apart(splits | {"test": rows((source, 2), ("test", 198))}, [])
    with pytest.raises(DataError, match=r"3 of 200 rows \(1.50%\) .*`allow_overlap: true`"):
        require_apart(splits | {"test": rows((source, 3), ("test", 197))}, [])


def test_validation_rows_of_a_file_are_compared_with_the_training_rows():
    splits = {"train": rows(("a", 300)), "validation": rows(("a", 5), ("b", 95)), "test": rows(("c", 10))}
    require_apart(splits, ["test"])
    with pytest.raises(DataError, match="Cannot score on the validation split"):
        require_apart(splits, ["validation"])
