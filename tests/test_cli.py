"""The command line as a person meets it before anything is trained: its words, and its answers to bad input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from agnews_lora.cli import main, parser
from agnews_lora.search.study import open_storage
from agnews_lora.tracking.store import open_client
from tests.project import environment, write_project
from tests.test_imports import HEAVY
from tests.tiny import tiny_base


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit code 2, without a traceback."""
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("agnews-lora: Cannot ")
    assert "Traceback" not in output.err + output.out
    return output.err.removeprefix("agnews-lora: ").strip()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_command_line_is_the_designs() -> None:
    """A change of any word here breaks somebody's script: change it on purpose, here and in the README."""
    [commands] = [action.choices for action in parser()._actions if action.choices]
    words = {
        name: sorted(word for action in command._actions for word in (action.option_strings or [action.dest]))
        for name, command in commands.items()
    }
    words = {name: [word for word in given if word not in ("-h", "--help")] for name, given in words.items()}
    assert words == {
        "train": ["--json", "--quiet", "experiment"],
        "status": ["--json", "--storage", "sweep"],
        "stop": ["--storage", "--sweep", "trial"],
        "enqueue": ["--storage", "sweep", "values"],
        "sweep": [
            "--address",
            "--json",
            "--new",
            "--patience",
            "--quiet",
            "--storage",
            "--timeout",
            "--tracking",
            "--trials",
            "--workers",
            "sweep",
        ],
        "budget": ["--json", "sweep"],
        "data": ["--json", "experiment"],
        "promote": ["--json", "--rollback", "--tracking", "--version", "sweep"],
        "predict": ["--file", "--json", "--sweep", "--tracking", "texts"],
        "serve": ["--host", "--merged", "--port", "--tracking", "--verbose", "--version", "sweep"],
        "export": ["--json", "--merged", "--to", "--tracking", "sweep"],
        "report": ["--json", "--to", "--tracking", "sweep"],
        "ui": ["--port"],
        "doctor": ["--json", "--quick"],
    }


@pytest.mark.parametrize(
    "command",
    ["", "train", "sweep", "budget", "promote", "predict", "serve", "export", "report", "ui", "doctor"],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"] if command else ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"agnews-lora {command}".strip() in shown
    if command:
        [example] = re.findall(r"^example:\n  agnews-lora (.+)$", shown, flags=re.MULTILINE)
        assert parser().parse_args(shlex.split(example)).command


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweeep"],
        ["sweep", "--trials", "0"],
        ["sweep", "--trials", "many"],
        ["sweep", "--timeout", "-1"],
        ["sweep", "--timeout", "nan"],
        ["sweep", "--workers", "0"],
        ["sweep", "--patience", "-1"],
        ["promote", "--version", "1", "--rollback"],
        ["ui", "--port", "70000"],
        ["sweep", "--quiet", "--json"],
        ["export"],
    ],
)
def test_a_wrong_call_ends_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: agnews-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "nearest"),
    [("sweeep", "sweep"), ("sweep small --trails=3", "--trials"), ("promote --rolback", "--rollback")],
)
def test_a_mistyped_word_meets_its_nearest_under_the_usage_of_its_command(
    line: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    said = capsys.readouterr().err
    assert f"Did you mean {nearest}?" in said
    assert "usage: agnews-lora" in said and (" " not in line or line.partition(" ")[0] in said.splitlines()[0])


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "search for the best adapter" in capsys.readouterr().out


def test_budget_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "small", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "preset": "qk",
        "head": "full",
        "parameters_per_rank": 9_216,
        "max_rank": 10,
        "trainable_parameters": 93_700,
    }
    assert [row["preset"] for row in rows] == ["qk", "qv", "qkv", "qkvo", "ffn", "all-linear"]
    assert files(folder) == {"experiments/small.yaml", "sweeps/small.yaml"}


def write_config(folder: Path, **fields: object) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def test_a_head_above_the_budget_names_the_small_one_and_the_budget_that_would_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """roberta-large: 1,053,700 parameters in its head alone."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
    write_config(folder / "large", model_type="roberta", **sizes)
    write_project(folder, {"base": "large"}, {"budget": 1_000_000})
    assert main(["budget", "small"]) == 0
    said = capsys.readouterr().out
    assert "head full takes 1,053,700" in said
    assert "Set `heads: [out_proj]` in `space`, or raise `budget` to at least 1,152,004" in said
    assert "`heads: [out_proj]`" in refused(capsys, "sweep", "small")
    write_project(folder, {"base": "large"}, {"budget": 1_000_000, "space.heads": ["out_proj"]})
    assert main(["budget", "small"]) == 0
    assert "fits no adapter" not in capsys.readouterr().out
    assert "Take `head: out_proj`, or a budget of at least 1,152,004" in refused(capsys, "sweep", "small")


def test_presets_that_a_fused_matrix_does_not_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ModernBERT: left out of the default, and refused where the file names them."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 576}
    write_config(folder / "modern", model_type="modernbert", **sizes)
    write_project(folder, {"base": "modern"}, {"budget": 1_000_000})
    assert main(["budget", "small", "--json"]) == 0
    assert [row["preset"] for row in json.loads(capsys.readouterr().out)] == ["qkv", "qkvo", "ffn", "all-linear"]
    assert "Cannot adapt qk alone on modernbert" in refused(capsys, "sweep", "small")  # the baseline's
    write_project(folder, {"base": "modern"}, {"budget": 1_000_000, "space.targets": ["qv", "qkv"]})
    assert "Cannot adapt qv alone on modernbert" in refused(capsys, "budget", "small")


PROBE = """
import resource, sys
from agnews_lora.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
print("PROBE", code, used.ru_utime + used.ru_stime, *set(sys.argv[1].split()) & set(sys.modules))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *((words, 0) for words in ("--help", "sweep --help", "budget small", "budget small --json")),
        *((f"{command} mistyped", 2) for command in ("sweep", "train", "budget", "promote", "serve")),
        *((words, 2) for words in ("promote mistyped --rollback", "export mistyped --to out", "sweep absent")),
        ("predict --sweep mistyped text", 2),
    ],
)
def test_what_needs_no_training_is_answered_at_once(folder: Path, arguments: str, expected: int) -> None:
    """Within a second of processor time, and without the libraries that take longer to import."""
    for kind in ("experiments", "sweeps"):
        path = folder / kind / "mistyped.yaml"
        path.write_text((folder / kind / "small.yaml").read_text() + "budgt: 3\n")
    command = [sys.executable, "-c", PROBE, " ".join(HEAVY), *arguments.split()]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    _, code, seconds, *imported = ended.stdout.splitlines()[-1].split()
    assert (int(code), imported) == (expected, [])
    assert float(seconds) < 1
    assert expected == 0 or "absent" in arguments or "budgt: Unknown key." in ended.stderr


BAD_FILES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {"tirals": 3}, ["tirals", "Unknown key", "trials"]),
    ({}, {"trials": "three"}, ["trials", "valid integer", "'three'"]),
    ({}, {"budget": -5}, ["budget", "or equal to 1", "-5"]),
    ({}, {"space.learning_rate": {"low": 1e-2, "high": 1e-3}}, ["at most high", "0.01", "0.001"]),
    ({}, {"space.targets": ["qkw"]}, ["space.targets[0]", "'ffn' or 'all-linear'", "'qkw'"]),
    ({}, {"engine": "rocket"}, ["engine", "'multilora' or 'trainer'", "'rocket'"]),
    ({"training.base_dropout": 0.1}, {"engine": "multilora"}, ["base_dropout is 0.1", "engine: trainer"]),
    ({}, {"engine": "trainer", "slots": 4}, ["slots", "one trial after another", "4", "engine: multilora"]),
    ({}, {"slots": 0}, ["slots", "or equal to 1", "0"]),
    ({}, {"experiment": "smal"}, ["Cannot find experiment 'smal'", "Did you mean small"]),
    ({"adapter.rank": 2.5}, {}, ["adapter.rank", "valid integer", "2.5"]),
    ({"data.source": "parquet"}, {}, ["data.source", "files, hub, newswire", "'parquet'"]),
    ({"training.epochs": None, "data.rows": None}, {}, ["data.rows", "Missing key"]),
]


@pytest.mark.parametrize(("experiment", "sweep", "words"), BAD_FILES)
def test_a_bad_file_is_refused(
    folder: Path,
    experiment: dict[str, Any],
    sweep: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_project(folder, experiment, sweep)
    message = refused(capsys, "sweep", "small")
    assert all(word in message for word in words), message
    assert not (folder / "mlruns").exists()


def test_a_budget_that_nothing_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(folder, sweep={"budget": 5_000})
    message = refused(capsys, "sweep", "small")
    assert "budget 5,000 fits no adapter" in message
    assert "10,756" in message  # the cheapest: 1,540 of the head and 9,216 of one rank on two matrices
    assert not (folder / "mlruns").exists()


def test_a_baseline_over_the_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(folder, experiment={"adapter.rank": 11})
    message = refused(capsys, "sweep", "small")
    assert message.startswith("Cannot train the baseline of small")
    assert "102,916 trainable parameters > budget 100,000" in message
    assert "the largest rank that fits is 10" in message
    assert not (folder / "mlruns").exists()


AG_NEWS_FILES = {
    **{"source": "files", "train": "train.csv", "test": "test.csv", "columns": ["class", "title", "text"]},
    **{"text": ["title", "text"], "label": "class", "labels": ["World", "Sports", "Business", "Sci/Tech"]},
}


def test_an_enqueued_trial_over_the_budget_is_refused_before_any_data_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = optuna.create_study(storage=open_storage(folder / "mlruns"), study_name="small", direction="maximize")
    for name, value in {"sweep": "small", "identity": "its own", "fingerprint": {}}.items():
        study.set_user_attr(name, value)
    study.enqueue_trial({"targets": "qkv", "rank_share": 8 / 7})
    write_project(folder, experiment={"data": {**AG_NEWS_FILES, "train": "absent.csv"}})
    message = refused(capsys, "sweep", "small")
    assert "trial 0, enqueued in study small" in message
    assert "112,132 trainable parameters > budget 100,000" in message
    assert "the largest rank that fits is 7" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["data.train", "Cannot read train.csv"]),
        ('"1","A title","A text"\n"9","A title","A text"\n', ["train.csv", "line 2", "1", "4", "9"]),
        ('"1","A title","A text"\n"2","A title"\n', ["train.csv", "line 2"]),
        ('"1","",""\n', ["train.csv", "line 1", "text"]),
        ("", ["train.csv", "no rows"]),
        (b"\xff\xfe\x00", ["train.csv", "UTF-16", "UTF-8"]),
    ],
)
def test_a_bad_csv_file_is_refused(
    folder: Path, content: str | bytes | None, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (folder / "train.csv").write_bytes(data)
        (folder / "test.csv").write_bytes(data)
    write_project(folder, experiment={"data": AG_NEWS_FILES})
    message = refused(capsys, "sweep", "small")
    assert all(word in message for word in words), message
    assert not (folder / "mlruns").exists()


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_base_that_is_not_there(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(folder, experiment={"base": "models/absent"})
    message = refused(capsys, command, "small")
    assert "'models/absent'" in message
    assert "roberta-base" in message
    assert "embedded:minilm" in message
    assert not (folder / "mlruns").exists()


def test_without_network_the_hub_is_not_waited_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # closed: answers at once
    write_project(folder, experiment={"base": "roberta-base"}, sweep={"budget": 1_000_000})
    message = refused(capsys, "sweep", "small")
    assert "cannot be reached" in message
    assert "experiment: embedded" in message
    assert "local directory" in message
    assert not (folder / "mlruns").exists()


def test_a_corrupt_weights_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base(folder / "base", "bert")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    write_project(folder, experiment={"base": str(base)})
    assert "corrupt" in refused(capsys, "sweep", "small")
    assert not (folder / "mlruns").exists()


def test_stores_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base(folder / "base", "bert")
    write_project(folder, experiment={"base": "base"})
    (folder / "mlruns").write_text("a file in the folder's place")
    message = refused(capsys, "sweep", "small")
    assert "mlruns" in message
    assert (folder / "mlruns").read_text() == "a file in the folder's place"


def test_predict_without_a_champion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("predict", "--sweep", "small", "Oil prices rose.")
    assert "agnews-lora sweep" in refused(capsys, *asked), "there is no store at all"
    open_client(folder / "mlruns")
    message = refused(capsys, *asked)
    assert "Cannot use small: it has no champion" in message
    assert "agnews-lora promote" in message


def test_predict_from_a_file_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.txt" in refused(capsys, "predict", "--sweep", "small", "--file", "absent.txt")


def test_promote_without_a_candidate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base(folder / "base", "bert")
    write_project(folder, experiment={"base": "base"})
    assert "agnews-lora sweep" in refused(capsys, "promote", "small")


def test_clean_never_touches_the_stores(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(Path(__file__).resolve().parent.parent / "Makefile", tmp_path)
    for kept in ("mlruns/mlflow.db", "trained_models/final_model/adapter_config.json"):
        (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kept).touch()
    for cleaned in ("agnews_lora/__pycache__", "tests", "benchmarks", ".cache/tokens"):
        (tmp_path / cleaned).mkdir(parents=True)
    assert os.system(f"make -s -C {tmp_path} clean") == 0
    assert files(tmp_path) == {"Makefile", "mlruns/mlflow.db", "trained_models/final_model/adapter_config.json"}
    assert not (tmp_path / ".cache").exists()
