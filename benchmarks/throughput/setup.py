"""A model with random weights, random rows and a mixture of trials: the same for every peer, no dropout in the base."""

import csv
import json
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, PretrainedConfig, RobertaConfig

from agnews_lora.adapters.base_models import BaseModel, shape_of
from agnews_lora.adapters.spec import ModelShape, TrialSpec, module_shape, target_modules
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.training.device import device_name, has_bf16, training_device
from agnews_lora.training.interface import TrainSettings, TrialPlan
from benchmarks.throughput.results import NUM_SPECS, Environment, Task

# Each fits the budget of its model: 1,000,000 trainable parameters (roberta-base), 100,000 (MiniLM).
SPECS = (
    TrialSpec("all-linear", rank=2, alpha=8, dropout=0.05, learning_rate=4e-4),
    TrialSpec("qv", rank=8, alpha=16, dropout=0.1, learning_rate=2e-4),
    TrialSpec("qkvo", rank=5, alpha=5, dropout=0.0, learning_rate=1e-4),
    TrialSpec("ffn", rank=3, alpha=12, dropout=0.2, learning_rate=3e-4),
)
assert len(SPECS) == NUM_SPECS
SEED = 13

# Tokens of 10,000 rows of generated newswire (split train, seed 13), by the tokenizers of roberta-base and MiniLM.
LENGTHS = Path(__file__).resolve().parent.parent / "lengths.csv"
MAX_LENGTH = {"roberta": 128, "minilm": 80}  # tokens: as the experiments agnews and embedded cut rows


# The model -----------------------------------------------------------------------------------------------------------


def configuration(model: str) -> PretrainedConfig:
    """Give the configuration of a known model, or of the `config.json` in a folder."""
    if model == "roberta-base":
        return RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    if model == "minilm":
        return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return AutoConfig.from_pretrained(model, local_files_only=True)


def matrix_parameters(shape: ModelShape) -> int:
    """Count the parameters of the encoder layers' matrices, biases left out: a token is multiplied with each."""
    return shape.num_layers * sum(
        prod(module_shape(module, shape)) for module in target_modules("all-linear", shape.family)
    )


def write_random(model: str | None, folder: Path, *_: object) -> Environment:
    """Write a classifier with random weights to `folder`, and describe it and the machine.

    Args:
        model: a known name, a folder with a `config.json`, or None for the one that suits the device.
    """
    device = training_device()
    model = model or ("roberta-base" if device.type == "cuda" else "minilm")
    config = configuration(model)
    config.num_labels = len(LABELS)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    shape = shape_of(str(folder), len(LABELS))
    return Environment(
        model=Path(model).name,
        matrix_parameters=matrix_parameters(shape),
        lengths="roberta" if shape.family == "roberta" else "minilm",
        device_type=device.type,
        device=device_name(device),
        bf16=has_bf16(device),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        peft=version("peft"),
    )


def read_base(environment: Environment, folder: Path) -> BaseModel:
    """Describe the base that `write_random` wrote; random weights have no hash to verify."""
    name = environment.model
    return BaseModel(name, folder, name, "random", "random", shape_of(str(folder), len(LABELS)))


# Rows ----------------------------------------------------------------------------------------------------------------


def draw(column: str, num_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw (num_rows,) token counts from a column of the histogram; the same for the same arguments."""
    with LENGTHS.open(encoding="utf-8", newline="") as file:
        rows = [(int(row["tokens"]), int(row[column])) for row in csv.DictReader(file)]
    tokens, counts = np.array(rows, dtype=np.int64).T
    random = np.random.Generator(np.random.PCG64(seed))
    return random.choice(tokens, num_rows, p=counts / counts.sum())


def random_table(
    lengths: npt.NDArray[np.int64], vocabulary_size: int, pad_id: int, num_labels: int, seed: int
) -> TokenTable:
    """Make rows of these lengths with random labels and ids, none of them `pad_id`."""
    random = np.random.Generator(np.random.PCG64(seed))
    return TokenTable(
        ids=random.integers(pad_id + 1, vocabulary_size, lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        labels=random.integers(num_labels, size=len(lengths)),
        pad_id=pad_id,
    )


def corpus_of(train: TokenTable, validation: TokenTable) -> Corpus:
    """Make a corpus of token tables without texts."""
    return Corpus(train, validation, (0,), "", LABELS, Rows((), ()), Rows((), ()), None)


# Trials --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkSetup:
    """The base, rows and settings of all trials. The training loss is logged every `warmup_steps`."""

    base: BaseModel
    corpus: Corpus
    settings: TrainSettings
    device: torch.device

    @classmethod
    def of(cls, task: Task, device: torch.device) -> "BenchmarkSetup":
        """Draw the rows with a fixed seed."""
        environment, folder = task.environment, Path(task.folder)
        num_rows = task.steps * task.batch_size
        lengths = draw(environment.lengths, num_rows + task.eval_rows, SEED)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        table = random_table(lengths, config["vocab_size"], config["pad_token_id"], len(LABELS), SEED)
        settings = TrainSettings(
            epochs=1,
            batch_size=task.batch_size,
            eval_batch_size=task.eval_batch_size,
            max_length=MAX_LENGTH[environment.lengths],
            eval_every=task.steps,  # only at the end
            eval_rows=1,
            log_every=task.warmup_steps,
            warmup=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            base_dropout=0.0,
            precision="auto",
        )
        train, validation = table.take(range(num_rows)), table.take(range(num_rows, len(table)))
        return cls(read_base(environment, folder), corpus_of(train, validation), settings, device)

    @property
    def warmup_steps(self) -> int:
        return self.settings.log_every

    @property
    def steps(self) -> int:
        """Steps of a trial."""
        return len(self.corpus.train) // self.settings.batch_size

    def shortened(self, steps: int) -> "BenchmarkSetup":
        """Give the setup of short trials, which take a process's one-time costs: compilation and imports."""
        settings = replace(self.settings, log_every=1, eval_every=steps)
        train = self.corpus.train.take(range(steps * settings.batch_size))
        rows = min(len(self.corpus.validation), settings.eval_batch_size)
        corpus = corpus_of(train, self.corpus.validation.take(range(rows)))
        return replace(self, corpus=corpus, settings=settings)


def plans(folder: Path, num_trials: int) -> list[TrialPlan]:
    """Plan trials of all specifications in turn, each with a seed of its own."""
    return [
        TrialPlan(f"t{number:04}", SPECS[number % NUM_SPECS], SEED + number, folder / f"t{number:04}")
        for number in range(num_trials)
    ]
