"""Names of others on the screen: shown as they are, never read as markup."""

import json
import shutil
from pathlib import Path

import pytest

from agnews_lora.cli import main
from tests.project import write_project
from tests.tiny import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS

BASE = "a[red]b[/]"  # a folder in a folder, whose path reads as markup


def test_budget_and_doctor_name_a_strange_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_project(tmp_path, experiment={"base": BASE}))
    Path(BASE).mkdir(parents=True)
    config = {"model_type": "bert", "hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS}
    Path(BASE, "config.json").write_text(json.dumps(config | {"intermediate_size": INTERMEDIATE_SIZE}))
    assert main(["budget", "small"]) == 0
    assert f"small: {BASE}, budget 100,000" in capsys.readouterr().out
    shutil.rmtree(BASE)
    assert main(["doctor"]) == 1
    assert BASE in capsys.readouterr().out
