"""The trials that `benchmarks.agreement` compares: which they are, how they are trained, and what is kept of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.files import read_file
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.sources import Corpus, DataSettings, prepare
from agnews_lora.training.interface import (
    EvalPoint,
    TrainPoint,
    TrainSettings,
    TrialPlan,
    TrialResult,
    Verdict,
)

if TYPE_CHECKING:
    from agnews_lora.training.interface import Engine

BUDGET: Final = 100_000
SLOTS: Final = 4  # so that unlike trials share the base
SPLIT_SEED: Final = 13
VALIDATION_ROWS: Final = 2_000
SETTINGS: Final = TrainSettings(
    epochs=1,
    batch_size=16,
    eval_batch_size=64,
    max_length=80,
    eval_every=1_000_000,  # the last evaluation alone counts here
    eval_rows=200,
    log_every=50,
    warmup=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    base_dropout=0.0,
    precision="auto",
)
TRAIN_ROWS: Final = 2_400

# Every preset, with neighbours as unlike as the space allows. The update is scaled by alpha / rank.
CONFIGURATIONS: Final = (
    TrialSpec("qk", rank=10, alpha=10, dropout=0.0, learning_rate=1e-4),
    TrialSpec("all-linear", rank=2, alpha=4, dropout=0.0, learning_rate=2e-3),
    TrialSpec("ffn", rank=1, alpha=1, dropout=0.15, learning_rate=1.5e-4),
    TrialSpec("qv", rank=8, alpha=16, dropout=0.1, learning_rate=1e-3),
    TrialSpec("qkv", rank=7, alpha=28, dropout=0.2, learning_rate=3e-4),
    TrialSpec("qk", rank=3, alpha=24, dropout=0.2, learning_rate=5e-3),
    TrialSpec("ffn", rank=4, alpha=16, dropout=0.1, learning_rate=2e-4),
    TrialSpec("qkvo", rank=5, alpha=40, dropout=0.05, learning_rate=5e-4),
)
TRIALS: Final = {f"t{index:04d}": spec for index, spec in enumerate(CONFIGURATIONS)}
FIRST_SEED: Final = 100  # configuration i is trained with seed 100 + i by both engines,
OTHER_SEED: Final = 200  # and with 200 + i once more by multilora

TRAINER, MULTILORA, OTHER = "trainer", "multilora", "multilora with another seed"
SEEDS: Final = {TRAINER: FIRST_SEED, MULTILORA: FIRST_SEED, OTHER: OTHER_SEED}


class Kept:
    """What has been trained so far: one JSON file in the work folder, written after every trial.

    conditions: what the results depend on beside the code; a file of other ones is refused. commit: of the code that
    trains now, kept with every trial.
    """

    def __init__(self, work: Path, conditions: dict[str, Any], commit: str) -> None:
        self.path, self.commit = work / "agreement.json", commit
        conditions = json.loads(json.dumps(conditions))
        self.content: dict[str, Any] = {"conditions": conditions, "trials": {engine: {} for engine in SEEDS}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content["conditions"] != conditions:
                raise SystemExit(
                    f"{self.path} must be of these rows, settings and machine, but has others; name another folder"
                )

    def trials(self, engine: str) -> dict[str, dict[str, Any]]:
        """{trial: its `accuracy` as the engine reported it, `predicted` labels of its exported adapter, `commit`}."""
        trials: dict[str, dict[str, Any]] = self.content["trials"][engine]
        return trials

    def missing(self, engine: str) -> list[str]:
        """Trials that are still to be trained."""
        return [trial for trial in TRIALS if trial not in self.trials(engine)]

    def commits(self, engine: str) -> str:
        """The code that trained an engine's trials."""
        return ", ".join(sorted({each["commit"] for each in self.trials(engine).values()}))

    def add(self, engine: str, trial: str, accuracy: float, predicted: list[int]) -> None:
        """Keep a trial that ended."""
        self.trials(engine)[trial] = {"accuracy": accuracy, "predicted": predicted, "commit": self.commit}
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.content) + "\n", encoding="utf-8")
        beside.replace(self.path)


class Course:
    """One engine's way through the configurations: its `TrialSource`, and the `Observer` that keeps what ended."""

    def __init__(self, engine: str, kept: Kept, base: BaseModel, corpus: Corpus, folder: Path) -> None:
        self.engine, self.kept, self.base, self.corpus = engine, kept, base, corpus
        self.left = [
            TrialPlan(trial, spec, SEEDS[engine] + index, folder / trial)
            for index, (trial, spec) in enumerate(TRIALS.items())
            if trial in kept.missing(engine)
        ]

    def next(self) -> TrialPlan | None:
        return self.left.pop(0) if self.left else None

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return [Verdict.CONTINUE] * len(points)

    def checkpointed(self, trial: str, step: int, path: Path) -> None: ...

    def finished(self, result: TrialResult) -> None:
        assert result.final is not None and result.adapter is not None, "nothing is pruned here"
        predicted = predictions(result.adapter, self.base, self.corpus)
        self.kept.add(self.engine, result.trial, result.final.accuracy, predicted)
        seconds = result.train_seconds + result.eval_seconds
        print(f"{self.engine}: {result.trial} {result.final.accuracy:.2%} after {seconds:.0f} s", flush=True)

    def failed(self, trial: str, error: Exception) -> None:
        print(f"{self.engine}: {trial} failed: {error}", flush=True)

    def stop_requested(self) -> bool:
        return False


def predictions(adapter: Path, base: BaseModel, corpus: Corpus) -> list[int]:
    """Labels that an exported adapter gives the validation rows: plain PEFT, fp32."""
    import torch

    from agnews_lora.adapters.adapter_files import load_with_peft
    from agnews_lora.training.metrics import predict_logits

    rows = range(len(corpus.validation))
    logits = predict_logits(load_with_peft(adapter, base), corpus.validation, rows, 64, torch.device("cpu"))
    return [int(label) for label in logits.argmax(axis=-1)]


def build_engine(name: str, base: BaseModel, corpus: Corpus) -> "Engine":
    """The engine of a name in `SEEDS`."""
    if name in (MULTILORA, OTHER):
        from agnews_lora.training.multilora.engine import MultiLoraEngine

        return MultiLoraEngine(base, corpus, SETTINGS, slots=SLOTS)
    from agnews_lora.training.hf_trainer import TrainerEngine

    return TrainerEngine(base, corpus, SETTINGS)


def prepare_corpus(ag_news: Path, base: BaseModel, cache: Path) -> Corpus:
    """The training and validation rows out of a folder's train.csv."""
    train, text, label = ag_news / "train.csv", ("Title", "Description"), "Class Index"
    settings = DataSettings(
        source="files",
        train=str(train),
        test=str(ag_news / "test.csv"),
        text=text,
        label=label,
        labels=LABELS,
        clean="ag_news",
        train_rows=TRAIN_ROWS,
        validation=VALIDATION_ROWS / len(read_file(train, text, label, None).labels),
    )
    return prepare(settings, SPLIT_SEED, base.folder, SETTINGS.max_length, SETTINGS.eval_rows, cache)
