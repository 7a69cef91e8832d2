"""The study in storage: found by its sweep, refused where it would not compare, held by one process, read as rows."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
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
from agnews_lora.search.study import (
    differences,
    open_storage,
    open_study,
    study_names,
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


def test_a_note_for_the_dashboard_gives_way_to_the_next_one_but_not_to_a_persons(tmp_path: Path) -> None:
    def noted() -> Any:
        return study._storage.get_study_system_attrs(study._study_id)["dashboard:note_str:0"]

    study = opened(tmp_path)
    keys.show(study, "Sweep\nno winner")
    keys.show(study, "Sweep\nt0003", "t0003")
    assert (noted(), study.user_attrs["winner"]) == ("Sweep\nt0003", "t0003")
    study._storage.set_study_system_attr(study._study_id, "dashboard:note_str:0", "ask Ann\nabout t0003")
    keys.show(study, "Sweep\nt0004")
    assert noted() == "ask Ann\nabout t0003"


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


def test_a_study_whose_making_was_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(keys, "name_objective", killed)
        opened(tmp_path)
    study = opened(tmp_path, fingerprint={"budget": 7})
    assert (study.study_name, study.user_attrs[keys.FINGERPRINT]) == ("embedded", {"budget": 7})
    assert study_names(open_storage(tmp_path), "embedded") == ["embedded"]


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
        "Cannot resume study embedded: it was made with other settings, and its trials would not compare:",
        '  base.revision: null -> "abc"',
        "  budget: 100000 -> 120000",
        '  data: null -> "1f00"',
        '  space.targets: ["qk", "qv"] -> ["qk"]',
        "Put them back, or start another study: `agnews-lora sweep embedded --new`.",
    ]
    assert content(tmp_path) == before
    assert opened(tmp_path, fingerprint=changed, new=True).study_name == "embedded-2"
    with pytest.raises(StudyError, match="Cannot resume study embedded-2"):
        opened(tmp_path)


def test_another_objective_is_refused_and_a_study_without_one_is_by_accuracy(tmp_path: Path) -> None:
    assert keys.objective_of(opened(tmp_path)) == "accuracy"
    assert opened(tmp_path, fingerprint=FINGERPRINT | {"objective": "accuracy"}).study_name == "embedded"
    by_macro_f1 = FINGERPRINT | {"objective": "macro_f1"}
    with pytest.raises(StudyError, match='objective: "accuracy" -> "macro_f1"'):
        opened(tmp_path, fingerprint=by_macro_f1)
    study = opened(tmp_path, fingerprint=by_macro_f1, new=True)
    assert study.metric_names == ["macro_f1"] and keys.objective_of(study) == "macro_f1"
    with pytest.raises(StudyError, match='objective: "macro_f1" -> "accuracy"'):
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
    assert message.endswith("Fix its permissions, or move it away to start an empty one.")
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
    with pytest.raises(StorageError, match=r"Cannot reach the study's storage") as raised:
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
    [again] = opened(tmp_path).trials
    assert again.user_attrs[keys.REASON] == text
