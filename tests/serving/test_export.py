import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from agnews_lora.adapters.adapter_files import RECORD, load_with_peft, recount
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.data.newswire import LABELS
from agnews_lora.errors import StorageError
from agnews_lora.serving import reload
from agnews_lora.serving.export import export, merged_model
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.versions import Version
from tests.serving.conftest import MAX_LENGTH, SPEC, World, write_adapter
from tests.tiny import SENTENCES, tiny_base


@pytest.fixture(scope="module")
def exported(small: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small, small.champion(), tmp_path_factory.mktemp("exported") / "deeper" / "champion")


def test_peft_and_transformers_alone_load_it(exported: Path, world: World) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(world.base.folder, num_labels=4)
    model = PeftModel.from_pretrained(base, exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    rows, _ = world.test
    tokens = tokenizer(list(rows.texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    with torch.inference_mode():
        predicted = model(**tokens).logits.argmax(dim=-1)
    assert np.array_equal(predicted, rows.labels)
    assert recount(exported) == 644
    record = json.loads((exported / RECORD).read_text())
    assert record["id2label"] == {str(index): label for index, label in enumerate(LABELS)}
    assert record["label2id"] == {label: index for index, label in enumerate(LABELS)}
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in exported.parent.iterdir()] == ["champion"]


@pytest.fixture(scope="module")
def merged(small: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small, small.champion(), tmp_path_factory.mktemp("exported") / "merged", merged=True)


def test_a_pipeline_loads_the_merged_model_and_answers_with_the_names_of_labels(merged: Path, world: World) -> None:
    classify = pipeline("text-classification", model=str(merged), truncation=True)
    rows, table = world.test
    answers = classify([*rows.texts, "Oil prices rose to a record. " * 500])
    assert [answer["label"] for answer in answers[:-1]] == [LABELS[label] for label in rows.labels]
    logits = reload.logits(world.good, world.base, table).astype(np.float64)
    expected = np.exp(logits.max(axis=-1)) / np.exp(logits).sum(axis=-1)
    assert [answer["score"] for answer in answers[:-1]] == pytest.approx(expected, abs=1e-4)
    names = sorted(path.name for path in merged.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((merged / "config.json").read_text())
    assert config["id2label"] == {str(index): label for index, label in enumerate(LABELS)}
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}
    assert config["problem_type"] == "single_label_classification"
    original = json.loads((world.base.folder / "config.json").read_text())
    assert config["hidden_dropout_prob"] == original["hidden_dropout_prob"] > 0


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_merged_model_of_every_family_answers_as_the_adapter_does(tmp_path: Path, family: Family) -> None:
    """On a base that was fine-tuned for something else: its head, its labels and its loss are not taken over."""
    changes = {"problem_type": "regression", "id2label": {0: "spam"}, "label2id": {"spam": 0}}
    base = resolve(str(tiny_base(tmp_path / "base", family, **changes)))
    adapter = write_adapter(tmp_path / "adapter", base, replace(SPEC, targets="all-linear"))
    merged_model(adapter, base).save_pretrained(str(tmp_path / "whole"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.num_labels == 4
    tokens = AutoTokenizer.from_pretrained(base.folder)(list(SENTENCES), padding=True, return_tensors="pt")
    apart = load_with_peft(adapter, base)
    with torch.inference_mode():
        assert torch.allclose(model(**tokens).logits, apart(**tokens).logits, atol=1e-3)  # of about 10
    assert str(tmp_path) not in (tmp_path / "whole" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["exported", "merged"])
def test_no_file_holds_a_path_and_the_base_is_named(kind: str, world: World, request: pytest.FixtureRequest) -> None:
    exported = request.getfixturevalue(kind)
    contents = {path.name: path.read_bytes() for path in exported.iterdir()}
    for place in (world.base.folder, world.base.folder.parent, exported.parent, Path.home(), Path.cwd()):
        for end in '/"':
            assert [name for name, content in contents.items() if f"{place}{end}".encode() in content] == []
    assert b"`tiny-bert`, a local model" in contents["README.md"]
    assert json.loads(contents["tokenizer_config.json"])["model_max_length"] == MAX_LENGTH
    if kind == "merged":
        return
    config = json.loads(contents["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny-bert", world.base.revision)


def test_the_model_card_has_the_results_and_its_code_runs(
    exported: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert f"`tiny-bert`, a local model whose weights have the SHA-256 `{world.base.weights_sha256}`" in card
    assert "- Trainable parameters: 644, of a budget of 1,000" in card
    assert "accuracy 100.00% (95 % interval 98.12% to 100.00%), macro-F1 100.00%, on 200 rows." in card
    assert all(label in card for label in LABELS)
    for row in ("| targets | qv |", "| rank | 2 |", "| seed | 13 |", "| batch_size | 16 |", "| max_length | 48 |"):
        assert row in card
    assert "| source | newswire |" in card and "non-commercial" not in card and "language: en\n" in card

    shutil.copytree(exported, tmp_path / "copy")
    shutil.copytree(world.base.folder, tmp_path / "copy" / "tiny-bert")
    monkeypatch.chdir(tmp_path / "copy")
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, {})
    label, probability = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert label in LABELS and 0.25 < float(probability) <= 1


def test_the_card_of_a_merged_model_has_code_that_runs(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (merged / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "merged into its base" in card
    monkeypatch.chdir(merged)
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, {})
    [answer] = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert answer["label"] in LABELS and 0.25 < answer["score"] <= 1


def test_the_model_card_keeps_a_licence_escapes_texts_and_says_what_was_not_scored(
    registry: Registry, world: World, enter: Callable[[Path], Version], tmp_path: Path
) -> None:
    hostile = "x|y`z` <script> [a](javascript:b)\n# heading"
    registry.set_tags(
        enter(world.good),
        {"data": json.dumps({"source": "hub", "dataset": "fancyzhx/ag_news", "train": hostile}), "study": hostile},
    )
    card = (export(registry, registry.version(1), tmp_path / "candidate") / "README.md").read_text()
    assert 'datasets: ["fancyzhx/ag_news"]\n' in card
    assert "non-commercial" in card and "tags: [lora, ag-news]" in card and "Texts were cleaned before training" in card
    assert r"| train | x\|y\`z\` &lt;script&gt; \[a\](javascript:b) # heading |" in card
    assert "of study ``x|y`z` <script> [a](javascript:b) # heading``" in card
    assert not re.search(r"^# heading", card, flags=re.MULTILINE)
    assert "not scored: this version has not been promoted" in card


def test_the_card_of_own_rows_claims_nothing_that_is_not_known(
    registry: Registry, world: World, enter: Callable[[Path], Version], tmp_path: Path
) -> None:
    """Nothing is known of their language, licence or subject."""
    adapter = write_adapter(tmp_path / "adapter", world.base)
    record = json.loads((adapter / RECORD).read_text())
    (adapter / RECORD).write_text(json.dumps(record | {"clean": None}))
    registry.set_tags(enter(adapter), {"data": json.dumps({"source": "files", "train": "reviews.jsonl"})})
    card = (export(registry, registry.version(1), tmp_path / "candidate") / "README.md").read_text()
    assert "| train | reviews.jsonl |\n| clean | nothing |\n| labels | 4 |" in card and "tags: [lora]" in card
    for word in ("ag-news", "AG News", "English", "language", "licence", "cleaned", "news"):
        assert word not in card.replace("agnews-lora", "").replace("embedded-1", ""), word


def test_only_a_new_or_an_empty_folder_is_written(small: Registry, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    champion = small.champion()
    assert (export(small, champion, empty) / "README.md").is_file()
    for to, reason in ((full, "not empty"), (full / "mine.txt", "not empty"), (full / "mine.txt" / "x", "File exists")):
        with pytest.raises(StorageError, match=rf"Cannot export to .*: .*{reason}"):
            export(small, champion, to)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
