from pathlib import Path

import numpy as np
import pytest

from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import RegistryError
from agnews_lora.serving.record import (
    RECORD,
    TENSORS,
    agreement,
    fixed_rows,
    largest_difference,
    read_gate_record,
    record_of,
    token_digest,
    write_record,
)


def table(ids: list[int], offsets: list[int]) -> TokenTable:
    num_rows = len(offsets) - 1
    return TokenTable(
        np.array(ids, dtype=np.int32), np.array(offsets), np.zeros(num_rows, dtype=np.int64), pad_id=0, digest=""
    )


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)


@pytest.fixture
def tokens() -> TokenTable:
    return table(list(range(400)), list(range(0, 401, 2)))


def test_fixed_rows_are_64_evenly_spaced() -> None:
    rows = fixed_rows(12_000)
    assert len(rows) == 64 and rows[0] == 0 and rows[-1] < 12_000
    assert set(np.diff(rows)) == {187, 188}


def test_fixed_rows_are_all_rows_where_there_are_few() -> None:
    assert fixed_rows(3) == [0, 1, 2]


def test_a_record_is_read_as_it_was_written(tmp_path: Path, logits: np.ndarray, tokens: TokenTable) -> None:
    record = record_of(logits, tokens)
    write_record(record, tmp_path, {"torch": "2"})
    read = read_gate_record(tmp_path)
    assert read.tokens == token_digest(tokens)
    assert np.array_equal(read.rows, fixed_rows(200))
    assert np.array_equal(read.logits, logits[fixed_rows(200)])
    assert np.array_equal(read.predicted, logits.argmax(axis=-1))
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, TENSORS}


def test_the_difference_is_that_of_the_fixed_rows(logits: np.ndarray, tokens: TokenTable) -> None:
    record = record_of(logits, tokens)
    moved = logits.copy()
    moved[fixed_rows(200)[5], 2] += 0.5
    assert largest_difference(record, logits) == 0
    assert largest_difference(record, moved) == pytest.approx(0.5, rel=1e-5)


def test_the_agreement_is_over_the_whole_split(logits: np.ndarray, tokens: TokenTable) -> None:
    record = record_of(logits, tokens)
    other = next(row for row in range(200) if row not in fixed_rows(200))
    moved = logits.copy()
    moved[other, (record.predicted[other] + 1) % 4] += 100
    assert agreement(record, logits) == 1.0
    assert agreement(record, moved) == pytest.approx(199 / 200)


def test_token_digest_depends_on_ids_and_on_rows() -> None:
    digests = {token_digest(table(ids, offsets)) for ids, offsets in [([1, 2, 3], [0, 1, 3]), ([1, 2, 4], [0, 1, 3])]}
    digests.add(token_digest(table([1, 2, 3], [0, 2, 3])))
    assert len(digests) == 3


@pytest.mark.parametrize("damaged", [RECORD, TENSORS])
def test_a_record_that_is_not_whole_is_refused(
    tmp_path: Path, logits: np.ndarray, tokens: TokenTable, damaged: str
) -> None:
    write_record(record_of(logits, tokens), tmp_path, {})
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RegistryError, match=r"must hold gate_record.json and gate_record.safetensors"):
        read_gate_record(tmp_path)
