import os
from dataclasses import replace
from pathlib import Path

import pytest

from agnews_lora.data import newswire
from agnews_lora.data.corpus import prepare, prepare_test
from agnews_lora.data.sources import DataSettings
from agnews_lora.errors import DataError
from tests.tiny import tiny_base

NEWSWIRE = DataSettings("newswire", None, None, 200, None, 40, 0.1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("corpus") / "bert", "bert")


@pytest.fixture(scope="session")
def build(tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def build(settings=NEWSWIRE, seed=0, eval_rows=12):
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
    whole, capped = build(), build(replace(NEWSWIRE, train_rows=40))
    assert len(capped.train) == 40
    assert set(capped.train_rows.texts) <= set(whole.train_rows.texts)
    assert capped.validation_rows == whole.validation_rows
    assert capped.digest != whole.digest


def test_the_digest_follows_the_rows_used(build):
    assert build().digest == build(eval_rows=5).digest
    assert len({build().digest, build(seed=1).digest, build(replace(NEWSWIRE, validation=0.2)).digest}) == 3


def test_the_test_split_is_another_and_read_apart(build, tokenizer, tmp_path):
    corpus = build()
    rows, table = prepare_test(NEWSWIRE, 0, tokenizer, 64, tmp_path)
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
        (replace(NEWSWIRE, rows=30), "the validation split needs rows of every class, but of its 3 rows none is"),
        (replace(NEWSWIRE, validation=0.0), "the validation split needs rows of every class, but of its 0 rows"),
        (replace(NEWSWIRE, train_rows=3), "the training split needs rows of every class, but of its 3 rows none is"),
        (replace(NEWSWIRE, rows=4, validation=1.0), "the training split .* of its 0 rows none is World or Sports or"),
    ],
)
def test_a_split_without_every_class_is_refused(build, settings, said):
    with pytest.raises(DataError, match=said):
        build(settings)


def test_a_test_split_without_every_class_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="the test split needs rows of every class"):
        prepare_test(replace(NEWSWIRE, test_rows=2), 0, tokenizer, 64, tmp_path)


@pytest.mark.skipif("AG_NEWS_DIR" not in os.environ, reason="AG_NEWS_DIR names no folder with the real AG News rows")
def test_real_rows_make_a_corpus(build):
    folder = Path(os.environ["AG_NEWS_DIR"])
    settings = DataSettings("csv", str(folder / "train.csv"), str(folder / "test.csv"), 4000, 3000, None, 0.25)
    corpus = build(settings, eval_rows=400)
    assert (len(corpus.train), len(corpus.validation), len(corpus.monitor)) == (3000, 1000, 400)
    assert max(classes(corpus.train.labels)) - min(classes(corpus.train.labels)) < 100
