"""Experiments: what a file says, what it may not say, and the plain values that come of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.data.sources import DataSettings
from agnews_lora.errors import ConfigError
from agnews_lora.training.interface import TrainSettings
from tests.config.conftest import Write, lines_and_faults

ADAPTER = "adapter: {targets: qv, rank: 8, alpha: 16, learning_rate: 1e-3}"
HUB = "data: {source: hub, dataset: a/b, text: text, label: label}"
SMALLEST = f"base: roberta-base\n{HUB}\n{ADAPTER}\n"


def faults(write: Write, content: str) -> list[str]:
    write("experiments/mine", content)
    with pytest.raises(ConfigError) as caught:
        load_experiment("mine")
    found = lines_and_faults(str(caught.value))
    heading = f"Cannot read experiments/mine.yaml: {len(found)} fault{'s' if len(found) > 1 else ''}\n"
    assert str(caught.value).startswith(heading)
    return [fault.partition(": ")[2] for fault in found]


def test_defaults_make_a_whole_experiment(write: Write) -> None:
    write("experiments/mine", SMALLEST)
    experiment = load_experiment("mine")
    assert experiment.name == "mine"
    assert experiment.source_text == SMALLEST
    assert experiment.spec == TrialSpec("qv", rank=8, alpha=16.0, dropout=0.0, learning_rate=1e-3, head="full")
    assert experiment.settings == TrainSettings(3, 32, 64, 128, 500, 2_000, 10, 0.1, 0.0, 1.0, 0.0, "auto")
    assert experiment.data_settings == DataSettings(
        "hub", "train", "test", 0.1, dataset="a/b", text=("text",), label="label"
    )
    assert experiment.seed == 42


def test_what_a_file_says_arrives(write: Write) -> None:
    write(
        "experiments/mine",
        "base: models/mine\ndata: {source: newswire, rows: 2_000, train_rows: 1_000, test_rows: 500, validation: 0.5}\n"
        "adapter: {targets: all-linear, rank: 2, alpha: 1.5, dropout: 0.1, head: out_proj, learning_rate: 2e-5}\n"
        "training: {epochs: 1, batch_size: 4, eval_batch_size: 8, max_length: 32, eval_every: 5, eval_rows: 6, "
        "log_every: 7, warmup: 0, weight_decay: 0.01, max_grad_norm: 2, base_dropout: 0.1, precision: fp32}\nseed: 0\n",
    )
    experiment = load_experiment("mine")
    assert experiment.base == "models/mine"
    assert experiment.spec == TrialSpec("all-linear", 2, 1.5, 0.1, 2e-5, "out_proj")
    assert experiment.settings == TrainSettings(1, 4, 8, 32, 5, 6, 7, 0.0, 0.01, 2.0, 0.1, "fp32")
    assert isinstance(experiment.settings.warmup, float) and isinstance(experiment.settings.max_grad_norm, float)
    assert experiment.data_settings == DataSettings(
        "newswire", validation=0.5, rows=2_000, train_rows=1_000, test_rows=500
    )
    assert experiment.seed == 0


@pytest.mark.parametrize("path", ["../b.csv", "..", "a/../../b.csv", "./.././b.csv", "../../etc/passwd"])
def test_a_relative_path_of_rows_stays_in_the_working_directory(write: Write, path: str) -> None:
    assert faults(
        write, f"base: b\ndata: {{source: files, train: a.csv, test: {path}, text: a, label: b}}\n{ADAPTER}\n"
    ) == [
        f"data.test: Input should not lead out of the working directory, but got '{path}'. Copy the file into it, or "
        "give its absolute path"
    ]


@pytest.mark.parametrize("path", ["b.csv", "data/b.csv", "data/../b.csv", "..b.csv", ".../b.csv", "/data/../b.csv"])
def test_a_path_in_it_or_an_absolute_one_is_taken(write: Write, path: str) -> None:
    write(
        "experiments/mine",
        f"base: b\ndata: {{source: files, train: a.csv, test: {path}, text: a, label: b}}\n{ADAPTER}\n",
    )
    assert load_experiment("mine").data_settings.test == path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{source: web}", ["data.source: Input should be one of files, hub, newswire, but got 'web'"]),
        ("{}", ["data.source: Input should be one of files, hub, newswire, but got null"]),
        (
            "{source: hub, dataset: a/b, text: a, label: b, validation: 1}",
            ["data.validation: Input should be less than 1, but got 1"],
        ),
        ("{source: files}", [f"data.{key}: Missing key. " for key in ("text", "label", "train")]),
        ("{source: newswire}", ["data.rows: Missing key. ", "data.test_rows: Missing key. "]),
        (
            "{source: files, train: a.jsonl, test: b.parquet, text: a, label: b, columns: [a, b]}",
            ["data: columns names those of CSV or TSV files, but got a.jsonl, b.parquet. Remove columns"],
        ),
        (
            "{source: hub, dataset: a/b, text: a, label: b, train: a.csv}",
            ["data.train: Unknown key. Did you mean train_rows? "],
        ),
        ("{source: newswire, rows: 10, test_rows: 1, train_rows: 9, path: a}", ["data.path: Unknown key. "]),
        (
            "{source: newswire, rows: 1_000_001, test_rows: 1_000_001}",
            [
                "data.rows: Input should be less than or equal to 1000000, but got 1000001",
                "data.test_rows: Input should be less than or equal to 1000000, but got 1000001",
            ],
        ),
        (
            "{source: newswire, rows: 100, test_rows: 1, train_rows: 91}",
            ["data: train_rows should be at most the 90 of 100 rows that validation leaves, but got 91. "],
        ),
    ],
)
def test_each_source_reads_its_own_keys(write: Write, data: str, expected: list[str]) -> None:
    found = faults(write, f"base: b\ndata: {data}\n{ADAPTER}\n")
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("base", "''", "String should have at least 1 character, but got ''"),
        ("base", "a" * 4_097, "String should have at most 4096 characters, but got 'aaa"),
        ("base", '"a\\0b"', r"Input should hold no control characters, but got 'a\x00b'"),
        ("adapter.rank", "1_000_000_001", "Input should be less than or equal to 1000000000, but got 1000000001"),
        ("adapter.dropout", "1", "Input should be less than 1, but got 1"),
        ("adapter.learning_rate", "2", "Input should be less than or equal to 1, but got 2"),
        ("training.epochs", "1" + "0" * 70, "Input should be less than or equal to 1000000000, but got 1000"),
        ("training.max_length", "2", "Input should be greater than or equal to 3, but got 2"),
        ("training.precision", "fp16", "Input should be 'auto', 'fp32' or 'bf16', but got 'fp16'. Did you mean bf16?"),
        ("seed", "4294967296", "Input should be less than or equal to 4294967295, but got 4294967296"),
        ("name", "other", "Unknown key. The keys here are base, data, adapter, training, seed"),
    ],
)
def test_each_value_keeps_its_rule(write: Write, key: str, value: str, rule: str) -> None:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(SMALLEST)
    block = content
    *blocks, last = key.split(".")
    for name in blocks:
        block = block.setdefault(name, {})
    block[last] = YAML(typ="safe", pure=True).load(value)
    [fault] = faults(write, json.dumps(content))
    assert fault.startswith(f"{key}: {rule}")


def test_an_experiment_can_be_given_by_path(write: Write, project: Path) -> None:
    path = write("elsewhere/mine", SMALLEST)
    for name in (str(path), "elsewhere/mine.yaml", "./elsewhere/mine.yaml"):
        assert load_experiment(name).name == "mine"


def test_every_key_is_documented() -> None:
    schema = Experiment.model_json_schema()
    blocks = [schema, *schema["$defs"].values()]
    assert all(field.get("description") for block in blocks for field in block["properties"].values())
