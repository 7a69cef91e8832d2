import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agnews_lora.adapters.adapter_files import recount
from agnews_lora.data.rows import LABELS
from agnews_lora.errors import RegistryError, StorageError
from agnews_lora.serving.export import export
from agnews_lora.serving.gate import promote
from agnews_lora.serving.package import Package
from agnews_lora.tracking.registry import Registry, Version
from tests.serving.conftest import MAX_LENGTH, World

Enter = Callable[[Path], Version]


@pytest.fixture
def champion(registry: Registry, world: World, enter: Enter) -> Version:
    enter(world.good)
    return promote(registry, world.corpus, lambda: world.test).version


def test_peft_and_transformers_alone_load_it(
    registry: Registry, world: World, champion: Version, tmp_path: Path
) -> None:
    folder = export(registry, champion, tmp_path / "out" / "champion")
    base = AutoModelForSequenceClassification.from_pretrained(world.base.folder, num_labels=4)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, _ = world.test
    tokens = tokenizer(list(rows.texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    with torch.inference_mode():
        predicted = model(**tokens).logits.argmax(dim=-1)
    assert np.array_equal(predicted, rows.labels)
    assert recount(folder) == 644
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["champion"]


def test_no_file_holds_a_path_and_the_base_is_named(
    registry: Registry, client: MlflowClient, world: World, champion: Version, tmp_path: Path
) -> None:
    folder = export(registry, champion, tmp_path / "champion")
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (world.base.folder, world.base.folder.parent, tmp_path, Path.home(), Path.cwd()):
        assert [name for name, content in contents.items() if f"{place}/".encode() in content] == []
        assert [name for name, content in contents.items() if f'{place}"'.encode() in content] == []
    config = json.loads(contents["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny-bert", world.base.revision)


def test_the_card_says_what_it_is(registry: Registry, world: World, champion: Version, tmp_path: Path) -> None:
    card = (export(registry, champion, tmp_path / "champion") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert f"`tiny-bert`, a local model whose `model.safetensors` has the SHA-256 `{world.base.weights_sha256}`" in card
    assert "- Trainable parameters: 644, of a budget of 1,000" in card
    assert "accuracy 100.00% (95 % interval 98.12% to 100.00%), macro-F1 100.00%, on 200 rows." in card
    assert all(label in card for label in LABELS)
    for row in ("| targets | qv |", "| rank | 2 |", "| seed | 13 |", "| batch_size | 16 |", "| max_length | 48 |"):
        assert row in card
    assert "| source | newswire |" in card and "non-commercial" not in card


def test_the_cards_code_runs(
    registry: Registry,
    world: World,
    champion: Version,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = export(registry, champion, tmp_path / "champion")
    shutil.copytree(world.base.folder, folder / "tiny-bert")
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    exec(code, {})
    label, probability = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert label in LABELS and 0.25 < float(probability) <= 1


def test_ag_news_keeps_its_licence(registry: Registry, champion: Version, tmp_path: Path) -> None:
    registry.set_tags(champion, {"data": '{"source": "csv", "train": "train.csv"}'})
    card = (export(registry, registry.version(1), tmp_path / "champion") / "README.md").read_text()
    assert "non-commercial" in card and "| train | train.csv |" in card


def test_texts_from_data_are_no_markup_on_the_card(registry: Registry, champion: Version, tmp_path: Path) -> None:
    hostile = "x|y`z` <script> [a](javascript:b)\n# heading"
    registry.set_tags(champion, {"data": json.dumps({"source": "csv", "train": hostile}), "study": hostile})
    card = (export(registry, registry.version(1), tmp_path / "champion") / "README.md").read_text()
    assert r"| train | x\|y\`z\` &lt;script&gt; \[a\](javascript:b) # heading |" in card
    assert "of study ``x|y`z` <script> [a](javascript:b) # heading``" in card
    assert not re.search(r"^# heading", card, flags=re.MULTILINE)


def test_a_version_that_was_not_promoted_says_so(
    registry: Registry, world: World, enter: Enter, tmp_path: Path
) -> None:
    card = (export(registry, enter(world.good), tmp_path / "candidate") / "README.md").read_text()
    assert "not scored: this version has not been promoted" in card


def test_an_empty_folder_is_filled_and_another_is_left_alone(
    registry: Registry, champion: Version, tmp_path: Path
) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert (export(registry, champion, empty) / "README.md").is_file()
    with pytest.raises(StorageError, match=r"needs a new or an empty folder, but .*full holds something; name another"):
        export(registry, champion, full)
    with pytest.raises(StorageError, match=r"holds something"):
        export(registry, champion, full / "mine.txt")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_named(registry: Registry, champion: Version, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"must be writable, but is not .File exists.; export to another folder"):
        export(registry, champion, tmp_path / "file" / "champion")


def test_changed_files_are_not_exported(registry: Registry, champion: Version, tmp_path: Path) -> None:
    record = Package(registry.folder(champion)).adapter / "adapter_record.json"
    record.write_text(record.read_text() + " ")
    with pytest.raises(RegistryError, match=r"adapter/adapter_record.json changed since"):
        export(registry, champion, tmp_path / "champion")
    assert not (tmp_path / "champion").exists()
