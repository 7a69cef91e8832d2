"""Dossiers for tests, made by hand: no store, no training."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.config.experiment import read_experiment
from agnews_lora.config.sweep import read_sweep
from agnews_lora.data.rows import LABELS
from agnews_lora.reporting.report.dossier import Answers, Dossier, Registered
from agnews_lora.serving.model_package import TestScore
from agnews_lora.tracking.reading import DatasetUse
from agnews_lora.tracking.registry import Version

EXPERIMENT = """\
base: embedded:minilm
data: {source: newswire, rows: 2_000, train_rows: 960, test_rows: 400}
adapter: {targets: qk, rank: 4, alpha: 8, dropout: 0.1, learning_rate: 2e-5}
training: {epochs: 1, batch_size: 16, max_length: 80, eval_every: 20, eval_rows: 64}
seed: 13
"""
SWEEP = """\
experiment: small
budget: 100_000
space:
  learning_rate: {low: 5e-4, high: 1e-2}
trials: 4
seed: 13
"""
SHAPE = shape_of("embedded:minilm")
HOSTILE = '#panic("x") $x^2$ *bold* _it_ @winner <script>alert(1)</script> {{ 7*7 }} \\end `raw` // /* "\' &amp; 100%'


def trial(number: int, spec: TrialSpec, state: str, accuracy: float, **more: Any) -> dict[str, Any]:
    row = {
        "trial": f"t{number:04d}",
        "number": number,
        "state": state,
        "baseline": number == 0,
        "accuracy": accuracy,
        "macro_f1": accuracy,
        "loss": 1 - accuracy,
        "trainable_parameters": trainable_parameters(spec, SHAPE),
        "targets": spec.targets,
        "lora_r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "learning_rate": spec.learning_rate,
        "head": spec.head,
        "run_id": f"run{number}",
        "reason": None,
        "rows_seen": 960.0,
        "train_seconds": 12.0,
        "eval_seconds": 3.0,
        "peak_memory_bytes": 2.0**30,
    }
    return row | more


TRIALS = [
    trial(0, TrialSpec("qk", 4, 8.0, 0.1, 2e-5), "COMPLETE", 0.55),
    trial(1, TrialSpec("qv", 10, 20.0, 0.05, 3e-3), "COMPLETE", 0.90),
    trial(2, TrialSpec("ffn", 4, 4.0, 0.15, 1e-3), "PRUNED", 0.61, reason="below the median"),
    trial(3, TrialSpec("qkv", 7, 7.0, 0.0, 9e-3), "FAIL", float("nan"), reason=f"the loss is NaN: {HOSTILE}"),
]


def predictions(accuracy: float, num_rows: int = 200, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 4
    predicted = np.where(np.arange(num_rows) < round(accuracy * num_rows), labels, (labels + 1) % 4)
    shares = random.dirichlet(np.ones(4), num_rows) * 0.4
    shares[np.arange(num_rows), predicted] += 0.6
    frame = pd.DataFrame({"row": range(num_rows), "label": [LABELS[k] for k in labels]})
    return frame.assign(
        predicted=[LABELS[k] for k in predicted], **{name: shares[:, k] for k, name in enumerate(LABELS)}
    )


def mistakes(text: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": [7, 9],
            "label": ["World", "Sports"],
            "predicted": ["Sports", "World"],
            "confidence": [0.98, 0.97],
            "text": [text, "An ordinary story."],
        }
    )


def confirmation() -> pd.DataFrame:
    runs = [{"trial": "t0001", "seed": 1, "accuracy": 0.9}, {"trial": "t0001-s2", "seed": 2, "accuracy": 0.88}]
    return pd.DataFrame(
        {
            "trial": ["t0001"],
            "seeds": [2],
            "failed": [1],
            "own_accuracy": [0.9],
            "mean_accuracy": [0.89],
            "std_accuracy": [0.0141],
            "drop": [0.01],
            "chosen": [True],
            "runs": [json.dumps(runs)],
        }
    )


def dossier(pictures: dict[str, Path] | None = None, **changes: Any) -> Dossier:
    """A finished sweep with everything that a store may have."""
    experiment = read_experiment("small", EXPERIMENT)
    tags = {
        "version.agnews_lora": "0.1.0",
        "version.torch": "2.13.0",
        "device": "CPU",
        "mlflow.source.git.commit": "0123456789abcdef0123456789abcdef01234567",
        "git.dirty": "false",
        "base_revision": "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        "data_digest": "4aba46d1367bc0b2",
    }
    version = Version("small", 3, "run1", {}, ("champion",))
    score = TestScore(0.8875, 0.8528, 0.9149, 0.887, 400, "16d73e3b3d0fa13f347e33bb")
    check = {"rule": "the data must be the sweep's", "found": "digest 4aba46d1367b", "passed": True}
    full = Dossier(
        sweep="small",
        study="small-2",
        state="COMPLETE",
        began=datetime(2026, 3, 1, 10, 0, tzinfo=UTC),
        ended=datetime(2026, 3, 1, 10, 7, 30, tzinfo=UTC),
        as_of=datetime(2026, 3, 1, 10, 7, 30, tzinfo=UTC),
        params={
            "experiment": "small",
            "base": "sentence-transformers/all-MiniLM-L6-v2",
            "budget": "100000",
            "engine": "multilora",
        },
        tags=tags,
        trials=pd.DataFrame(TRIALS),
        asked=4,
        files={"small.yaml": SWEEP, "experiment-small.yaml": EXPERIMENT},
        experiment=experiment,
        definition=read_sweep("small", SWEEP, experiment),
        settings=experiment.settings,
        datasets=(
            DatasetUse("newswire-training", "training", "38966be784e7665b", 960),
            DatasetUse("newswire-validation", "validation", "1bda8c9d1de2f6a7", 200),
        ),
        shape=SHAPE,
        winner="t0001",
        baseline="t0000",
        confirmation=confirmation(),
        answers=Answers(predictions(0.9), predictions(0.55, seed=1), mistakes("A story.")),
        registered=Registered(version, score, (check,)),
        bound=0.94,
        pictures=pictures or {},
    )
    return replace(full, **changes)
