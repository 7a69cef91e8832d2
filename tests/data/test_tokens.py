import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from agnews_lora.data import tokens
from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import TokenTable, load_tokenizer, tokenise, tokenizer_digest
from agnews_lora.errors import BaseModelError, StorageError
from tests.tiny import SENTENCES, tiny_base

ROWS = Rows(SENTENCES, (0, 0, 1, 1, 2, 2, 3, 3))


@pytest.fixture(scope="session", params=["bert", "roberta"])
def tokenizer(request, tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("tokenizers") / "one", "bert")


def same(first: TokenTable, second: TokenTable) -> bool:
    return (
        np.array_equal(first.ids, second.ids)
        and np.array_equal(first.offsets, second.offsets)
        and np.array_equal(first.labels, second.labels)
        and first.pad_id == second.pad_id
    )


def test_rows_are_what_the_tokenizer_gives(tokenizer, tmp_path):
    table = tokenise(ROWS, tokenizer, 128, tmp_path)
    reference = load_tokenizer(tokenizer)
    assert len(table) == len(ROWS)
    for index, text in enumerate(ROWS.texts):
        assert table.row(index).tolist() == reference(text)["input_ids"]
        assert table.lengths[index] == len(table.row(index))
    assert table.labels.tolist() == list(ROWS.labels)
    assert table.pad_id == reference.pad_token_id
    assert (table.ids.dtype, table.offsets.dtype, table.labels.dtype) == (np.int32, np.int64, np.int64)


def test_long_rows_are_cut_with_their_special_tokens_kept(tokenizer, tmp_path):
    table = tokenise(ROWS, tokenizer, 7, tmp_path)
    reference = load_tokenizer(tokenizer)
    assert table.lengths.tolist() == [7] * len(ROWS)
    for index in range(len(table)):
        assert table.row(index)[0] == reference.cls_token_id
        assert table.row(index)[-1] == reference.sep_token_id


def test_padded_is_what_the_tokenizer_pads(tokenizer, tmp_path):
    rows = Rows(("Oil prices rose.", "A truce.", *SENTENCES[:2]), (2, 0, 0, 0))
    table = tokenise(rows, tokenizer, 128, tmp_path)
    chosen = [2, 0, 1]
    reference = load_tokenizer(tokenizer)([rows.texts[row] for row in chosen], padding="longest", return_tensors="np")
    input_ids, attention_mask, labels = table.padded(chosen)
    assert input_ids.tolist() == reference["input_ids"].tolist()
    assert attention_mask.tolist() == reference["attention_mask"].tolist()
    assert labels.tolist() == [0, 2, 0]
    assert {array.dtype for array in (input_ids, attention_mask, labels)} == {np.dtype(np.int64)}
    assert table.padded([1])[1].all()


def test_take_keeps_the_order_asked(bert, tmp_path):
    table = tokenise(ROWS, bert, 128, tmp_path)
    taken = table.take([6, 1])
    assert [taken.row(0).tolist(), taken.row(1).tolist()] == [table.row(6).tolist(), table.row(1).tolist()]
    assert taken.labels.tolist() == [3, 0]
    assert len(table.take([])) == 0


def test_a_second_call_reads_the_file_of_the_first(bert, tmp_path, monkeypatch):
    first = tokenise(ROWS, bert, 128, tmp_path)
    monkeypatch.setattr(tokens, "load_tokenizer", lambda folder: pytest.fail("tokenised twice"))
    assert same(first, tokenise(ROWS, bert, 128, tmp_path))
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".safetensors"]


def test_rows_tokenizer_and_length_each_have_their_own_entry(tmp_path, bert):
    other = shutil.copytree(bert, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 64}))
    cache = tmp_path / "cache"
    tokenise(ROWS, bert, 128, cache)
    tokenise(ROWS, bert, 127, cache)
    tokenise(ROWS.take(range(7)), bert, 128, cache)
    tokenise(Rows(ROWS.texts, ROWS.labels[::-1]), bert, 128, cache)
    tokenise(ROWS, other, 128, cache)
    assert len(list(cache.iterdir())) == 5


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def foreign(file: Path) -> None:
    save_file({"weights": np.zeros(3)}, file)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, foreign, flip_a_bit, Path.unlink, lambda file: file.write_text("null")])
def test_a_damaged_or_foreign_file_is_made_anew(bert, tmp_path, monkeypatch, damage):
    first = tokenise(ROWS, bert, 128, tmp_path)
    [path] = tmp_path.iterdir()
    damage(path)
    assert same(tokenise(ROWS, bert, 128, tmp_path), first)
    monkeypatch.setattr(tokens, "load_tokenizer", lambda folder: pytest.fail("the damaged file is still there"))
    assert same(tokenise(ROWS, bert, 128, tmp_path), first)
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_race_get_the_same_table(bert, tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        first, *others = pool.starmap(tokenise, [(ROWS, bert, 128, tmp_path)] * 8, chunksize=1)
    assert all(same(first, other) for other in others)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(bert, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"Cannot write the token cache .*cache: "):
        tokenise(ROWS, bert, 128, tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
def test_a_locked_cache_is_named_and_left_empty(bert, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        tokenise(ROWS, bert, 128, tmp_path)
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_digest_follows_the_files_that_a_tokenizer_is_read_from(tmp_path):
    digests = []
    for name in ("merges.txt", "tokenizer_config.json", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text("{}")
        digests.append(tokenizer_digest(tmp_path))
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_a_tokenizer_that_cannot_be_read_is_named(bert, tmp_path):
    broken = shutil.copytree(bert, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"Cannot read the tokenizer in .*broken: "):
        load_tokenizer(broken)


def test_a_tokenizer_without_padding_is_refused(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "unpadded")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config.pop("pad_token")
            (folder / name).write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(BaseModelError, match="it has no padding token"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("multiple_of", "at_most", "width"), [(1, 9, 5), (2, 6, 6), (5, 9, 5), (8, None, 8), (8, 7, 7)]
)
def test_padding_to_a_multiple_adds_padding_alone(multiple_of: int, at_most: int | None, width: int) -> None:
    ids, offsets = np.arange(10, 18, dtype=np.int32), np.array([0, 3, 8])
    table = TokenTable(ids, offsets, labels=np.array([1, 2]), pad_id=0)
    input_ids, attention_mask, labels = table.padded([0, 1], multiple_of, at_most)
    assert input_ids.shape == attention_mask.shape == (2, width)
    assert attention_mask.sum(axis=1).tolist() == [3, 5]
    assert input_ids[attention_mask == 1].tolist() == list(range(10, 18))
    assert not input_ids[attention_mask == 0].any()
    assert labels.tolist() == [1, 2]
