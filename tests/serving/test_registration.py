import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from agnews_lora.adapters.adapter_files import read_record
from agnews_lora.adapters.base_models import resolve
from agnews_lora.data.rows import LABELS
from agnews_lora.errors import BudgetError, GateError
from agnews_lora.serving import reload
from agnews_lora.serving.package import Package
from agnews_lora.serving.record import read_gate_record
from agnews_lora.serving.registration import Winner, register
from agnews_lora.tracking.registry import CANDIDATE, Registry, Version
from tests.serving.conftest import BUDGET, World

Enter = Callable[[Path], Version]


@pytest.fixture
def winner(world: World, new_run: Callable[[], str]) -> Winner:
    return Winner(new_run(), world.good, sweep="embedded", study="embedded-1", budget=BUDGET)


@pytest.fixture
def tracking_uri(client: MlflowClient) -> Iterator[None]:
    """As `MLFLOW_TRACKING_URI` sets it for whoever loads a model by its registered name."""
    mlflow.set_tracking_uri(client.tracking_uri)
    yield
    mlflow.set_tracking_uri(None)


def test_the_winner_waits_with_all_that_is_known_of_it(registry: Registry, world: World, enter: Enter) -> None:
    version = enter(world.good)
    assert version == registry.aliased(CANDIDATE)
    known = {key: value for key, value in version.tags.items() if not key.startswith("sha256/")}
    assert known == {
        "trial": "t0007",
        "sweep": "embedded",
        "study": "embedded-1",
        "base": str(world.base.folder),
        "base_hub_id": "tiny-bert",
        "base_revision": world.base.revision,
        "budget": str(BUDGET),
        "trainable_parameters": str(read_record(world.good).trainable_parameters),
        "data_digest": world.corpus.digest,
        "data": '{"source": "newswire", "rows": "440"}',
        "validation_accuracy": "1.0",
        "validation_rows": "200",
    }
    hashed = {key.removeprefix("sha256/") for key in version.tags if key.startswith("sha256/")}
    assert {f"adapter/{path.name}" for path in world.good.iterdir()} < hashed


def test_the_record_holds_what_the_exported_weights_answered(registry: Registry, world: World, enter: Enter) -> None:
    package = Package(registry.folder(enter(world.worse)))
    record = read_gate_record(package.gate)
    logits = reload.logits(world.worse, world.base, world.corpus.validation)
    assert np.array_equal(record.predicted, logits.argmax(axis=-1))
    assert np.array_equal(record.logits, logits[record.rows]) and len(record.rows) == 64
    assert json.loads((package.gate / "gate_record.json").read_text())["validation_rows"] == 200


def test_a_new_process_must_agree_before_it_is_registered(
    registry: Registry, world: World, winner: Winner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differing(adapter: Path, base: str, table: object) -> np.ndarray:
        answers = reload.logits(adapter, resolve(base), table)
        answers[0, 0] += 1e-3
        answers[5:7] = answers[5:7, ::-1]
        return answers

    monkeypatch.setattr(reload, "reload", differing)
    with pytest.raises(GateError) as refusal:
        register(registry, winner, world.base, world.corpus, {"source": "newswire"})
    message = str(refusal.value)
    assert message.startswith("t0007 of embedded-1 cannot be registered: 2 of 2 checks failed")
    assert "within 0.0001: the largest difference is" in message
    assert "99.9% of the validation split must get the recorded labels: 99.00% of 200 rows do" in message
    assert registry.aliased(CANDIDATE) is None and registry.of_run(winner.run_id) is None


def test_a_run_is_registered_once(registry: Registry, world: World, winner: Winner, same_process: None) -> None:
    first = register(registry, winner, world.base, world.corpus, {"source": "newswire"})
    assert register(registry, winner, world.base, world.corpus, {"source": "newswire"}) == first


def test_an_alias_lost_to_a_kill_is_given_again_but_never_taken_from_another(
    registry: Registry, world: World, winner: Winner, enter: Enter
) -> None:
    first = register(registry, winner, world.base, world.corpus, {"source": "newswire"})
    registry.remove_alias(CANDIDATE)
    assert register(registry, winner, world.base, world.corpus, {"source": "newswire"}) == first
    second = enter(world.alike)
    register(registry, winner, world.base, world.corpus, {"source": "newswire"})
    assert registry.aliased(CANDIDATE) == second


def test_more_than_the_budget_is_not_registered(registry: Registry, world: World, winner: Winner) -> None:
    with pytest.raises(BudgetError, match=r"trainable parameters > budget 600 .* the largest rank that fits is 1"):
        register(registry, replace(winner, budget=600), world.base, world.corpus, {"source": "newswire"})
    assert registry.of_run(winner.run_id) is None


@pytest.mark.usefixtures("tracking_uri")
def test_mlflow_serves_it_without_unpickling_anything(
    registry: Registry, world: World, winner: Winner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, new process included."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    version = register(registry, winner, world.base, world.corpus, {"source": "newswire"})
    assert not list(registry.folder(version).rglob("*.pkl"))
    model = mlflow.pyfunc.load_model(f"models:/{registry.model}@{CANDIDATE}")
    answers = model.predict(pd.DataFrame({"text": world.corpus.validation_rows.texts[:40]}))
    assert answers.columns.tolist() == ["label", *LABELS]
    assert answers["label"].tolist() == [LABELS[label] for label in world.corpus.validation_rows.labels[:40]]
    assert np.allclose(answers[list(LABELS)].sum(axis=1), 1)
    assert model.metadata.signature.inputs.input_names() == ["text"]
    assert model.metadata.signature.outputs.input_names() == ["label", *LABELS]
    example = model.input_example
    assert example.columns.tolist() == ["text"] and len(model.predict(example)) == 1
    package = Package(registry.folder(version))
    assert package.changed(version.tags) == [], "what MLflow leaves in the folder is no change"
    tokenizer = package.tokenizer / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(Exception, match=r"files must be those that were registered, but they changed since; put them"):
        mlflow.pyfunc.load_model(f"models:/{registry.model}@{CANDIDATE}")
