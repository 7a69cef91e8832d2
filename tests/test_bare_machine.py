"""The training core is tested where a bare CUDA machine has no more than torch, transformers and PEFT."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import bare

ROOT = Path(__file__).resolve().parent.parent
LACKS = ("agnews_lora", "datasets", "evaluate", "mlflow", "optuna", "pandas", "ray", "ruamel", "sklearn")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare.make(tmp_path_factory.mktemp("bare"))


def run(python: Path, *arguments: str, folder: Path = ROOT) -> str:
    """Run a Python without the variables of this one; what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    result = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_bare_machine_is_bare(python: Path, tmp_path: Path) -> None:
    script = f"import importlib.util as u; print(*(name for name in {LACKS} if u.find_spec(name)))"
    assert run(python, "-c", script, folder=tmp_path).split() == []


def test_the_tests_for_a_gpu_are_found_there(python: Path) -> None:
    found = run(python, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", "tests/training")
    assert "tests/training/multilora/test_engine.py" in found


@pytest.mark.proof
def test_the_tests_of_training_pass_there(python: Path) -> None:
    """Those of the kernels, which take longest, need no more than torch and Triton: they are found there, as above."""
    without = "--ignore=tests/training/multilora/kernels"
    run(python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not proof", without, "tests/training")
