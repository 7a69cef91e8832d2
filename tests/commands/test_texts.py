"""Texts of others on the screen: shown as they are, never read as markup, and steering nothing. And who may connect."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from agnews_lora.cli import main
from agnews_lora.commands import inspect, predict
from agnews_lora.serving.predict import Prediction
from tests.project import write_project
from tests.tiny import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS

BASE = "a[red]b[/]"  # a folder in a folder, whose path reads as markup


class Parrot:
    """Answers without a model."""

    labels = ("World", "[/]Sports")

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        return [Prediction("[/]Sports", {"World": 0.25, "[/]Sports": 0.75}) for _ in texts]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose base has a strange name."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "bert", "hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS}
    (tmp_path / BASE).mkdir(parents=True)
    (tmp_path / BASE / "config.json").write_text(json.dumps(config | {"intermediate_size": INTERMEDIATE_SIZE}))
    return write_project(tmp_path, experiment={"base": BASE})


@pytest.fixture
def parrot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "open_client", lambda place: None)
    champion = SimpleNamespace(tags={"base": "none"})
    monkeypatch.setattr(predict, "Registry", lambda client, name: SimpleNamespace(champion=lambda: champion))
    monkeypatch.setattr(predict.Package, "verified", lambda registry, version: None)
    monkeypatch.setattr(predict.Classifier, "load", lambda package, base: Parrot())


@pytest.mark.usefixtures("parrot")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[red]hot[/red]", "[red]hot[/red]"),
        ("[/]", "[/]"),
        (r"\[red]", r"\[red]"),
        (r"a\\[b]\[/b]", r"a\\[b]\[/b]"),
        ("[link=file:///etc]x[/link]", "[link=file:///etc]x[/link]"),
        (":warning: 1\n2\t3", ":warning: 1 2 3"),
        ("\x1b[31mred\x1b]0;title\x07", "\ufffd[31mred\ufffd]0;title\ufffd"),
        ("\u202eflip", "\ufffdflip"),
    ],
)
def test_predict_shows_a_text_as_it_is(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--sweep", "small", text]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["label", "World", "[/]Sports", "text"]
    assert line.rstrip().endswith(f"75.0%  {shown}")
    assert line.startswith("[/]Sports")


@pytest.mark.usefixtures("parrot")
def test_predict_refuses_what_is_no_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["predict", "--sweep", "small", "caf\udce9"]) == 2
    assert "'caf\ufffd': it is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["predict", "--sweep", "small"]) == 2
    assert "it is not UTF-8" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_budget_and_doctor_name_a_strange_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "small"]) == 0
    assert f"small: {BASE}, budget 100,000" in capsys.readouterr().out
    shutil.rmtree(BASE)
    assert main(["doctor"]) == 0
    assert BASE in capsys.readouterr().out


def test_the_ui_is_served_to_this_machine_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(inspect.os, "execv", lambda program, command: started.append(command))
    inspect.ui(5001)
    [command] = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
