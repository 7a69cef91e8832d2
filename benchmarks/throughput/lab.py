"""What all peers train: the same mixture of trials, on the same rows, from the same base, without dropout inside it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.rows import LABELS, Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.training.interface import TrainSettings, TrialPlan
from benchmarks.throughput.lengths import MAX_LENGTH, draw, random_table
from benchmarks.throughput.measurement import MIXTURE_SIZE, Task
from benchmarks.throughput.models import read_base

# Each fits the budget of its model: 1,000,000 trainable parameters (roberta-base), 100,000 (MiniLM).
MIXTURE = (
    TrialSpec("all-linear", rank=2, alpha=8, dropout=0.05, learning_rate=4e-4),
    TrialSpec("qv", rank=8, alpha=16, dropout=0.1, learning_rate=2e-4),
    TrialSpec("qkvo", rank=5, alpha=5, dropout=0.0, learning_rate=1e-4),
    TrialSpec("ffn", rank=3, alpha=12, dropout=0.2, learning_rate=3e-4),
)
assert len(MIXTURE) == MIXTURE_SIZE
SEED = 13


@dataclass(frozen=True)
class Lab:
    """What trials are trained on. The training loss is logged every `warmup_steps`: the clock's first mark."""

    base: BaseModel
    corpus: Corpus
    settings: TrainSettings
    device: torch.device

    @property
    def warmup_steps(self) -> int:
        return self.settings.log_every

    @property
    def steps(self) -> int:
        """Of a trial."""
        return len(self.corpus.train) // self.settings.batch_size


def build_lab(task: Task, device: torch.device) -> Lab:
    """Rows drawn with a fixed seed: the same for every peer."""
    setup, folder = task.setup, Path(task.folder)
    num_rows = task.steps * task.batch_size
    lengths = draw(setup.lengths, num_rows + task.eval_rows, SEED)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table = random_table(lengths, config["vocab_size"], config["pad_token_id"], len(LABELS), SEED)
    settings = TrainSettings(
        epochs=1,
        batch_size=task.batch_size,
        eval_batch_size=task.eval_batch_size,
        max_length=MAX_LENGTH[setup.lengths],
        eval_every=task.steps,  # at the end alone
        eval_rows=1,
        log_every=task.warmup_steps,
        warmup=0.1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        base_dropout=0.0,
        precision="auto",
    )
    train, validation = table.take(range(num_rows)), table.take(range(num_rows, len(table)))
    return Lab(read_base(setup, folder), corpus_of(train, validation), settings, device)


def corpus_of(train: TokenTable, validation: TokenTable) -> Corpus:
    """A corpus of token tables alone."""
    return Corpus(train, validation, (0,), "", Rows((), ()), Rows((), ()), None)


def smaller(lab: Lab, steps: int) -> Lab:
    """The lab of short trials, for what a process does only once: kernels compiled, modules imported."""
    settings = replace(lab.settings, log_every=1, eval_every=steps)
    train = lab.corpus.train.take(range(steps * settings.batch_size))
    rows = min(len(lab.corpus.validation), settings.eval_batch_size)
    return replace(lab, corpus=corpus_of(train, lab.corpus.validation.take(range(rows))), settings=settings)


def plans(folder: Path, num_trials: int) -> list[TrialPlan]:
    """The mixture, over and over, each trial with a seed of its own."""
    return [
        TrialPlan(f"t{number:04}", MIXTURE[number % MIXTURE_SIZE], SEED + number, folder / f"t{number:04}")
        for number in range(num_trials)
    ]
