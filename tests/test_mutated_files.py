"""Whatever a file of the project holds: an answer with exit code 2 or a command that goes on, and no partial study.

Two projects take the mutants. In the first nothing has been swept, and its base has no weights, so that a file that is
still valid is refused as well, before any data is read. The second holds a study that waits for its first trial: rows
are read there, and a mutant that says the same as before goes on until `--timeout` stops it.
"""

import io
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from agnews_lora.cli import main
from agnews_lora.search.study import open_storage
from agnews_lora.tracking.store import open_client
from tests import mutations
from tests.mutations import CSV_FILE, FILES, KINDS, Mutant
from tests.project import agnews_lora, write_project
from tests.tiny import SENTENCES, tiny_base

NUM_MUTANTS = 380
PROCESSES = (14, 172, 201)  # a tag that runs a command, a pipe, and a device
AT_ONCE = ("--timeout", "1e-9")  # a sweep that goes on stops before its first step
ROWS = "".join(f'"{label % 4 + 1}","Report {label}","{SENTENCES[label % 8]}"\n' for label in range(48))


@dataclass(frozen=True)
class Project:
    """A folder, and what its files hold. waits: there is a study in it."""

    folder: Path
    files: dict[str, bytes]
    waits: bool


def new_project(folder: Path) -> Path:
    write_project(
        folder,
        experiment={
            "base": "base",
            "data": {
                **{"source": "files", "train": CSV_FILE, "test": "test.csv", "rows": 40, "allow_overlap": True},
                **{"columns": ["class", "title", "text"], "text": ["title", "text"], "label": "class"},
                "labels": ["World", "Sports", "Business", "Sci/Tech"],
            },
        },
        sweep={"budget": 10_000},
    )
    for split in (CSV_FILE, "test.csv"):
        (folder / split).write_text(ROWS)
    os.mkfifo(folder / mutations.PIPE)
    (folder / mutations.LOOP).symlink_to(mutations.LOOP)
    tiny_base(folder / "base", "bert")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = new_project(tmp_path_factory.mktemp("fresh"))
    (folder / "base" / "model.safetensors").unlink()
    return Project(folder, contents(folder), waits=False)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = new_project(tmp_path_factory.mktemp("waiting"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, said = answer("sweep", "small", *AT_ONCE)
    assert code == 0, said
    require_whole(folder)
    return Project(folder, contents(folder), waits=True)


def answer(*arguments: str) -> tuple[int, str]:
    """(exit code, everything printed) of a command, in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        code = main(arguments)
    assert code != 2 or errors.getvalue().startswith("agnews-lora: ")
    return code, output.getvalue() + errors.getvalue()


def tree(folder: Path) -> set[str]:
    """Every file; the folders that each start of a sweep may make are left out."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def dump(folder: Path) -> dict[str, list[str]]:
    """All that the two databases hold."""
    found = {}
    for path in sorted((folder / "mlruns").glob("*.db")):
        with closing(sqlite3.connect(path)) as connection:
            found[path.name] = list(connection.iterdump())
    return found


def require_whole(folder: Path) -> None:
    """Every study has its fingerprint and its baseline, and nothing runs any more."""
    storage = open_storage(folder / "mlruns")
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        assert {"fingerprint", "identity", "sweep"} <= study.user_attrs.keys()
        assert [trial.state.name for trial in study.trials] == ["WAITING"]
        assert study.trials[0].user_attrs["baseline"]
    client: MlflowClient = open_client(folder / "mlruns")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.run_name for run in client.search_runs(experiments) if run.info.status == "RUNNING"] == []


@pytest.fixture
def mutated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Project, Mutant]]:
    """A mutant in its project, which is the working directory; put back after the test."""
    changed: Mutant = request.param
    in_waiting = changed.file == CSV_FILE or changed.number // len(KINDS) % 6 == 5  # opening a study takes its time
    project: Project = request.getfixturevalue("waiting" if in_waiting else "fresh")
    monkeypatch.chdir(project.folder)
    if changed.file:
        Path(changed.file).write_bytes(changed.content(project.files[changed.file]))
    yield project, changed
    for name, content in project.files.items():
        Path(name).write_bytes(content)


def arguments_of(changed: Mutant, project: Project) -> tuple[str, ...]:
    """What is asked: a sweep, where rows are to be read; without, each command that reads files like these in turn."""
    if project.waits:
        return ("sweep", changed.sweep, *AT_ONCE)
    return (("sweep", "budget", "train")[changed.number % 3], changed.sweep)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mutated", [Mutant(number) for number in range(NUM_MUTANTS)], indirect=True, ids=str)
def test_a_mutant_is_refused_or_harmless(mutated: tuple[Project, Mutant]) -> None:
    project, changed = mutated
    files, stores = tree(project.folder), dump(project.folder)
    arguments = arguments_of(changed, project)
    code, said = answer(*arguments)
    assert "Traceback" not in said
    assert code in ((0, 2) if project.waits or arguments[0] == "budget" else (2,)), said
    if not project.waits:
        assert tree(project.folder) == files
    elif code == 2:
        assert dump(project.folder) == stores
    else:
        require_whole(project.folder)
    new = tree(project.folder) - files
    assert all(re.fullmatch(r"\.cache/tokens/[0-9a-f]{64}\.safetensors", name) for name in new), new


def test_the_mutants_are_of_every_kind_and_try_every_path_and_name() -> None:
    mutants = [Mutant(number) for number in range(NUM_MUTANTS)]
    assert {changed.kind for changed in mutants} == set(KINDS)
    experiment = b"data:\n  train: a\n  test: b\n"
    tried = b"".join(changed.content(experiment) for changed in mutants if changed.kind in mutations.DATA_PATHS)
    assert [path for path in mutations.PATHS if f": {path}\n".encode() not in tried] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutated", [Mutant(number) for number in PROCESSES], indirect=True, ids=str)
def test_a_process_answers_as_well(mutated: tuple[Project, Mutant]) -> None:
    project, changed = mutated
    before = tree(project.folder)
    ended = agnews_lora(project.folder, "sweep", changed.sweep, *AT_ONCE)
    assert ended.returncode == 2, ended
    assert ended.stderr.startswith("agnews-lora: ")
    assert "Traceback" not in ended.stderr + ended.stdout
    assert tree(project.folder) == before
