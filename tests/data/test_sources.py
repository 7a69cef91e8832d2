import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agnews_lora.data import newswire
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import (
    HUB_DATASET,
    HUB_REVISION,
    DataSettings,
    check,
    describe,
    load,
    prepare,
    prepare_test,
)
from agnews_lora.errors import DataError, NetworkError
from tests import loopback_hub
from tests.tiny import tiny_base

HUB = DataSettings("hub")
NEWSWIRE = DataSettings("newswire", rows=40, test_rows=20)
LARGER = DataSettings("newswire", rows=200, test_rows=40)
CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture
def csv_files(tmp_path, monkeypatch):
    """Settings of 40 training and 8 test rows in files named relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("".join(f"{row % 4 + 1},title {row},text\n" for row in range(40)))
    Path("test.csv").write_text("".join(f"{row % 4 + 1},test {row},text\n" for row in range(8)))
    return DataSettings("csv", "train.csv", "test.csv")


def test_csv_splits_come_from_their_own_files(csv_files):
    check(csv_files)
    train, test = load(csv_files, "train", seed=0), load(csv_files, "test", seed=0)
    assert (len(train), train.texts[5], train.labels[5]) == (40, "title 5 text", 1)
    assert (len(test), test.texts[0]) == (8, "test 0 text")


def test_caps_are_stratified_and_follow_the_seed(csv_files):
    capped = replace(csv_files, rows=12, test_rows=4)
    rows = load(capped, "train", seed=3)
    assert [rows.labels.count(label) for label in range(4)] == [3] * 4
    assert rows == load(capped, "train", seed=3)
    assert rows != load(capped, "train", seed=4)
    assert sorted(load(capped, "test", seed=3).labels) == [0, 1, 2, 3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_check_names_the_csv_file_that_cannot_be_read(csv_files, split):
    Path(f"{split}.csv").unlink()
    with pytest.raises(DataError, match=rf"data\.{split}: Cannot read {split}\.csv: No such file"):
        check(csv_files)


@pytest.mark.timeout(10)
def test_check_waits_for_no_pipe(csv_files):
    Path("test.csv").unlink()
    os.mkfifo("test.csv")
    with pytest.raises(DataError, match=r"data\.test: Cannot read test\.csv: it is no regular file"):
        check(csv_files)


def test_check_reads_no_rows(csv_files):
    Path("train.csv").write_text("malformed")
    check(csv_files)
    with pytest.raises(DataError, match=r"Cannot read train\.csv: .*\n  line 1"):
        load(csv_files, "train", seed=0)


def test_newswire_makes_the_rows_asked_for():
    check(NEWSWIRE)
    assert load(NEWSWIRE, "train", seed=5) == newswire.generate(40, "train", 5)
    assert load(NEWSWIRE, "test", seed=5) == newswire.generate(20, "test", 5)


def test_provenance_carries_no_path(csv_files, tmp_path):
    assert describe(HUB) == {"source": "hub", "dataset": HUB_DATASET, "revision": HUB_REVISION}
    there = replace(csv_files, train=str(tmp_path / "train.csv"))
    assert describe(there) == {"source": "csv", "train": "train.csv", "test": "test.csv"}
    assert describe(NEWSWIRE) == {"source": "newswire", "rows": "40", "test_rows": "20"}


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """A machine with an empty cache, whose hub is a closed port."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize(
    "call", [check, lambda settings: load(settings, "train", 0), lambda settings: load(settings, "test", 0)]
)
def test_without_the_hub_the_way_out_is_named(unreachable, call):
    with pytest.raises(NetworkError) as caught:
        call(HUB)
    message = str(caught.value)
    assert message.startswith(
        f"Cannot get data set {HUB_DATASET}: it is not on this machine, and the hub ({CLOSED}) cannot be reached"
    )
    assert "experiment: embedded" in message
    assert "source: csv" in message


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("corpus") / "bert", "bert")


@pytest.fixture(scope="session")
def build(tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def build(settings=LARGER, seed=0, eval_rows=12):
        return prepare(settings, seed, tokenizer, 64, eval_rows, cache)

    return build


def classes(labels) -> list[int]:
    return [list(labels).count(label) for label in range(4)]


def test_rows_are_split_by_class_and_tokenised_in_order(build):
    corpus = build()
    assert (len(corpus.train), len(corpus.validation)) == (180, 20)
    rows = newswire.generate(200, "train", 0)
    assert sorted(corpus.train_rows.texts + corpus.validation_rows.texts) == sorted(rows.texts)
    for table, part in ((corpus.train, corpus.train_rows), (corpus.validation, corpus.validation_rows)):
        assert table.labels.tolist() == list(part.labels)
        whole = classes(rows.labels)
        assert all(
            abs(count - share * len(part) / 200) < 1 for count, share in zip(classes(part.labels), whole, strict=True)
        )
    assert corpus.best_accuracy == newswire.BEST_ACCURACY


def test_the_monitor_is_a_fixed_stratified_part_of_the_validation_rows(build):
    corpus = build()
    assert len(corpus.monitor) == 12 == len(set(corpus.monitor))
    assert min(classes(corpus.validation.labels[list(corpus.monitor)])) >= 2
    assert corpus.monitor == build().monitor
    assert build(eval_rows=500).monitor == tuple(range(20))


def test_training_cap_leaves_the_validation_rows_alone(build):
    whole, capped = build(), build(replace(LARGER, train_rows=40))
    assert len(capped.train) == 40
    assert set(capped.train_rows.texts) <= set(whole.train_rows.texts)
    assert capped.validation_rows == whole.validation_rows
    assert capped.digest != whole.digest


def test_the_digest_follows_the_rows_used(build):
    assert build().digest == build(eval_rows=5).digest
    assert len({build().digest, build(seed=1).digest, build(replace(LARGER, validation=0.2)).digest}) == 3


def test_the_test_split_is_another_and_read_apart(build, tokenizer, tmp_path):
    corpus = build()
    rows, table = prepare_test(LARGER, 0, tokenizer, 64, tmp_path)
    assert len(rows) == len(table) == 40
    assert table.labels.tolist() == list(rows.labels)
    assert not set(rows.texts) & set(corpus.train_rows.texts + corpus.validation_rows.texts)


def test_searching_never_reads_the_test_split(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("".join(f"{row % 4 + 1},title {row},text\n" for row in range(80)))
    Path("test.csv").write_text("malformed")
    corpus = build(DataSettings("csv", "train.csv", "test.csv", 60, None, None, 0.2))
    assert (len(corpus.train), len(corpus.validation), corpus.best_accuracy) == (48, 12, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (replace(LARGER, rows=30), "the validation split: none of its 3 rows is"),
        (replace(LARGER, train_rows=3), "the training split: none of its 3 rows is"),
    ],
)
def test_a_split_without_every_class_is_refused(build, settings, said):
    with pytest.raises(DataError, match=said):
        build(settings)


def test_a_test_split_without_every_class_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="Cannot use the test split"):
        prepare_test(replace(LARGER, test_rows=2), 0, tokenizer, 64, tmp_path)


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
"""
CLEANED = "Messier's lawyer"
LOAD = f"""
from agnews_lora.data.sources import DataSettings, check, load
settings = {HUB!r}
check(settings)
print(load(settings, "train", 0), load(settings, "test", 0))
"""


def load_in_new_process(endpoint: str, home: Path) -> str:
    """What `LOAD` prints where the hub's clients find this hub and this cache (they read both at import)."""
    surroundings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        surroundings.pop(name, None)
    done = subprocess.run([sys.executable, "-c", LOAD], env=surroundings, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_hub_rows_are_downloaded_at_the_pinned_revision_then_read_from_the_cache(tmp_path):
    folder = tmp_path / "ag_news"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split, texts, labels in (("train", ["Messier #39;s lawyer", "b"], [0, 3]), ("test", ["c"], [2])):
        table = pa.table({"text": texts, "label": pa.array(labels, pa.int64())})
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    expected = f"{Rows((CLEANED, 'b'), (0, 3))} {Rows(('c',), (2,))}"
    with loopback_hub.serve({f"datasets/{HUB_DATASET}": (HUB_REVISION, folder)}) as endpoint:
        assert load_in_new_process(endpoint, tmp_path / "home") == expected
    assert load_in_new_process(CLOSED, tmp_path / "home") == expected
