"""What all tests share."""

import os
from pathlib import Path

import pytest

from agnews_lora.cli import ENVIRONMENT

for name, value in ENVIRONMENT.items():  # before any test imports torch or MLflow
    os.environ.setdefault(name, value)


@pytest.fixture
def ag_news() -> Path:
    """Folder with `train.csv` and `test.csv`: real rows, which the project does not carry."""
    folder = os.environ.get("AG_NEWS_DIR")
    if not folder:
        pytest.skip("AG_NEWS_DIR names no folder with AG News' train.csv and test.csv")
    return Path(folder)
