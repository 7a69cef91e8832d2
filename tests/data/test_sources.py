import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from agnews_lora.data import newswire
from agnews_lora.data.sources import (
    DataSettings,
    check,
    describe,
    label_names,
    load,
    prepare,
    prepare_test,
)
from agnews_lora.errors import DataError, NetworkError
from tests import loopback_hub
from tests.tiny import tiny_base

DATASET = "fancyzhx/ag_news"
REVISION = "eb185aade064a813bc0b7f42de02595523103ca4"
NAMES = ("World", "Sports", "Business", "Sci/Tech")
HUB = DataSettings(
    "hub", "train", "test", dataset=DATASET, revision=REVISION, text=("text",), label="label", clean="ag_news"
)
NEWSWIRE = DataSettings("newswire", rows=40, test_rows=20)
LARGER = DataSettings("newswire", rows=200, test_rows=40)
CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens


def write(name: str, labels, text: str = "text") -> None:
    Path(name).write_text("label,text\n" + "".join(f"{label},{text} {row}\n" for row, label in enumerate(labels)))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Settings of 40 training and 8 test rows of four classes, in files named relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    write("train.csv", [row % 4 + 1 for row in range(40)])
    write("test.csv", [row % 4 + 1 for row in range(8)], "test")
    return DataSettings("files", "train.csv", "test.csv", text=("text",), label="label", labels=NAMES)


def test_splits_come_from_their_own_files(files):
    check(files)
    write("validation.csv", [4, 3, 2, 1], "validation")
    splits = load(replace(files, validation="validation.csv"), seed=0)
    assert (len(splits.train), splits.train.texts[5], splits.train.labels[5]) == (40, "text 5", 1)
    assert (len(splits.test), splits.test.texts[0]) == (8, "test 0")
    assert splits.validation.labels == (3, 2, 1, 0)
    assert splits.labels == NAMES


def test_caps_are_stratified_and_follow_the_seed(files):
    capped = replace(files, rows=12, test_rows=4, validation=0.34)
    splits = load(capped, seed=3)
    assert (classes(splits.train.labels), classes(splits.validation.labels)) == ([2] * 4, [1] * 4)
    assert splits == load(capped, seed=3)
    assert splits != load(capped, seed=4)
    assert sorted(splits.test.labels) == [0, 1, 2, 3]


def test_a_share_for_testing_is_held_out_first_and_does_not_follow_the_caps(files):
    shares = replace(files, test=0.2, validation=0.25)
    splits = load(shares, seed=0)
    parts = [splits.train.texts, splits.validation.texts, splits.test.texts]
    assert [len(part) for part in parts] == [24, 8, 8]
    assert len(set().union(*parts)) == 40
    for capped in (replace(shares, rows=16), replace(shares, train_rows=8), replace(shares, validation=0.5)):
        assert load(capped, seed=0).test == splits.test
    assert load(shares, seed=1).test != splits.test


@pytest.mark.parametrize("counts", [(3, 3), (90, 3), (400, 3, 4, 5), (5, 5, 5, 300)])
def test_a_rare_class_has_rows_in_every_split(files, counts):
    write("train.csv", [label for label, count in enumerate(counts) for _ in range(count)])
    splits = load(replace(files, test=0.1, labels=None), seed=0)
    for part in (splits.train, splits.validation, splits.test):
        assert set(part.labels) == set(range(len(counts)))


def test_a_class_of_two_rows_is_trained_and_validated(files):
    write("train.csv", [*"aaaaaaaaaa", *"bb"])
    splits = load(replace(files, test=0.1, labels=None), seed=0)
    assert [part.labels.count(1) for part in (splits.train, splits.validation, splits.test)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        ("aaaaaaab", None, "class 'b' has 1 row in the training data, of which none is left for validation. Merge it"),
        ("aaaabbbb", ("a", "b", "c"), "class 'c' has 0 rows in the training data, .*Name the classes that have rows"),
        ("abcdefgg", None, r"\(and 5 other classes\). Most classes are as rare: name the column of the classes"),
        ("aaaaaaaa", None, "every label is 'a'"),
        ("aabb", None, "no class has a third row for testing"),
    ],
)
def test_a_class_without_rows_for_a_split_is_named_with_what_mends_it(files, values, labels, said):
    write("train.csv", values)
    with pytest.raises(DataError, match=said):
        load(replace(files, test=0.1, labels=labels), seed=0)


def test_classes_are_merged_by_a_mapping(files):
    splits = load(replace(files, labels={"1": "low", "2": "low", "3": "high", "4": "high"}), seed=0)
    assert splits.labels == ("low", "high")
    assert sorted(Counter(splits.train.labels + splits.validation.labels).values()) == [20, 20]


def test_labels_are_told_without_reading_texts(files):
    assert label_names(files) == NAMES
    assert label_names(replace(files, labels={"1": "a", "2": "b", "3": "a"})) == ("a", "b")
    assert label_names(replace(files, labels=None)) == ("1", "2", "3", "4")
    assert label_names(replace(files, text=("absent",), labels=None)) == ("1", "2", "3", "4")
    assert label_names(NEWSWIRE) == newswire.LABELS


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_check_names_the_file_that_cannot_be_read(files, split):
    with pytest.raises(DataError, match=rf"Cannot read absent\.csv: No such file.*data\.{split}"):
        check(replace(files, **{split: "absent.csv"}))


@pytest.mark.timeout(10)
def test_check_waits_for_no_pipe(files):
    Path("test.csv").unlink()
    os.mkfifo("test.csv")
    with pytest.raises(DataError, match=r"Cannot read test\.csv: it is no regular file.*data\.test"):
        check(files)


def test_check_reads_no_rows(files):
    Path("train.csv").write_text("malformed")
    check(files)
    with pytest.raises(DataError, match=r"train\.csv: it holds no rows"):
        load(files, seed=0)


def test_newswire_makes_the_rows_asked_for():
    check(NEWSWIRE)
    splits = load(replace(NEWSWIRE, train_rows=16), seed=5)
    written = newswire.generate(40, "train", 5)
    assert set(splits.validation.texts) <= set(written.texts) and len(splits.train) == 16
    assert splits.test == newswire.generate(20, "test", 5)


def test_provenance_carries_no_path(files, tmp_path):
    found = {"source": "hub", "dataset": DATASET, "revision": REVISION, "train": "train", "test": "test"}
    there = replace(files, train=str(tmp_path / "train.csv"), test=0.2)
    held_out = {"validation": "0.1 of the training rows"}
    assert describe(HUB) == found | held_out
    assert describe(there) == {"source": "files", "train": "train.csv", "test": "0.2 of the training rows"} | held_out
    assert describe(NEWSWIRE) == {"source": "newswire", "rows": "40", "test_rows": "20"}


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """A machine with an empty cache, whose hub is a closed port."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize("call", [check, label_names, lambda settings: load(settings, 0)])
def test_without_the_hub_the_way_out_is_named(unreachable, call):
    with pytest.raises(NetworkError) as caught:
        call(HUB)
    message = str(caught.value)
    assert message.startswith(
        f"Cannot get data set {DATASET}: it is not on this machine, and the hub ({CLOSED}) cannot be reached"
    )
    assert "experiment `embedded`" in message
    assert "source: files" in message


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


def test_the_test_rows_are_those_that_were_held_out(build, tokenizer, files, tmp_path):
    settings = replace(files, test=0.2)
    corpus, (rows, _) = build(settings), prepare_test(settings, 0, tokenizer, 64, tmp_path)
    assert len(rows) == 8
    assert not set(rows.texts) & set(corpus.train_rows.texts + corpus.validation_rows.texts)


def test_a_file_or_split_that_is_trained_on_is_not_scored_on(files):
    Path("link.csv").symlink_to("train.csv")
    for same in ("train.csv", "./train.csv", "link.csv"):
        for split in ("test", "validation"):
            with pytest.raises(DataError, match=rf"data\.{split}: .* it is the training file"):
                check(replace(files, **{split: same}))
    check(replace(files, test="link.csv", allow_overlap=True))


def test_a_copy_of_the_training_rows_is_refused_before_anything_is_tokenised(build, files, tmp_path):
    Path("copy.csv").write_bytes(Path("train.csv").read_bytes())
    with pytest.raises(DataError, match=r"Cannot score on the test split: 40 of 40 rows"):
        build(replace(files, test="copy.csv"))
    corpus = build(replace(files, test="copy.csv", allow_overlap=True))
    assert corpus.profile["shared"]["train-test"] == 36
    assert "36 of 40 rows (90.00%) of the test split have a text of train as well." in corpus.profile["warnings"]


def test_labels_are_part_of_the_digest(build, files):
    digests = {build(replace(files, labels=labels)).digest for labels in (NAMES, NAMES[::-1], None)}
    assert len(digests) == 3
    assert build(files).labels == NAMES


@pytest.mark.parametrize("settings", [replace(LARGER, rows=6), replace(LARGER, train_rows=3)])
def test_too_few_rows_for_every_class_are_refused(build, settings):
    with pytest.raises(DataError, match="of which none is left for"):
        build(settings)


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
from agnews_lora.data.sources import DataSettings, check, label_names, load
settings = {HUB!r}
check(settings)
print(label_names(settings), load(settings, 0))
"""


def load_in_new_process(endpoint: str, folder: Path) -> str:
    """What `LOAD` prints where the hub's clients find this hub and this cache (they read both at import)."""
    surroundings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        surroundings.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=folder, env=surroundings, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_hub_rows_are_downloaded_at_the_revision_then_read_from_the_cache(tmp_path):
    folder = tmp_path / "ag_news"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    names = datasets.ClassLabel(names=["b", "a"])
    for split, texts, labels in (
        ("train", ["Messier #39;s lawyer", "b", "c", "d"], [0, 1, 0, 1]),
        ("test", ["e"], [1]),
    ):
        features = datasets.Features(text=datasets.Value("string"), label=names)
        made = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        made.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    with loopback_hub.serve({f"datasets/{DATASET}": (REVISION, folder)}) as endpoint:
        loaded = load_in_new_process(endpoint, tmp_path)
    assert (
        loaded.startswith("('b', 'a') Splits(")
        and CLEANED in loaded
        and "test=Rows(texts=('e',), labels=(1,))" in loaded
    )
    assert load_in_new_process(CLOSED, tmp_path) == loaded
