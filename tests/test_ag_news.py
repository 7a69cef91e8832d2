"""A sweep over real AG News rows: slow, and only where a folder with them is at hand."""

from pathlib import Path

import pytest

from agnews_lora.data.newswire import LABELS
from agnews_lora.tracking.store import open_client
from tests.project import agnews_lora, write_project

ACCURACY = 0.86  # on test.csv, from at most 3,000 training rows


@pytest.mark.proof
def test_the_promoted_adapter_is_good_on_real_news(tmp_path: Path, ag_news: Path) -> None:
    folder = write_project(
        tmp_path,
        experiment={
            "data": {
                "source": "files",
                "text": ["Title", "Description"],
                "label": "Class Index",
                "labels": list(LABELS),
                "clean": "ag_news",
                "train": str(ag_news / "train.csv"),
                "test": str(ag_news / "test.csv"),
                "train_rows": 3_000,
            },
            "adapter": {"targets": "qv", "rank": 8, "alpha": 16, "dropout": 0.1, "learning_rate": 2e-3},
            "training": {
                "epochs": 1,
                "batch_size": 16,
                "max_length": 80,
                "eval_every": 50,
                "eval_rows": 200,
                "log_every": 10,
            },
        },
        sweep={
            "space": {
                "targets": ["qv", "qkvo", "all-linear"],
                "learning_rate": {"low": 1e-3, "high": 3e-3},
                "dropout": {"low": 0.0, "high": 0.1},
                "alpha_ratio": [2],
            },
        },
    )
    swept = agnews_lora(folder, "sweep", "small")
    assert swept.returncode == 0, swept.stderr
    promoted = agnews_lora(folder, "promote", "small")
    assert promoted.returncode == 0, promoted.stderr
    version = open_client(folder / "mlruns").get_model_version_by_alias("small", "champion")
    assert int(version.tags["test_rows"]) > 3_000
    assert float(version.tags["test_accuracy"]) >= ACCURACY
    answer = agnews_lora(
        folder, "predict", "--sweep", "small", "The striker scored twice as the champions won the cup."
    )
    assert LABELS[1] in answer.stdout.splitlines()[1]
