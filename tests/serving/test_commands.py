"""`promote`, `predict` and `export` as commands: exit codes, JSON, and texts of others on the screen."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agnews_lora.cli import main
from agnews_lora.commands import promote
from agnews_lora.serving.predict import Classifier, Prediction
from agnews_lora.tracking.descriptions import MARK
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.versions import CHAMPION, PREVIOUS
from tests.serving.conftest import World, enter_into

OIL, GOAL = "Oil prices rose.", "The striker scored twice."


@pytest.fixture
def champion(project: Path, small: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is a project whose sweep `small` has a champion."""
    monkeypatch.chdir(project)


def copy_sweep(name: str) -> None:
    """Copy the sweep `small` and its experiment: another registered model."""
    for kind in ("experiments", "sweeps"):
        text = Path(kind, "small.yaml").read_text().replace("experiment: small", f"experiment: {name}")
        Path(kind, f"{name}.yaml").write_text(text)


class Parrot:
    """Answers without a model."""

    labels: tuple[str, ...] = ("World", "[/]Sports")

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        return [Prediction("[/]Sports", {"World": 0.25, "[/]Sports": 0.75}) for _ in texts]


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command with `--json`; gives its exit code, what it printed, read, and its messages."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        code = main([*arguments, "--json"])
        printed = capsys.readouterr()
        lines = [json.loads(line) for line in printed.out.splitlines()]
        return code, lines[0] if len(lines) == 1 else lines, printed.err

    return run


def test_promote_prints_its_findings_passed_or_not_and_rolls_back(
    project: Path,
    world: World,
    client: Any,
    new_run: Callable[[], str],
    as_json: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    copy_sweep("other")
    monkeypatch.setattr(promote, "prepare", lambda experiment: SimpleNamespace(corpus=world.corpus, base=world.base))
    monkeypatch.setattr(promote, "prepare_test", lambda *arguments: world.test)
    registry = Registry(client, "other")
    enter_into(registry, world.good, world, new_run())

    code, printed, errors = as_json("promote", "other")
    assert (code, errors) == (0, "")
    assert printed["passed"] and (printed["champion"], printed["previous"]) == (1, None)
    assert all(check.keys() == {"rule", "found", "passed"} and check["passed"] for check in printed["checks"])
    assert printed["test"].keys() == {"accuracy", "low", "high", "macro_f1", "rows", "digest"}

    refused = enter_into(registry, world.worse, world, new_run())
    code, printed, errors = as_json("promote", "other")
    assert code == 2 and errors.startswith("agnews-lora: Cannot promote version 2 of other: 1 of 8 checks failed\n")
    assert not printed["passed"] and (printed["version"], printed["champion"], printed["test"]) == (2, None, None)
    assert [check["passed"] for check in printed["checks"]].count(False) == 1
    assert client.get_model_version("other", "2").description.startswith(f"{MARK}Refused by the promotion checks")

    enter_into(registry, world.alike, world, new_run())
    assert main(["promote", "other"]) == 0
    shown = capsys.readouterr().out
    assert "version 3 of other is champion (the one before: 1)" in shown and "test split, scored now, once" in shown
    assert main(["promote", "other"]) == 0
    assert "test split, as scored at its first promotion: accuracy" in capsys.readouterr().out
    assert as_json("promote", "other", "--rollback") == (0, {"model": "other", "champion": 1, "previous": 3}, "")
    assert registry.champion().number == 1 and registry.version(3).aliases == (PREVIOUS,)
    assert CHAMPION not in registry.version(refused.number).aliases


@pytest.mark.usefixtures("champion")
def test_predict_answers_from_arguments_a_file_and_standard_input(
    as_json: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"\ufeff{OIL}\r\n\n \t\n{GOAL}".encode()
    (tmp_path / "texts.txt").write_bytes(lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    ways = [
        as_json("predict", "--sweep", "small", OIL, GOAL),
        as_json("predict", "--sweep", "small", "--file", str(tmp_path / "texts.txt")),
        as_json("predict", "--sweep", "small"),
    ]
    assert ways[0] == ways[1] == ways[2] and ways[0][0] == 0
    assert [answer["text"] for answer in ways[0][1]] == [OIL, GOAL]
    for answer in ways[0][1]:
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)


@pytest.mark.usefixtures("champion")
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_text(as_json: Callable[..., Any], tmp_path: Path, inside: str) -> None:
    (tmp_path / "texts.txt").write_text(f"Oil{inside}rose.\n{GOAL}\n", newline="")
    _, answers, _ = as_json("predict", "--sweep", "small", "--file", str(tmp_path / "texts.txt"))
    assert [answer["text"] for answer in answers] == [f"Oil{inside}rose.", GOAL]


@pytest.mark.usefixtures("champion")
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
def test_predict_shows_a_text_as_it_is(
    text: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "load", lambda package: Parrot())
    assert main(["predict", "--sweep", "small", text]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["label", "World", "[/]Sports", "text"]
    assert line.rstrip().endswith(f"75.0%  {shown}")
    assert line.startswith("[/]Sports")


@pytest.mark.usefixtures("champion")
def test_of_many_labels_the_most_probable_one_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parrot = Parrot()
    parrot.labels = tuple(f"class {number}" for number in range(20))
    answer = Prediction("class 7", dict.fromkeys(parrot.labels, 0.025) | {"class 7": 0.525})
    monkeypatch.setattr(parrot, "predict", lambda texts: [answer])
    monkeypatch.setattr(Classifier, "load", lambda package: parrot)
    assert main(["predict", "--sweep", "small", OIL]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["label", "probability", "text"] and line.split() == ["class", "7", "52.5%", *OIL.split()]


@pytest.mark.usefixtures("champion")
def test_predict_refuses_anything_but_texts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bytes").write_bytes(b"caf\xe9")
    for arguments, message in (
        (["caf\udce9"], "Cannot read text 'caf\ufffd': it is not UTF-8"),
        (["--file", str(tmp_path / "bytes")], "bytes: byte 3 is not UTF-8"),
        (["--file", str(tmp_path / "none")], "none: No such file"),
        ([OIL, "&lt;br&gt;"], "text 1 has nothing visible"),
    ):
        assert main(["predict", "--sweep", "small", *arguments]) == 2
        assert message in capsys.readouterr().err
    for given, message in ((b"caf\xe9", "standard input: byte 3 is not UTF-8"), (b"\n", "no text was given")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        assert main(["predict", "--sweep", "small"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("champion")
def test_export_writes_the_champion_once(
    as_json: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "exported"
    assert as_json("export", "small", "--to", str(to))[:2] == (0, {"model": "small", "version": 1, "folder": str(to)})
    assert (to / "README.md").is_file()
    assert main(["export", "small", "--to", str(to)]) == 2
    assert "it is not empty" in capsys.readouterr().err


@pytest.mark.usefixtures("champion")
@pytest.mark.parametrize("name", ["promote", "promote --rollback", "predict", "serve", "export --to x"])
def test_without_a_version_the_commands_say_what_to_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_sweep("empty")
    monkeypatch.setattr(promote, "prepare", lambda experiment: SimpleNamespace(corpus=None, base=None))
    sweep = ["--sweep", "empty", OIL] if name == "predict" else ["empty"]
    assert main([*name.split(), *sweep]) == 2
    message = capsys.readouterr().err
    assert message.startswith("agnews-lora: Cannot ") and "`agnews-lora " in message
