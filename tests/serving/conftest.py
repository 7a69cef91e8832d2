"""A tiny base, adapters on it that answer alike or otherwise, and a corpus that one of them labels without a fault."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from peft import get_peft_model

from agnews_lora.adapters.adapter_files import load_base, lora_config, record_of, save_adapter
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data import newswire
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable, tokenise
from agnews_lora.serving import reload
from agnews_lora.serving.model_package import Package, Winner, register
from agnews_lora.serving.promotion import promote
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import experiment_id, open_client
from agnews_lora.tracking.versions import Version
from agnews_lora.training.metrics import accuracy, mean_cross_entropy, predict_logits
from tests.project import write_project
from tests.tiny import tiny_base

SPEC = TrialSpec(targets="qv", rank=2, alpha=4, dropout=0.0, learning_rate=1e-3)
MAX_LENGTH = 48
BUDGET = 1_000
BIAS = "base_model.model.classifier.modules_to_save.default.bias"


def write_adapter(
    folder: Path,
    base: BaseModel,
    spec: TrialSpec = SPEC,
    seed: int = 0,
    noise: float = 0.0,
    centred_on: TokenTable | None = None,
) -> Path:
    """A saved adapter with weights drawn by `seed`, and moved by `noise` after that.

    centred_on: rows over which the head's bias makes the mean logits 0, so that every label is given to some.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_base(base, len(LABELS)), lora_config(spec, base))
        trained = [tensor for name, tensor in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
        with torch.no_grad():
            for tensor in trained:
                tensor.normal_(std=0.5)
            for tensor in trained:
                tensor.add_(noise * torch.randn_like(tensor))
            if centred_on is not None:
                cpu = torch.device("cpu")
                logits = predict_logits(model.eval(), centred_on, range(len(centred_on)), len(centred_on), cpu)
                model.get_parameter(BIAS).sub_(torch.from_numpy(logits.mean(axis=0)))
    save_adapter(model, record_of("t0007", spec, base, LABELS, MAX_LENGTH, "ag_news"), folder)
    return folder


@dataclass(frozen=True)
class World:
    """good: the adapter whose answers are the labels. alike: another that differs a little. worse: one that guesses."""

    base: BaseModel
    good: Path
    alike: Path
    worse: Path
    corpus: Corpus
    test: tuple[Rows, TokenTable]


def label_by(adapter: Path, base: BaseModel, texts: tuple[str, ...], cache: Path) -> tuple[Rows, TokenTable]:
    """The texts with the labels that an adapter gives them."""
    table = tokenise(Rows(texts, (0,) * len(texts)), base.folder, MAX_LENGTH, cache)
    labels = reload.logits(adapter, base, table).argmax(axis=-1)
    return Rows(texts, tuple(labels.tolist())), replace(table, labels=labels)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = resolve(str(tiny_base(folder / "tiny-bert", "bert")))
    texts = newswire.generate(440, "train", seed=0).texts
    table = tokenise(Rows(texts, (0,) * 440), base.folder, MAX_LENGTH, folder / "cache")
    good = write_adapter(folder / "good", base, seed=1, centred_on=table)
    validation_rows, validation = label_by(good, base, texts[:200], folder / "cache")
    train_rows, train = label_by(good, base, texts[200:240], folder / "cache")
    corpus = Corpus(
        train=train,
        validation=validation,
        monitor=tuple(range(20)),
        digest=hashlib.sha256(validation_rows.digest().encode()).hexdigest(),
        labels=LABELS,
        train_rows=train_rows,
        validation_rows=validation_rows,
        best_accuracy=None,
    )
    return World(
        base=base,
        good=good,
        alike=write_adapter(folder / "alike", base, seed=1, noise=0.0005, centred_on=table),
        worse=write_adapter(folder / "worse", base, seed=2, centred_on=table),
        corpus=corpus,
        test=label_by(good, base, texts[240:], folder / "cache"),
    )


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder, with the sweep `small`, whose stores all tests share."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def client(project: Path) -> MlflowClient:
    return open_client(project / "mlruns")


@pytest.fixture(scope="session")
def new_run(client: MlflowClient) -> Callable[[], str]:
    """Starts finished runs, as a sweep leaves them."""
    experiment = experiment_id(client, "serving")

    def start() -> str:
        run_id: str = client.create_run(experiment, run_name="t0007-qv-r2").info.run_id
        for key, value in {"seed": 13, "epochs": 2, "batch_size": 16, "lora_r": 2}.items():
            client.log_param(run_id, key, value)
        client.set_terminated(run_id)
        return run_id

    return start


@pytest.fixture(scope="session", autouse=True)
def same_process() -> Iterator[None]:
    """Reload adapters in this process: the new one, which takes seconds to import its libraries, is tested apart."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reload, "reload", lambda adapter, base, table: reload.logits(adapter, resolve(base), table))
        yield


def enter_into(registry: Registry, adapter: Path, world: World, run_id: str) -> Version:
    """Register an adapter as a sweep does."""
    return register_winner(registry, winner_of(adapter, world, run_id), world)


def winner_of(adapter: Path, world: World, run_id: str) -> Winner:
    """An adapter whose engine reported what it does."""
    logits, labels = reload.logits(adapter, world.base, world.corpus.validation), world.corpus.validation.labels
    scores = accuracy(logits.argmax(axis=-1), labels), mean_cross_entropy(logits, labels)
    return Winner(run_id, adapter, "embedded", "embedded-1", BUDGET, *scores)


def register_winner(registry: Registry, winner: Winner, world: World) -> Version:
    data = {"source": "newswire", "rows": "440"}
    answers = partial(reload.reload, winner.adapter, str(world.base.folder), world.corpus.validation)
    return register(registry, winner, world.base, world.corpus, data, answers)


@pytest.fixture
def registry(client: MlflowClient, request: pytest.FixtureRequest) -> Registry:
    """A registered model of the test's own."""
    return Registry(client, re.sub(r"\W+", "-", request.node.nodeid)[-80:])


@pytest.fixture
def enter(registry: Registry, world: World, new_run: Callable[[], str]) -> Callable[[Path], Version]:
    """Registers an adapter in the test's own model."""
    return lambda adapter: enter_into(registry, adapter, world, new_run())


@pytest.fixture(scope="session")
def small(client: MlflowClient, world: World, new_run: Callable[[], str], same_process: None) -> Registry:
    """The model `small`, whose champion is the good adapter; to be read, not changed."""
    registry = Registry(client, "small")
    enter_into(registry, world.good, world, new_run())
    assert promote(registry, world.corpus, lambda: world.test).passed
    return registry


@pytest.fixture
def package(small: Registry) -> Iterator[Package]:
    """The champion's files, which are restored after the test."""
    package = Package.verified(small, small.champion())
    kept = package.folder.with_name("kept")
    shutil.copytree(package.folder, kept)
    yield package
    shutil.rmtree(package.folder)
    kept.rename(package.folder)
