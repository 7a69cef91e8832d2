"""Whole sweeps over rows of one's own in each form, and over a base of each family, to the promoted adapter."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from agnews_lora import promote, run_sweep
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.cli import main
from agnews_lora.commands.reprint import standing
from agnews_lora.config.sweep import load_sweep
from agnews_lora.serving import reload
from tests.project import write_project
from tests.tiny import SENTENCES, tiny_base

NUM_ROWS = 168
COLUMNS = {"source": "files", "text": "text", "label": "label"}
AG_NEWS = ["World", "Sports", "Business", "Sci/Tech"]


def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload adapters in this process: the new one, which takes seconds to import its libraries, is seen elsewhere."""
    here = lambda adapter, base, table: reload.logits(adapter, resolve(base), table)  # noqa: E731
    monkeypatch.setattr(reload, "reload", here)


def row(number: int, labels: list[str]) -> tuple[str, str]:
    label = labels[number % len(labels)]
    return f"{SENTENCES[number % 8]} {label} {number}", label


def words(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    """Two words as JSON lines, one rare; the test rows are a share."""
    rows = [row(number, ["ham", "ham", "ham", "ham", "spam"]) for number in range(NUM_ROWS)]
    lines = [json.dumps({"text": text, "label": label, "id": number}) for number, (text, label) in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {**COLUMNS, "train": "rows.jsonl", "test": 0.25}, ["ham", "spam"], 42


def fourteen(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    """Fourteen classes as Parquet, with a file of test rows."""
    labels = [f"kind {number:02}" for number in range(14)]
    for name, first in (("train", 0), ("test", 10_000)):
        rows = [row(first + number, labels) for number in range(NUM_ROWS)]
        pd.DataFrame(rows, columns=["text", "label"]).to_parquet(folder / f"{name}.parquet")
    return {**COLUMNS, "train": "train.parquet", "test": "test.parquet", "test_rows": 28}, labels, 28


def numbers(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    """Whole numbers in another order of columns, separated by tabs, which get names."""
    labels = ["bad", "fair", "good"]
    rows = [row(number, labels) for number in range(NUM_ROWS)]
    lines = [f"{number}\t{labels.index(label) + 1}.0\t{text}\n" for number, (text, label) in enumerate(rows)]
    (folder / "rows.tsv").write_text("id\tstars\treview\n" + "".join(lines))
    return {**COLUMNS, "train": "rows.tsv", "text": "review", "label": "stars", "labels": labels}, labels, 17


def ag_news(folder: Path) -> tuple[dict[str, Any], list[str], int]:
    """The original files of AG News: no header, every field quoted, class index from 1."""
    for name, first in (("train", 0), ("test", 10_000)):
        rows = [row(first + number, AG_NEWS) for number in range(NUM_ROWS)]
        lines = [f'"{AG_NEWS.index(label) + 1}","{text}","it #39;s \\$5"\n' for text, label in rows]
        (folder / f"{name}.csv").write_text("\ufeff" + "".join(lines))
    columns = ["Class Index", "Title", "Description"]
    data = {"columns": columns, "text": columns[1:], "label": columns[0], "labels": AG_NEWS, "clean": "ag_news"}
    return {"source": "files", "train": "train.csv", "test": "test.csv", **data}, AG_NEWS, NUM_ROWS


@pytest.mark.proof
@pytest.mark.parametrize("form", [words, fourteen, numbers, ag_news])
def test_a_sweep_over_rows_of_ones_own(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reload_here(monkeypatch)
    tiny_base(tmp_path / "base", "bert")
    data, labels, num_test_rows = form(tmp_path)
    write_project(tmp_path, {"base": "base", "data": data}, {"budget": 10_000, "trials": 2})
    assert main(["sweep", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["labels"] == labels
    assert found["facts"]["profile"]["rows"]["test"] == num_test_rows
    assert main(["promote", "small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["rows"] == num_test_rows
    assert main(["predict", "--sweep", "small", "--json", "The striker scored twice."]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sorted(answer["probabilities"]) == sorted(labels)
    assert standing(load_sweep("small"), None)
    train = tmp_path / data["train"]
    train.write_bytes(train.read_bytes() + b"\n")
    assert not standing(load_sweep("small"), None), "its data has changed"


@pytest.mark.proof
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_sweep_over_a_base_of_ones_own(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family: plain PEFT, in a new process, answers as the engine did, else nothing were registered."""
    monkeypatch.chdir(tmp_path)
    tiny_base(tmp_path / "base", family)
    data, labels, _ = words(tmp_path)
    changes = {"base": "base", "data": data, "adapter.targets": "all-linear"}
    write_project(tmp_path, changes, {"budget": 20_000, "trials": 1})
    result = run_sweep("small", quiet=True)
    assert result.state == "COMPLETE" and list(result.facts.labels) == labels
    assert result.facts.engine == ("multilora" if LAYOUTS[family].multilora else "trainer")
    reload_here(monkeypatch)
    assert result.registration is not None and promote("small").passed
