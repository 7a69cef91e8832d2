"""The study in storage: found by its sweep, refused where it would not compare, held by one process, read as rows."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError, StudyError
from agnews_lora.search import study as keys
from agnews_lora.search.claims import give_back
from agnews_lora.search.study import (
    Standing,
    best_of,
    differences,
    open_storage,
    open_study,
    standings,
    study_names,
    trial_name,
)

FINGERPRINT: dict[str, Any] = {
    "budget": 100_000,
    "space": {"targets": ["qk", "qv"], "learning_rate": (2e-4, 5e-3)},
    "base": {"id": "minilm", "revision": None},
    "training": {"epochs": 1, "precision": "auto"},
}
SPEC = TrialSpec("qv", rank=8, alpha=16.0, dropout=0.1, learning_rate=1e-3)


def opened(root: Path, sweep: str = "embedded", fingerprint: dict[str, Any] | None = None, new: bool = False) -> Any:
    """The study, as another process finds it."""
    fingerprint = FINGERPRINT if fingerprint is None else fingerprint
    return open_study(open_storage(root), sweep, fingerprint, RandomSampler(seed=0), NopPruner(), new)


def content(root: Path) -> str:
    """Digest of all that SQLite would say of the database."""
    with closing(sqlite3.connect(root / "optuna.db")) as connection:
        return sha256("\n".join(connection.iterdump()).encode()).hexdigest()


# Names --------------------------------------------------------------------------------------------------------


def test_a_study_is_resumed_until_a_new_one_is_asked_for(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert (first.study_name, first.direction) == ("embedded", optuna.study.StudyDirection.MAXIMIZE)
    first.tell(first.ask(), 0.5)
    assert len(opened(tmp_path).trials) == 1
    second = opened(tmp_path, new=True)
    assert (second.study_name, len(second.trials)) == ("embedded-2", 0)
    assert opened(tmp_path).study_name == "embedded-2"
    assert [trial.value for trial in optuna.load_study(study_name="embedded", storage=first._storage).trials] == [0.5]


def test_the_newest_of_many_is_told_by_its_number(tmp_path: Path) -> None:
    names = [opened(tmp_path, new=True).study_name for _ in range(11)]
    assert names == ["embedded", *(f"embedded-{number}" for number in range(2, 12))]
    assert study_names(open_storage(tmp_path), "embedded") == names
    assert opened(tmp_path).study_name == "embedded-11"


def test_each_sweep_has_its_own_studies_whatever_the_names(tmp_path: Path) -> None:
    sweeps = ["embedded", "embedded-small", "embedded-small-2", "embedded-2", "embedded-2-2", "a.b", "axb", "a+(b", "é"]
    for sweep in sweeps:
        opened(tmp_path, sweep)
    storage = open_storage(tmp_path)
    for sweep in sweeps:
        assert study_names(storage, sweep) == [sweep]
        assert opened(tmp_path, sweep).study_name == sweep
    assert opened(tmp_path, "embedded", new=True).study_name == "embedded-3"  # embedded-2 is another sweep's
    assert opened(tmp_path, "embedded-2", new=True).study_name == "embedded-2-3"
    assert study_names(storage, "embedded") == ["embedded", "embedded-3"]
    assert study_names(storage, "embedded-2") == ["embedded-2", "embedded-2-3"]
    assert study_names(storage, "a") == []


def test_a_study_whose_making_was_killed_is_made_to_its_end(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    optuna.create_study(storage=storage, study_name="embedded", direction="maximize")
    assert opened(tmp_path).study_name == "embedded"
    half = optuna.create_study(storage=storage, study_name="embedded-2", direction="maximize")
    half.set_user_attr(keys.SWEEP, "embedded")
    study = opened(tmp_path, fingerprint={"budget": 7})
    assert (study.study_name, study.user_attrs[keys.FINGERPRINT]) == ("embedded-2", {"budget": 7})
    assert study_names(storage, "embedded") == ["embedded", "embedded-2"]


# The fingerprint ----------------------------------------------------------------------------------------------


def test_the_same_settings_go_on_with_the_study(tmp_path: Path) -> None:
    opened(tmp_path)
    before = content(tmp_path)
    opened(tmp_path)  # tuples come back from storage as lists, and are still the same
    assert content(tmp_path) == before


def test_other_settings_are_refused_line_by_line_and_nothing_is_written(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.enqueue_trial({})
    before = content(tmp_path)
    changed = {
        "budget": 120_000,
        "space": {"targets": ["qk"], "learning_rate": (2e-4, 5e-3)},
        "base": {"id": "minilm", "revision": "abc"},
        "training": {"epochs": 1, "precision": "auto"},
        "data": "1f00",
    }
    with pytest.raises(StudyError) as raised:
        opened(tmp_path, fingerprint=changed)
    assert str(raised.value).splitlines() == [
        "study embedded was made with other settings, and its trials would not compare:",
        '  base.revision: null -> "abc"',
        "  budget: 100000 -> 120000",
        '  data: null -> "1f00"',
        '  space.targets: ["qk", "qv"] -> ["qk"]',
        "put them back to go on with it, or start another study with `agnews-lora sweep embedded --new`",
    ]
    assert content(tmp_path) == before
    assert opened(tmp_path, fingerprint=changed, new=True).study_name == "embedded-2"
    with pytest.raises(StudyError, match="study embedded-2 was made with other settings"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("stored", "present", "lines"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c: 2 -> 3"]),
        ({"a": {"b": 1}}, {"a": [1]}, ['a: {"b": 1} -> [1]']),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, ["a: 1 -> 2", "b: 1 -> 2"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}, []),
        ({"a": 0.1}, {"a": 0.2}, ["a: 0.1 -> 0.2"]),
        ({"a": "é"}, {}, ['a: "é" -> null']),
    ],
)
def test_differences(stored: Any, present: Any, lines: list[str]) -> None:
    assert differences(stored, present) == lines


# The storage --------------------------------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def a_text(path: Path) -> None:
    path.write_text("notes on the sweep, and long enough to be read as a header by SQLite\n" * 20)


def a_database_cut_short(path: Path) -> None:
    open_storage(path.parent)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_database_of_another_optuna(path: Path) -> None:
    open_storage(path.parent)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        connection.commit()


def a_database_that_cannot_be_written(path: Path) -> None:
    open_storage(path.parent)
    (path.parent / "optuna.db-journal" / "file").mkdir(parents=True)  # where SQLite would write its journal


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (a_folder, "Is a directory"),
        (a_text, "file is not a database"),
        (a_database_cut_short, "malformed"),
        (a_database_of_another_optuna, "no longer compatible"),
        (a_database_that_cannot_be_written, "disk I/O error"),
    ],
)
def test_a_storage_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Path], None], reason: str) -> None:
    spoil(tmp_path / "optuna.db")
    with pytest.raises(StorageError) as raised:
        open_storage(tmp_path)
    message = str(raised.value)
    assert str(tmp_path / "optuna.db") in message
    assert reason in message
    assert message.endswith("mend its permissions, or move it away to start an empty one")
    assert "\n" not in message


def test_a_storage_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"):
        open_storage(tmp_path / "file")
    with pytest.raises(StorageError, match="Not a directory"):
        open_storage(tmp_path / "file" / "mlruns")


@pytest.mark.parametrize("new", [False, True])
def test_a_storage_that_cannot_be_written_any_more(tmp_path: Path, new: bool) -> None:
    storage = open_storage(tmp_path)
    (tmp_path / "optuna.db-journal" / "file").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"optuna\.db cannot be read and written: .*mend") as raised:
        open_study(storage, "embedded", FINGERPRINT, RandomSampler(), NopPruner(), new)
    assert "\n" not in str(raised.value)


def test_a_storage_in_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    root = tmp_path / "my runs #1, 100%"
    opened(root)
    assert [path.name for path in root.iterdir()] == ["optuna.db"]
    assert study_names(open_storage(root), "embedded") == ["embedded"]


def test_long_texts_are_kept_whole(tmp_path: Path) -> None:
    study = opened(tmp_path)
    trial = study.ask()
    text = "CUDA out of memory – \U0001f525\n" * 5_000
    trial.set_user_attr(keys.REASON, text)
    study.tell(trial, state=TrialState.FAIL)
    [row] = standings(opened(tmp_path))
    assert (row.state, row.reason) == ("FAIL", text)


# Standings ----------------------------------------------------------------------------------------------------


def test_standings(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.enqueue_trial({}, user_attrs={keys.BASELINE: True})
    for accuracy in (0.8, 0.3, None, 0.6):
        trial = study.ask()
        trial.set_user_attr(keys.SPEC, replace(SPEC, rank=trial.number + 1).as_dict())
        trial.set_user_attr(keys.TRAINABLE, 1000 + trial.number)
        trial.set_user_attr(keys.RUN_ID, f"run-{trial.number}")
        if accuracy:
            trial.report(accuracy - 0.1, step=20)
            trial.report(accuracy, step=100)
    complete, pruned, failed, given_back = [trial.number for trial in study.trials]
    study._storage.set_trial_user_attr(study.trials[complete]._trial_id, keys.LOSS, 0.5)
    study._storage.set_trial_user_attr(study.trials[complete]._trial_id, keys.MACRO_F1, 0.79)
    study._storage.set_trial_user_attr(study.trials[pruned]._trial_id, keys.REASON, "below the median")
    study._storage.set_trial_user_attr(study.trials[failed]._trial_id, keys.REASON, "out of memory")
    study.tell(complete, 0.81)
    study.tell(pruned, state=TrialState.PRUNED)
    study.tell(failed, state=TrialState.FAIL)
    give_back(study, study.trials[given_back]._trial_id)
    study.enqueue_trial({"x": 0.5})  # never started

    rows = standings(opened(tmp_path))
    assert [(row.trial, row.number, row.state) for row in rows] == [
        ("t0000", 0, "COMPLETE"),
        ("t0001", 1, "PRUNED"),
        ("t0002", 2, "FAIL"),
        ("t0003", 3, "WAITING"),
    ]
    assert rows[0] == Standing(
        trial="t0000",
        number=0,
        state="COMPLETE",
        spec=replace(SPEC, rank=1),
        baseline=True,
        accuracy=0.81,
        loss=0.5,
        macro_f1=0.79,
        trainable_parameters=1000,
        run_id="run-0",
        reason=None,
    )
    assert [row.accuracy for row in rows] == [0.81, 0.3, None, 0.6]
    assert [row.baseline for row in rows] == [True, False, False, False]
    assert [row.reason for row in rows] == [None, "below the median", "out of memory", None]
    assert [row.spec for row in rows] == [replace(SPEC, rank=rank) for rank in (1, 2, 3, 4)]


def test_trial_names_sort_as_their_numbers_do() -> None:
    assert [trial_name(number) for number in (0, 7, 123, 12_345)] == ["t0000", "t0007", "t0123", "t12345"]


def row(number: int, state: str = "COMPLETE", accuracy: float | None = 0.5, loss: float | None = 0.5) -> Standing:
    return Standing(trial_name(number), number, state, SPEC, False, accuracy, loss, 0.5, 1000, "run", None)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([], None),
        ([row(0, "PRUNED", 0.9), row(1, "FAIL", None), row(2, "RUNNING", 0.9), row(3, "WAITING", 0.9)], None),
        ([row(0, accuracy=0.5), row(1, accuracy=0.7), row(2, accuracy=0.6), row(3, "PRUNED", 0.9)], 1),
        ([row(0, accuracy=0.0), row(1, "PRUNED", 0.9)], 0),
        ([row(0, loss=0.5), row(1, loss=0.4), row(2, loss=0.45)], 1),
        ([row(1, loss=0.4), row(0, loss=0.4), row(2, loss=0.4)], 0),
        ([row(0, loss=float("nan")), row(1, loss=0.4)], 1),
        ([row(0, loss=None), row(1, loss=0.4)], 1),
        ([row(0, loss=float("nan")), row(1, loss=float("inf"))], 0),
        ([row(0, accuracy=0.7, loss=float("nan")), row(1, accuracy=0.6)], 0),
    ],
)
def test_the_best(rows: list[Standing], best: int | None) -> None:
    for order in (rows, rows[::-1]):
        found = best_of(order)
        assert (found.number if found else None) == best


def test_optuna_completes_no_trial_without_a_number(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for value in (float("nan"), None):
        trial = study.ask()
        with pytest.raises(ValueError, match=r"not acceptable|No values were told"):
            study.tell(trial, value, state=TrialState.COMPLETE)
        with pytest.raises(ValueError, match="Values were told"):
            study.tell(trial, 0.5, state=TrialState.PRUNED)
        study.tell(trial, state=TrialState.FAIL)
    trial = study.ask()
    trial.report(float("nan"), step=1)
    study.tell(trial, state=TrialState.PRUNED)
    assert [trial.value for trial in study.trials] == [None, None, None]
    assert best_of(standings(study)) is None
