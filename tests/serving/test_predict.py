import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agnews_lora.adapters.adapter_files import RECORD
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.families import Family
from agnews_lora.data.newswire import LABELS
from agnews_lora.errors import DataError
from agnews_lora.serving.predict import Classifier
from tests.serving.conftest import SPEC, World, write_adapter
from tests.tiny import SENTENCES, tiny_base


@pytest.fixture(scope="module")
def classifier(world: World) -> Classifier:
    return Classifier(world.good, world.base.folder, world.base)


def test_it_answers_as_it_did_on_the_token_table(classifier: Classifier, world: World) -> None:
    rows = world.corpus.validation_rows
    predictions = classifier.predict(rows.texts)
    assert [each.label for each in predictions] == [LABELS[label] for label in rows.labels]
    assert len({each.label for each in predictions}) == 4
    for prediction in predictions:
        assert tuple(prediction.probabilities) == LABELS
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.probabilities[prediction.label] == max(prediction.probabilities.values())
    assert classifier.predict([]) == []


def test_batches_change_nothing(classifier: Classifier, world: World) -> None:
    texts = world.test[0].texts[:17]
    one, many = classifier.predict(texts, batch_size=1), classifier.predict(texts, batch_size=16)
    probabilities = [[list(each.probabilities.values()) for each in predictions] for predictions in (one, many)]
    assert np.allclose(*probabilities, atol=1e-5)


def test_texts_are_cleaned_as_those_it_was_trained_on(classifier: Classifier, world: World, tmp_path: Path) -> None:
    """As the record says; one without a word on it is of a release that always cleaned."""
    texts = ["Bush #39;s  &lt;b&gt;tax&lt;/b&gt; plan\\falls", "Bush's tax plan falls"]
    raw, clean = classifier.predict(texts)
    assert raw == clean
    record = json.loads((world.good / RECORD).read_text())
    for change, same in (({"clean": None}, False), ({}, True)):
        adapter = shutil.copytree(world.good, tmp_path / str(same))
        written = {key: value for key, value in record.items() if key != "clean"} | change
        (adapter / RECORD).write_text(json.dumps(written))
        raw, clean = Classifier(adapter, world.base.folder, world.base).predict(texts)
        assert (raw == clean) == same


def test_empty_texts_are_named(classifier: Classifier) -> None:
    with pytest.raises(
        DataError, match=r"text 1 has nothing visible in it after cleaning; text 3 has .*; text 4 has .*; text 5 has"
    ):
        classifier.predict(["Oil rose.", "  ", "Shares fell.", "&lt;br&gt;", "\x00\x1b", "\u200b\u202e\ufeff"])


@pytest.mark.parametrize(("family", "head"), [("bert", "full"), ("roberta", "full"), ("roberta", "out_proj")])
def test_merged_it_is_a_plain_model_with_the_same_answers(tmp_path: Path, family: Family, head: str) -> None:
    base = resolve(str(tiny_base(tmp_path / "base", family)))
    adapter = write_adapter(tmp_path / "adapter", base, replace(SPEC, targets="all-linear", alpha=16, head=head))
    apart, merged = (Classifier(adapter, base.folder, base, merged) for merged in (False, True))
    assert not [name for name, _ in merged._model.named_modules() if "lora" in name or "modules_to_save" in name]
    table = apart._tokenise(SENTENCES)
    assert np.abs(merged.logits(table) - apart.logits(table)).max() < 1e-4
    assert [each.label for each in merged.predict(SENTENCES)] == [each.label for each in apart.predict(SENTENCES)]


def test_threads_take_turns(classifier: Classifier, world: World) -> None:
    texts = world.test[0].texts[:60]
    expected = [classifier.predict([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda text: classifier.predict([text])[0], texts))
    assert [each.label for each in answers] == [each.label for each in expected]
    probabilities = [[list(each.probabilities.values()) for each in predictions] for predictions in (answers, expected)]
    assert np.allclose(*probabilities, atol=1e-6)
