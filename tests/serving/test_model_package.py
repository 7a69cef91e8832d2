import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from agnews_lora.data.newswire import LABELS
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import BudgetError, DataError, PromotionError, RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.model_package import (
    ANSWERS,
    ROWS,
    Package,
    ReferenceAnswers,
    Winner,
    compare_reload,
    locator,
    require_reported,
    token_digest,
)
from agnews_lora.serving.predict import Prediction, columns
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import experiment_id, open_client
from agnews_lora.tracking.versions import CANDIDATE, Version
from agnews_lora.training.metrics import macro_f1, mean_cross_entropy
from tests.serving.conftest import BUDGET, World, enter_into, register_winner, winner_of

Enter = Callable[[Path], Version]


@pytest.fixture
def winner(world: World, new_run: Callable[[], str]) -> Winner:
    return winner_of(world.good, world, new_run())


@pytest.fixture
def tracking_uri(client: MlflowClient) -> Iterator[None]:
    """As `MLFLOW_TRACKING_URI` sets it for users who load a model by its registered name."""
    mlflow.set_tracking_uri(client.tracking_uri)
    yield
    mlflow.set_tracking_uri(None)


def test_a_project_in_a_folder_of_any_name_can_register(
    registry: Registry, world: World, enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files on the way lie beside the project's stores."""
    folder = tmp_path / "a%20b %41?c#d&e"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    version = enter(world.good)
    assert Package.verified(registry, version).adapter.is_dir()


def test_a_winner_is_registered_with_all_that_is_known_of_it(registry: Registry, world: World, enter: Enter) -> None:
    version = enter(world.worse)
    assert version == registry.aliased(CANDIDATE)
    logits = reload.logits(world.worse, world.base, world.corpus.validation)
    predicted = logits.argmax(axis=-1)
    assert {key: value for key, value in version.tags.items() if not key.startswith("sha256/")} == {
        "trial": "t0007",
        "sweep": "embedded",
        "study": "embedded-1",
        "base": str(world.base.folder),
        "base_hub_id": "tiny-bert",
        "base_revision": world.base.revision,
        "budget": str(BUDGET),
        "trainable_parameters": "644",
        "data_digest": world.corpus.digest,
        "data": '{"source": "newswire", "rows": "440"}',
        "validation_accuracy": str(float((predicted == world.corpus.validation.labels).mean())),
        "validation_macro_f1": str(macro_f1(predicted, world.corpus.validation.labels)),
        "validation_rows": "200",
    }
    hashed = {key.removeprefix("sha256/") for key in version.tags if key.startswith("sha256/")}
    assert {f"adapter/{path.name}" for path in world.worse.iterdir()} | {f"reference/{ANSWERS}"} < hashed
    answers = ReferenceAnswers.read(Package.verified(registry, version).reference)
    assert np.array_equal(answers.predicted, predicted)
    assert np.allclose(answers.logits, logits[answers.rows], atol=1e-5)
    assert answers.table.pad_id == world.corpus.validation.pad_id
    for position, row in enumerate(answers.rows):
        assert np.array_equal(answers.table.row(position), world.corpus.validation.row(row))


def test_a_winner_that_is_not_what_the_engine_measured_is_not_registered(
    registry: Registry, world: World, winner: Winner
) -> None:
    """The file has other weights than those that were scored; they count as many."""
    with pytest.raises(PromotionError, match=r"^Cannot register t0007 of embedded-1: on 200 validation rows") as error:
        register_winner(registry, replace(winner, adapter=world.worse), world)
    other = winner_of(world.worse, world, winner.run_id)
    assert f"accuracy {other.accuracy:.2%} and loss {other.loss:.4g} by plain PEFT in a new process" in str(error.value)
    assert f"accuracy 100.00% and loss {winner.loss:.4g} by the engine" in str(error.value)
    assert registry.aliased(CANDIDATE) is None and registry.of_run(winner.run_id) is None
    assert register_winner(registry, winner, world).number == 1, "the run can still be registered"


def agrees(winner: Winner, logits: np.ndarray, labels: np.ndarray) -> bool:
    try:
        require_reported(winner, "t0000", logits, labels)
    except PromotionError:
        return False
    return True


@pytest.mark.parametrize(
    ("rows", "wrong", "loss", "agreed"),
    [
        (36, 0, 1.0, True),
        (36, 1, 1.0, True),
        (36, 2, 1.0, False),
        (2_000, 4, 1.0, True),
        (2_000, 5, 1.0, False),
        (2_000, 0, 1.009, True),
        (2_000, 0, 1.011, False),
        (2_000, 0, 0.989, False),
        (36, 0, 1.04, True),  # 0.45 nats of one row
        (36, 0, 1.05, False),
        (36, 0, 0.95, False),
        (36, 0, float("nan"), False),
    ],
)
def test_an_engine_may_be_off_by_a_row_or_two_in_a_thousand_and_a_hundredth_of_the_loss(
    winner: Winner, rows: int, wrong: int, loss: float, agreed: bool
) -> None:
    labels = np.zeros(rows, dtype=np.int64)
    logits = np.tile(np.array([0.5, -0.5], dtype=np.float32), (rows, 1))
    logits[:wrong] = -logits[:wrong]
    engine = replace(winner, accuracy=1.0, loss=loss * mean_cross_entropy(logits, labels))
    assert agrees(engine, logits, labels) == agreed


def test_rows_that_rounding_decides_may_fall_either_way(winner: Winner) -> None:
    """As in a weak adapter that was trained in bf16: 20 of 200 rows with two labels a thousandth apart."""
    labels = np.zeros(200, dtype=np.int64)
    logits = np.tile(np.array([0.5, -0.5], dtype=np.float32), (200, 1))
    logits[:10], logits[10:20] = (0.5, 0.499), (0.499, 0.5)
    loss = mean_cross_entropy(logits, labels)
    found = [agrees(replace(winner, accuracy=n / 200, loss=loss), logits, labels) for n in (200, 180, 179, 178)]
    assert found == [True, True, True, False]


def test_a_run_is_registered_once_and_its_alias_is_restored_but_not_taken_from_another(
    registry: Registry, world: World, winner: Winner, enter: Enter
) -> None:
    first = register_winner(registry, winner, world)
    assert register_winner(registry, winner, world) == first
    registry.remove_alias(CANDIDATE)  # as if the process had been killed before it set the alias
    assert register_winner(registry, winner, world) == first
    second = enter(world.alike)
    register_winner(registry, winner, world)
    assert registry.aliased(CANDIDATE) == second


def test_more_than_the_budget_is_not_registered(registry: Registry, world: World, winner: Winner) -> None:
    with pytest.raises(BudgetError, match=r"trainable parameters > budget 600 .* the largest rank that fits is 1"):
        register_winner(registry, replace(winner, budget=600), world)
    assert registry.of_run(winner.run_id) is None


@pytest.mark.usefixtures("tracking_uri")
def test_mlflow_loads_it_without_unpickling_anything(
    small: Registry, package: Package, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    assert not list(package.folder.rglob("*.pkl"))
    model = mlflow.pyfunc.load_model("models:/small@champion")
    rows = world.corpus.validation_rows
    answers = model.predict(pd.DataFrame({"text": rows.texts[:40]}))
    assert answers.columns.tolist() == ["label", *LABELS]
    assert answers["label"].tolist() == [LABELS[label] for label in rows.labels[:40]]
    assert np.allclose(answers[list(LABELS)].sum(axis=1), 1)
    assert model.metadata.signature.outputs.input_names() == ["label", *LABELS]
    assert len(model.predict(model.input_example)) == 1
    assert package.changed() == [], "what MLflow leaves in the folder is no change"
    tokenizer = package.tokenizer / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(RegistryError, match=r"Cannot load the model: its files changed"):
        mlflow.pyfunc.load_model("models:/small@champion")


def test_a_base_inside_a_project_that_was_moved_is_found_beside_the_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(world.base.folder, project / "bases" / "own")
    monkeypatch.chdir(project)
    own = replace(world, base=replace(world.base, folder=project / "bases" / "own"))
    client = open_client(Path("mlruns"))
    run_id = client.create_run(experiment_id(client, "serving")).info.run_id
    enter_into(Registry(client, "small"), world.good, own, run_id)
    monkeypatch.chdir(project.rename(tmp_path / "moved"))
    registry = Registry(open_client(Path("mlruns")), "small")
    model = mlflow.pyfunc.load_model(str(registry.folder(registry.version(1))))
    assert len(model.predict([OIL])) == 1


@pytest.fixture(scope="module")
def loaded(small: Registry, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The champion as plain MLflow loads it, in another directory."""
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(tmp_path_factory.mktemp("elsewhere"))
        mlflow.set_tracking_uri(client.tracking_uri)
        yield mlflow.pyfunc.load_model("models:/small@champion")
        mlflow.set_tracking_uri(None)


OIL, GOAL = "Oil prices rose.", "The striker scored twice."
TEXTS = pd.Series([OIL, GOAL])


@pytest.mark.parametrize(
    "given",
    [
        [OIL, GOAL],
        (OIL, GOAL),
        {"text": [OIL, GOAL]},
        {"text": TEXTS},
        [{"text": OIL}, {"text": GOAL}],
        [{"text": np.array(OIL)}, {"text": np.array(GOAL)}],
        np.array([[OIL], [GOAL]]),
        TEXTS,
        TEXTS.astype("category"),
        pd.DataFrame({"id": [1, 2], "text": TEXTS}),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_registered_model_takes_texts_in_any_form(loaded: Any, given: Any) -> None:
    expected = loaded.predict(pd.DataFrame({"text": [OIL, GOAL]}))
    assert len(expected) == 2 and expected.columns.tolist() == ["label", *LABELS]
    pd.testing.assert_frame_equal(loaded.predict(given), expected)


def test_the_registered_model_keeps_an_index_and_takes_one_text_or_none(loaded: Any) -> None:
    frame = pd.DataFrame({"text": [GOAL, OIL, GOAL]}, index=[30, 10, 20])
    answers = loaded.predict(frame[frame["text"] != OIL])
    assert answers.index.tolist() == [30, 20]
    assert frame.join(answers)["label"].isna().tolist() == [False, True, False]
    for one in (GOAL, {"text": GOAL}):
        assert loaded.predict(one)["label"].tolist() == [answers["label"][30]]
    for none in ([], pd.DataFrame({"text": []}), {"text": []}):
        assert loaded.predict(none).columns.tolist() == ["label", *LABELS] and len(loaded.predict(none)) == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([OIL, None], r"row 1: it is None, not a text"),
        (pd.DataFrame({"text": [OIL, float("nan")]}, index=["a", "b"]), r"row 'b': it is nan"),
        ([OIL, 7], r"row 1: it is 7"),
        ([OIL, " \u200b"], r"text 1 has nothing visible"),
        (pd.DataFrame({"sentence": [OIL]}), r"it has no `text`, but 'sentence'"),
        ({}, r"it has no `text`, but nothing"),
        ([{"text": OIL}, {"sentence": OIL}], r"row 1: it is None"),
    ],
)
def test_the_registered_model_refuses_what_is_no_text_by_its_row(loaded: Any, given: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        loaded.predict(given)


def test_a_label_may_be_called_as_a_column_is() -> None:
    labels = ("label", "label_", "text")
    prediction = Prediction("text", dict.fromkeys(labels, 1 / 3))
    assert columns(labels) == list(prediction.row()) == ["label__", *labels]
    assert prediction.row()["label__"] == "text" and prediction.row()["label"] == 1 / 3


def test_a_version_of_an_older_release_is_refused(registry: Registry, world: World, enter: Enter) -> None:
    version = enter(world.good)
    older = replace(version, tags={key: value for key, value in version.tags.items() if "reference" not in key})
    with pytest.raises(RegistryError, match=r"Cannot use version 1 of .*: an older release made it\."):
        Package.verified(registry, older)


def table(ids: list[int], offsets: list[int]) -> TokenTable:
    labels = np.zeros(len(offsets) - 1, dtype=np.int64)
    return TokenTable(np.array(ids, dtype=np.int32), np.array(offsets), labels, pad_id=0)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12_000, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def answers(logits: np.ndarray) -> ReferenceAnswers:
    return ReferenceAnswers.of(logits, table(list(range(24_000)), list(range(0, 24_001, 2))))


def test_fixed_rows_are_64_evenly_spaced_or_all_of_fewer(answers: ReferenceAnswers, logits: np.ndarray) -> None:
    assert len(answers.rows) == 64 and answers.rows[0] == 0 and set(np.diff(answers.rows)) == {187, 188}
    assert ReferenceAnswers.of(logits[:3], table([1, 2, 3], [0, 1, 2, 3])).rows.tolist() == [0, 1, 2]


def test_the_largest_difference_is_of_the_fixed_rows_and_agreement_of_all(
    answers: ReferenceAnswers, logits: np.ndarray
) -> None:
    assert [each.passed for each in compare_reload(answers, logits)] == [True, True]
    moved = logits.copy()
    moved[answers.rows[5], 2] += 0.5
    assert answers.largest_difference(moved[answers.rows]) == pytest.approx(0.5, rel=1e-5)
    others = [row for row in range(1_000) if row not in answers.rows][:24]
    relabelled = logits.copy()
    relabelled[others, (answers.predicted[others] + 1) % 4] += 100
    same, agreement = compare_reload(answers, relabelled)
    assert same.passed and not agreement.passed and agreement.found.startswith("99.80% of 12,000 rows do; register")


def test_the_token_digest_depends_on_ids_and_on_rows() -> None:
    tables = [table([1, 2, 3], [0, 1, 3]), table([1, 2, 4], [0, 1, 3]), table([1, 2, 3], [0, 2, 3])]
    assert len(set(map(token_digest, tables))) == 3


@pytest.mark.parametrize("name", [ANSWERS, ROWS])
@pytest.mark.parametrize("size", [None, 20, -20])
def test_answers_that_are_not_whole_are_refused(
    tmp_path: Path, answers: ReferenceAnswers, name: str, size: int | None
) -> None:
    answers.write(tmp_path / "reference")
    path = tmp_path / "reference" / name
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RegistryError, match=r"Cannot read the reference answers"):
        ReferenceAnswers.read(tmp_path / "reference")


def test_a_base_of_the_hub_is_found_again_by_its_commit_and_a_directory_by_its_path(world: World) -> None:
    of_hub = replace(world.base, name="owner/model@c0ffee", hub_id="owner/model", revision="c0ffee")
    known = replace(world.base, name="embedded:minilm", hub_id="owner/minilm", revision="c0ffee")
    directory = replace(world.base, name="models/minilm", hub_id="owner/minilm", revision="c0ffee")
    found = [locator(base) for base in (of_hub, known, directory)]
    assert found == ["owner/model@c0ffee", "embedded:minilm", str(world.base.folder)]
