"""Tiny bases with tokenised rows, an observer that records an engine's reports, and training by either engine."""

import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from agnews_lora.adapters.adapter_files import WEIGHTS
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data import newswire
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.rows import stratified_subset
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import tokenise
from agnews_lora.training.interface import Engine, EvalPoint, TrainPoint, TrainSettings, TrialPlan, TrialResult, Verdict
from tests.tiny import tiny_base

if TYPE_CHECKING:
    import torch

Point = TypeVar("Point", TrainPoint, EvalPoint)

# A bare CUDA machine has torch, transformers, PEFT, pytest and hypothesis; these modules need more.
NEEDS = {"test_exchange.py": "optuna", "test_hf_trainer.py": "evaluate", "test_metrics.py": "sklearn"}
collect_ignore = [module for module, library in NEEDS.items() if importlib.util.find_spec(library) is None]
HAS_REFERENCE = "test_hf_trainer.py" not in collect_ignore

TRAIN_ROWS = 76  # ten batches of eight, one of them with four rows
VALIDATION_ROWS = 44
MONITOR_ROWS = 20
MAX_LENGTH = 32

SPEC = TrialSpec(targets="qv", rank=2, alpha=4, dropout=0.0, learning_rate=1e-2)
SETTINGS = TrainSettings(
    epochs=2,
    batch_size=8,
    eval_batch_size=16,
    max_length=MAX_LENGTH,
    eval_every=5,
    eval_rows=MONITOR_ROWS,
    log_every=1,
    warmup=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    base_dropout=0.0,
    precision="fp32",
)
STEPS = 20


@dataclass(frozen=True)
class TinySetup:
    """A base model and rows tokenised for it."""

    base: BaseModel
    corpus: Corpus


class Plans:
    """A source of given plans. asked: called at each request."""

    def __init__(self, plans: Iterable[TrialPlan], asked: Callable[[], None] = lambda: None) -> None:
        self.plans, self.asked = list(plans), asked

    def next(self) -> TrialPlan | None:
        self.asked()
        return self.plans.pop(0) if self.plans else None


@dataclass
class Recorder:
    """An observer that records everything.

    stop_at: number of the poll (from 1) at which it requests a stop. prune_at: steps at which it prunes every trial.
    """

    stop_at: int | None = None
    prune_at: tuple[int, ...] = ()
    train_points: list[TrainPoint] = field(default_factory=list)
    eval_points: list[EvalPoint] = field(default_factory=list)
    checkpoints: list[tuple[str, int, Path]] = field(default_factory=list)
    results: list[TrialResult] = field(default_factory=list)
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    polls: int = 0

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self.train_points += points

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        self.eval_points += points
        return [Verdict.PRUNE if point.step in self.prune_at else Verdict.CONTINUE for point in points]

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        self.checkpoints.append((trial, step, path))

    def finished(self, result: TrialResult) -> None:
        self.results.append(result)

    def failed(self, trial: str, error: Exception) -> None:
        self.failures.append((trial, error))

    def stop_requested(self) -> bool:
        self.polls += 1
        return self.stop_at is not None and self.polls >= self.stop_at


def train(
    engine: str,
    setup: TinySetup,
    plans: Iterable[TrialPlan],
    settings: TrainSettings = SETTINGS,
    recorder: Recorder | None = None,
    slots: int = 1,
) -> Recorder:
    """Train plans by a new engine, `trainer` or `multilora`; its reports, in the recorder given or a fresh one."""
    recorder = recorder or Recorder()
    made: Engine
    if engine == "trainer":
        if not HAS_REFERENCE:
            pytest.skip("the reference engine needs `evaluate` and `datasets`")
        from agnews_lora.training.hf_trainer import TrainerEngine

        made = TrainerEngine(setup.base, setup.corpus, settings)
    else:
        from agnews_lora.training.multilora.engine import MultiLoraEngine

        made = MultiLoraEngine(setup.base, setup.corpus, settings, slots)
    made.run(Plans(plans), recorder)
    return recorder


def plan(folder: Path, trial: str = "t0000", spec: TrialSpec = SPEC, seed: int = 7, **changes: object) -> TrialPlan:
    return TrialPlan(trial, spec, seed, folder / trial, **changes)  # type: ignore[arg-type]


def untimed(points: Iterable[Point]) -> list[Point]:
    """The points without the time at which they were made."""
    return [replace(point, timestamp=0) for point in points]


def losses(recorder: Recorder, trial: str = "t0000") -> list[float]:
    """A trial's training losses."""
    return [point.loss for point in recorder.train_points if point.trial == trial]


def adapter_folder(recorder: Recorder, trial: str = "t0000") -> Path:
    [folder] = [result.adapter for result in recorder.results if result.trial == trial]
    assert folder is not None
    return folder


def adapter(recorder: Recorder, trial: str = "t0000") -> "dict[str, torch.Tensor]":
    """The tensors in the file of a trial's adapter."""
    from safetensors.torch import load_file

    return load_file(adapter_folder(recorder, trial) / WEIGHTS)


def tiny_setup(base_folder: Path, cache: Path) -> TinySetup:
    """Rows of newswire, tokenised for the base in a folder."""
    stories = newswire.generate(TRAIN_ROWS + VALIDATION_ROWS, "train", seed=0)
    # The tiny tokenizer cuts words to pieces: only the first words, so that rows are of many lengths.
    texts = tuple(" ".join(text.split()[: 2 + row % 9]) for row, text in enumerate(stories.texts))
    rows = replace(stories, texts=texts)
    train_rows, validation_rows = rows.take(range(TRAIN_ROWS)), rows.take(range(TRAIN_ROWS, len(rows)))
    corpus = Corpus(
        train=tokenise(train_rows, base_folder, MAX_LENGTH, cache),
        validation=tokenise(validation_rows, base_folder, MAX_LENGTH, cache),
        monitor=tuple(stratified_subset(validation_rows.labels, MONITOR_ROWS, seed=0)),
        digest="",
        labels=LABELS,
        train_rows=train_rows,
        validation_rows=validation_rows,
        best_accuracy=None,
    )
    return TinySetup(resolve(str(base_folder)), corpus)


@pytest.fixture(scope="session")
def setups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Family, TinySetup]]:
    if HAS_REFERENCE:
        import agnews_lora.training.hf_trainer  # noqa: F401

    folder = tmp_path_factory.mktemp("setups")
    families = [family for family, layout in LAYOUTS.items() if layout.multilora]
    made = {family: tiny_setup(tiny_base(folder / f"tiny-{family}", family), folder / "cache") for family in families}
    gc.collect()
    gc.freeze()  # engines collect garbage at each trial: let that not search a million objects of libraries each time
    yield made
    gc.unfreeze()


@pytest.fixture(scope="session")
def roberta(setups: dict[Family, TinySetup]) -> TinySetup:
    return setups["roberta"]
