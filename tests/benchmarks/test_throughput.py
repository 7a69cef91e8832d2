"""The throughput benchmark: the real command on a tiny model, without the libraries that a bare machine lacks."""

import csv
import datetime
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agnews_lora.adapters.base_models import EMBEDDED, resolve, shape_of
from agnews_lora.adapters.budget import require_within_budget
from agnews_lora.data import newswire
from agnews_lora.data.tokens import load_tokenizer
from agnews_lora.errors import TrainingError
from agnews_lora.training.interface import TrainSettings
from agnews_lora.training.multilora.model import MultiLoraModel
from benchmarks.throughput import peers
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.peers import Clock, MultiLoraTrials, covered, trials_of
from benchmarks.throughput.results import Environment, Load, Measurement, Peer, Run, file_name, page
from benchmarks.throughput.setup import (
    LENGTHS,
    SPECS,
    BenchmarkSetup,
    configuration,
    corpus_of,
    draw,
    matrix_parameters,
    plans,
    random_table,
    read_base,
    write_random,
)
from tests import bare

ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
TINY_MATRIX_PARAMETERS = 2 * (4 * 16 * 16 + 2 * 16 * 32)
BATCH_SIZE, STEPS, WARMUP_STEPS, TRIALS = 2, 5, 1, 4


def tiny_config(folder: Path) -> Path:
    """A folder with the configuration of a tiny BERT."""
    from transformers import BertConfig

    BertConfig(**TINY).save_pretrained(str(folder))
    return folder


# The command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """What the command printed, and the result file that it wrote."""

    printed: str
    file: Path

    def table(self, number: int) -> list[dict[str, str]]:
        """The rows of the file's first or second table."""
        return tables(self.file.read_text(encoding="utf-8"))[number]


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of every Markdown table, as {column: cell}."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[2:]] for rows in found if rows]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("throughput")
    model = tiny_config(folder / "tiny-bert")
    options = {"--model": model, "--batch-size": BATCH_SIZE, "--slots": 2, "--steps": STEPS, "--eval-rows": 3}
    arguments = [str(part) for pair in {**options, "--rounds": 1, "--out": folder / "out"}.items() for part in pair]
    arguments += ["--no-compiled"]
    python = bare.make(folder / "bare", ("torch", "transformers", "safetensors", "peft", "numpy"))
    command = [python, "-m", "benchmarks.throughput", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    [file] = (folder / "out").iterdir()
    return Output(result.stdout, file)


def test_the_command_prints_what_it_writes(output: Output) -> None:
    text = output.file.read_text(encoding="utf-8")
    assert output.printed.strip() == text.strip()
    assert output.file.name.startswith("throughput-tiny-bert-") and output.file.name.endswith(".md")
    assert str(output.file.parent.parent) not in text
    assert f"--batch-size {BATCH_SIZE} --slots 2 --steps {STEPS} --eval-rows 3 --no-compiled --rounds 1" in text


def test_every_peer_trained_the_same_rows(output: Output) -> None:
    measured = output.table(1)
    trainers = 1 if torch.cuda.is_available() else 2
    assert [row["peer"] for row in measured][trainers:] == ["multilora, K = 2"]
    for row in measured:
        assert int(row["trials"]) == TRIALS
        assert int(row["rows"]) == TRIALS * (STEPS - WARMUP_STEPS) * BATCH_SIZE
        lengths = draw("minilm", 10_000, seed=0)
        assert lengths.min() * int(row["rows"]) < int(row["real tokens"]) < lengths.max() * int(row["rows"])
        assert 0 < float(row["training s"]) < float(row["wall s"])
        assert float(row["CPU s"]) > 0


def test_the_figures_follow_from_what_was_measured(output: Output) -> None:
    figures, measured = output.table(0), output.table(1)
    speeds = [int(row["rows"]) / float(row["training s"]) for row in measured]
    costs = [1e3 * float(row["CPU s"]) / int(row["rows"]) for row in measured]
    for figure, row, speed, cost in zip(figures, measured, speeds, costs, strict=True):
        tokens = int(row["real tokens"]) / float(row["training s"])
        product = (float(row["product before, TFLOP/s"]) + float(row["product after, TFLOP/s"])) / 2 * 1e12
        expected = {
            "samples/s": speed,
            "ratio": speed / speeds[0],
            "CPU ms a sample": cost,
            "CPU ratio": costs[0] / cost,
            "real tokens/s": tokens,
            "share of bf16 rate": 100 * 4 * TINY_MATRIX_PARAMETERS * tokens / product,
            "peak memory": int(row["peak bytes"]) / 1e9,
            "s a trial": float(row["wall s"]) / TRIALS,
        }
        for column, value in expected.items():
            shown = figure[column].replace(",", "").removesuffix("%").removesuffix(" GB")
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(value, rel=2e-3, abs=0.51 * 10**-digits), column


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "a folder with a config.json, but is nowhere"),
        (["--steps", "1"], "must be at least 2"),
        (["--slots", "4,0"], "must be at least 1, but is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


# The table ------------------------------------------------------------------------------------------------------------

MEASURED = Measurement(
    rows=100,
    tokens=5_000,
    train_seconds=4.0,
    cpu_seconds=8.0,
    product_before=1e12,
    product_after=3e12,
    num_trials=4,
    wall_seconds=12.0,
    peak_memory_bytes=2_500_000_000,
    start_up_seconds=7.0,
    computed_by="torch",
)
TRAINER, EIGHT = Peer("trainer", bf16=True), Peer("multilora", 8)


def run_of(*rounds: tuple[Measurement | str, Measurement | str]) -> Run:
    return Run(
        command="the command",
        commit="Commit 0123, ",
        date=datetime.date(2026, 1, 31),
        environment=Environment("minilm", 10_000_000, "minilm", "cuda", "NVIDIA H200", True, "3", "2", "5", "1"),
        batch_size=16,
        steps=8,
        warmup_steps=2,
        eval_rows=64,
        measured={peer: [both[number] for both in rounds] for number, peer in enumerate((TRAINER, EIGHT))},
        load=Load(),
    )


def test_medians_and_ratios_are_those_of_the_rounds() -> None:
    def pair(trainer_seconds: float, engine_seconds: float) -> tuple[Measurement, Measurement]:
        return replace(MEASURED, train_seconds=trainer_seconds), replace(MEASURED, train_seconds=engine_seconds)

    run = run_of(pair(4.0, 1.0), pair(2.0, 2.0), pair(10.0, 4.0))
    trainer, engine = tables(page(run))[0]
    assert file_name(run) == "throughput-minilm-nvidia-h200-2026-01-31.md"
    assert (trainer["peer"], engine["peer"]) == ("Trainer + PEFT, bf16", "multilora, K = 8")
    assert (trainer["samples/s"], trainer["least to most"], trainer["ratio"]) == ("25.0", "10.0 to 50.0", "1.00")
    assert (engine["samples/s"], engine["least to most"], engine["ratio"]) == ("50.0", "25.0 to 100.0", "2.50")
    assert (trainer["real tokens/s"], engine["real tokens/s"]) == ("1,250", "2,500")
    assert (trainer["share of bf16 rate"], engine["share of bf16 rate"]) == ("2.50%", "5.00%")
    assert (engine["peak memory"], engine["s a trial"], engine["start-up s"]) == ("2.50 GB", "3.00", "7.0")
    assert (engine["CPU ms a sample"], engine["CPU ratio"], engine["computed by"]) == ("80.00", "1.00", "torch")


def test_a_failure_is_a_column_and_ends_nothing() -> None:
    failing = replace(MEASURED, computed_by="uncompiled: it broke | there")
    for run in (run_of((MEASURED, "it broke | there"), (MEASURED, failing)), run_of((MEASURED, failing))):
        [trainer, engine] = tables(page(run).replace("\\|", "/"))[0]
        assert trainer["samples/s"] == engine["samples/s"] == "25.0"
        assert engine["computed by"] == "uncompiled: it broke / there" and engine["ratio"] == "1.00"
    [_, engine] = tables(page(run_of((MEASURED, "it broke"))))[0]
    assert (engine["samples/s"], engine["computed by"]) == ("–", "**it broke**")
    [trainer, engine] = tables(page(run_of(("it broke", MEASURED))))[0]
    assert (trainer["ratio"], engine["samples/s"], engine["ratio"]) == ("–", "25.0", "–")


@pytest.mark.parametrize(
    ("average", "others", "said"), [(0.0, 0.01, "A quiet"), (0.0, 0.2, "A busy"), (9e9, 0, "A quiet")]
)
def test_a_busy_machine_is_marked(average: float, others: float, said: str) -> None:
    load = Load()
    load.average, load.others, load.cores = average, others * 50, 50.0
    assert said in page(replace(run_of((MEASURED, MEASURED)), load=load))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_what_other_processes_do_is_counted() -> None:
    load, work = Load(), "import time\nwhile time.process_time() < 1: pass\nprint()\ntime.sleep(9)"
    load.start()
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        load.stop()  # it has not ended: to this process, it is another's
        other.kill()
    assert 0.5 < load.others <= load.cores


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([(0, 2), (5, 6)], 3),  # one after another
        ([(1, 4), (1, 4)], 3),  # in lockstep
        ([(0, 10), (2, 3), (8, 12)], 12),  # inside each other, and overlapping
        ([(5, 6), (0, 2)], 3),
    ],
)
def test_time_in_which_several_train_counts_once(spans: list[tuple[float, float]], seconds: float) -> None:
    assert covered(spans) == seconds


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkSetup:
    """A tiny model, and rows of which none is as long as another."""
    folder = tmp_path_factory.mktemp("setup")
    environment = write_random(str(tiny_config(folder / "tiny")), folder / "base")
    settings = TrainSettings(1, BATCH_SIZE, 4, 64, STEPS, 1, WARMUP_STEPS, 0.1, 0.01, 1.0, 0.0, "fp32")
    table = random_table(2 ** np.arange(13), TINY["vocab_size"], 0, 4, seed=1)
    corpus = corpus_of(table.take(range(10)), table.take([3, 4, 5]))
    return BenchmarkSetup(read_base(environment, folder / "base"), corpus, settings, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the setup is on the CPU")
@pytest.mark.parametrize(
    "peer", [Peer("trainer"), Peer("compiled"), Peer("multilora", 1), Peer("multilora", 4)], ids=str
)
def test_each_peer_trains_whole_trials(
    setup: BenchmarkSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: Peer
) -> None:
    monkeypatch.setattr(peers, "BACKEND", "eager")  # what is compiled is seen by its graphs; code would take a minute
    trials = trials_of(peer, setup, Clock(setup.device))
    num_trials = 1 if peer.kind == "compiled" else TRIALS
    spans = trials.train(plans(tmp_path, num_trials))
    together = len({span.began for span in spans})
    assert together == num_trials // peer.slots
    assert {span.rows for span in spans} == {(STEPS - WARMUP_STEPS) * BATCH_SIZE}
    for span in spans:
        left_out = int(setup.corpus.train.lengths.sum()) - span.tokens
        assert left_out.bit_count() == BATCH_SIZE  # lengths are powers of two: these are the rows of the first batch
        assert span.began < span.ended
    for folder in tmp_path.iterdir():
        assert list(folder.rglob("adapter_model.safetensors"))
    compiled = re.fullmatch(r"torch\.compile \(([1-9][0-9]*) graphs\)", trials.computed_by())
    assert (compiled is not None) == (peer.kind == "compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the setup is on the CPU")
def test_slots_that_do_not_fit_are_not_measured_as_if_they_did(
    setup: BenchmarkSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_pass, passes = MultiLoraModel.gradients, []

    def tight(self: MultiLoraModel, *args: object) -> object:
        passes.append(1)
        if len(passes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)

    monkeypatch.setattr(MultiLoraModel, "gradients", tight)
    with pytest.raises(TrainingError, match="4 trials must train at once, but 2 did"):
        MultiLoraTrials(setup, Clock(setup.device), 4).train(plans(tmp_path, TRIALS))


@pytest.mark.parametrize(("model", "parameters"), [("roberta-base", 84_934_656), ("minilm", 10_616_832)])
def test_known_shapes(model: str, parameters: int, tmp_path: Path) -> None:
    configuration(model).save_pretrained(str(tmp_path))
    shape = shape_of(str(tmp_path))
    assert shape == shape_of({"minilm": EMBEDDED}.get(model, model))
    assert matrix_parameters(shape) == parameters


def test_the_mixture_is_one_that_a_sweep_could_ask_for() -> None:
    for spec in SPECS:
        require_within_budget(spec, shape_of("roberta-base"), 1_000_000)
        require_within_budget(spec, shape_of(EMBEDDED), 100_000)
    for field in ("targets", "rank", "dropout", "learning_rate"):
        assert len({getattr(spec, field) for spec in SPECS}) == len(SPECS)


# Lengths --------------------------------------------------------------------------------------------------------------


def counts(path: Path, column: str) -> dict[int, int]:
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["tokens"]): int(row[column]) for row in csv.DictReader(file) if int(row[column])}


@pytest.mark.parametrize("column", ["roberta", "minilm"])
def test_lengths_follow_the_histogram(column: str) -> None:
    histogram = counts(LENGTHS, column)
    drawn = draw(column, 200_000, seed=3)
    assert set(drawn) <= histogram.keys()
    for tokens in (30, 50, 70):
        share = sum(count for length, count in histogram.items() if length <= tokens) / sum(histogram.values())
        assert np.mean(drawn <= tokens) == pytest.approx(share, abs=0.005)
    assert (drawn == draw(column, 200_000, seed=3)).all()
    assert (drawn != draw(column, 200_000, seed=4)).any()


def test_random_rows_hold_no_padding() -> None:
    table = random_table(np.array([3, 1, 5]), vocabulary_size=4, pad_id=1, num_labels=4, seed=0)
    assert table.lengths.tolist() == [3, 1, 5] and len(table.labels) == 3
    assert set(table.ids.tolist()) <= {2, 3}


def test_the_histogram_counts_the_tokens_of_generated_newswire() -> None:
    tokenizer = load_tokenizer(resolve(EMBEDDED).folder)
    texts = newswire.generate(10_000, "train", seed=13).texts
    lengths = map(len, tokenizer(list(texts), truncation=True, max_length=80)["input_ids"])
    assert Counter(lengths) == counts(LENGTHS, "minilm")
