"""`data`: what it prints of rows, and that rows which a sweep refuses are shown with the reason."""

import json
from pathlib import Path

import pytest

from agnews_lora.cli import main
from tests.project import write_project

DATA = {"source": "files", "train": "rows.jsonl", "test": "rows.jsonl", "text": "text", "label": "label"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Report {row}", "label": "glad" if row % 3 else "sad"} for row in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_project(tmp_path, experiment={"base": "models/absent", "data": DATA})


def test_rows_that_a_sweep_refuses_are_shown_with_the_reason(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "small"]) == 0
    said = capsys.readouterr().out
    assert "120 rows of 2 classes" in " ".join(said.split())
    assert "sweep and train refuse this data" in " ".join(said.split())
    assert main(["train", "small"]) == 2
    assert "it is the training file" in capsys.readouterr().err


def test_data_is_told_without_its_base(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(project, experiment={"base": "models/absent", "data": {**DATA, "test": 0.2}})
    assert main(["data", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == {
        "glad": {"train": 29, "validation": 3, "test": 8},
        "sad": {"train": 14, "validation": 2, "test": 4},
    }
    assert (found["tokens"], found["shared"]["train-test"]) == ({}, 0)
    assert [warning for warning in found["warnings"] if "models/absent" in warning]
