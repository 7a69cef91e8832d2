"""Sweep results and curves for tests, made by hand: no store, no training."""

from dataclasses import replace
from typing import Any

import pandas as pd

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search.racing import Confirmed, Selection
from agnews_lora.search.results import Answers, Registration, SweepFacts, SweepResult
from agnews_lora.search.trials import TrialSummary

SHAPE = shape_of("embedded:minilm")
LABELS = ("World", "Sports", "Business", "Sci/Tech")
HOSTILE = '#panic("x") $x^2$ *bold* _it_ @winner <script>alert(1)</script> {{ 7*7 }} \\end `raw` // /* "\' &amp; 100%'
NAN = float("nan")
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
trials: 12
seed: 13
"""


def summary(number: int, spec: TrialSpec, state: str, accuracy: float | None, **changes: Any) -> TrialSummary:
    """A trial that ended; the first is the baseline."""
    loss = None if accuracy is None else round(1 - accuracy, 4)
    full = TrialSummary(
        trial=f"t{number:04d}",
        number=number,
        state=state,
        baseline=number == 0,
        spec=spec,
        accuracy=accuracy,
        macro_f1=None if accuracy is None else round(accuracy - 0.01, 4),
        loss=loss,
        trainable_parameters=trainable_parameters(spec, SHAPE),
        seed=13 + number,
        run_id=f"run{number}",
        reason=None,
        steps=60 if state == "COMPLETE" else 20,
        rows_seen=960,
        train_seconds=12.0,
        eval_seconds=3.0,
        peak_memory_bytes=2**30,
    )
    return replace(full, **changes)


TRIALS = (
    summary(0, TrialSpec("qk", 4, 8.0, 0.1, 2e-5), "COMPLETE", 0.552),
    summary(1, TrialSpec("qv", 10, 20.0, 0.05, 3e-3), "COMPLETE", 0.9),
    summary(2, TrialSpec("ffn", 4, 4.0, 0.15, 1e-3), "PRUNED", 0.61, reason="below the median"),
    summary(3, TrialSpec("qkv", 7, 7.0, 0.0, 9e-3), "FAIL", None, reason=f"the loss is NaN: {HOSTILE}"),
    summary(4, TrialSpec("qk", 9, 36.0, 0.02, 5.7e-3), "COMPLETE", 0.876),
    summary(5, TrialSpec("all-linear", 1, 8.0, 0.11, 2.1e-3), "COMPLETE", 0.844),
    summary(6, TrialSpec("qkvo", 4, 32.0, 0.19, 8e-4), "PRUNED", 0.66, reason="below the median"),
    summary(7, TrialSpec("qv", 6, 6.0, 0.07, 4.4e-3), "COMPLETE", 0.884),
)
COUNTS = ((52, 3, 4, 3), (1, 61, 0, 0), (4, 0, 54, 4), (2, 0, 4, 58))
CONFUSION = tuple(
    (label, predicted, rows) for label, row in enumerate(COUNTS) for predicted, rows in enumerate(row) if rows
)
BINS = (
    {"low": 0.4, "count": 6, "confidence": 0.46, "accuracy": 0.5},
    {"low": 0.6, "count": 24, "confidence": 0.66, "accuracy": 0.58},
    {"low": 0.8, "count": 40, "confidence": 0.85, "accuracy": 0.9},
    {"low": 0.9, "count": 180, "confidence": 0.97, "accuracy": 0.96},
)
STORY = "Shares of the chip maker rose after it said that demand for its processors was stronger than expected."


def answers(text: str = STORY) -> Answers:
    mistakes = tuple(
        {"row": 7 * row, "label": "Business", "predicted": "Sci/Tech", "confidence": 0.98 - 0.02 * row, "text": text}
        for row in range(10)
    )
    pairs = {"both": 130, "only_winner": 95, "only_baseline": 8, "neither": 17}
    return Answers(
        confusion=CONFUSION,
        calibration=BINS,
        mistakes=mistakes,
        against_baseline=pairs,
        tfidf_accuracy=0.8125,
        tfidf_macro_f1=0.8,
    )


PROFILE = {
    "rows": {"train": 960, "validation": 250, "test": 400},
    "classes": {label: {"train": 240, "validation": 62, "test": 100} for label in LABELS},
    "max_length": 80,
    "tokens": {name: {"median": 50, "p90": 71, "p99": 87, "max": 99, "cut": 0.024} for name in ("train", "validation")},
    "duplicates": {"train": 3, "validation": 0, "test": 0},
    "conflicting": 2,
    "shared": {"train-validation": 0, "train-test": 1, "validation-test": 0},
    "warnings": [],
}


def facts(**changes: Any) -> SweepFacts:
    full = SweepFacts(
        sweep="small",
        experiment="small",
        base="sentence-transformers/all-MiniLM-L6-v2",
        base_revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        shape=SHAPE,
        budget=100_000,
        engine="multilora",
        seed=13,
        planned_trials=8,
        total_steps=60,
        num_train_rows=960,
        num_validation_rows=250,
        data_digest="4aba46d1367bc0b2d1d25bb77a6ff1ba",
        labels=LABELS,
        bound=0.94,
        majority_accuracy=0.256,
        majority_macro_f1=0.1019,
        settings={"epochs": 1, "batch_size": 16, "max_length": 80, "precision": "auto", "warmup": 0.06},
        space={
            "targets": ["qk", "qv", "qkv", "qkvo", "ffn", "all-linear"],
            "rank_share": [0.0, 1.0],
            "alpha_ratio": [1, 2, 4, 8],
            "dropout": [0.0, 0.2],
            "learning_rate": [5e-4, 1e-2],
        },
        data={"source": "newswire", "rows": "2000", "test_rows": "400"},
        texts={"small.yaml": SWEEP, "experiment-small.yaml": EXPERIMENT},
        provenance={
            "version.agnews_lora": "0.1.0",
            "version.python": "3.11.9",
            "version.torch": "2.13.0",
            "device": "CPU",
            "mlflow.source.git.commit": "0123456789abcdef0123456789abcdef01234567",
            "git.dirty": "false",
        },
        profile=PROFILE,
    )
    return replace(full, **changes)


def confirmed() -> tuple[Confirmed, ...]:
    """The best two over three seeds; one repetition of the second failed."""
    by_name = {row.trial: row for row in TRIALS}

    def again(trial: str, seed: int, accuracy: float | None) -> TrialSummary:
        state = "COMPLETE" if accuracy is not None else "FAIL"
        return replace(
            by_name[trial], trial=f"{trial}-s{seed}", seed=seed, accuracy=accuracy, macro_f1=accuracy, state=state
        )

    return (
        Confirmed(by_name["t0001"], (again("t0001", 2, 0.888), again("t0001", 3, 0.892))),
        Confirmed(by_name["t0007"], (again("t0007", 2, 0.872), again("t0007", 3, None))),
    )


def registration() -> Registration:
    """Of a promoted version."""
    checks = (
        {"rule": "the data must be the sweep's", "found": "digest 4aba46d1367b", "passed": True},
        {"rule": "at most 100,000 trainable parameters", "found": "93,700", "passed": True},
    )
    test = {"accuracy": 0.8875, "low": 0.8528, "high": 0.9149, "macro_f1": 0.887, "rows": 400}
    return Registration("small", 3, ("champion",), checks, test)


def result(**changes: Any) -> SweepResult:
    """A finished, confirmed and promoted sweep."""
    full = SweepResult(
        facts=facts(),
        study="small-2",
        study_id="5e1f",
        state="COMPLETE",
        trials=TRIALS,
        confirmed=confirmed(),
        selection=Selection("t0001", ("t0001",), 0.9999, 0.924),
        importances={"learning_rate": 0.71, "targets": 0.2, "dropout": 0.06, "rank_share": 0.03},
        run_id="parent",
        wall_seconds=450.0,
        record_seconds=3.1,
        registration=registration(),
        answers=answers(),
        ended_at=1_772_359_650.0,  # 2026-03-01 10:07:30 UTC
    )
    return replace(full, **changes)


def bare(**changes: Any) -> SweepResult:
    """A sweep of which nothing but its trials is known."""
    nothing = {
        "registration": None,
        "answers": None,
        "confirmed": (),
        "selection": None,
        "importances": {},
        "ended_at": None,
    }
    return result(**{**nothing, **changes})


def curve(row: TrialSummary) -> pd.DataFrame:
    """Points of a trial, as the run store gives them."""
    steps = range(20, row.steps + 1, 20)
    found = []
    for step in steps:
        share = step / row.steps
        accuracy = NAN if row.accuracy is None else row.accuracy - 0.3 * (1 - share)
        found.append(
            {
                "trial": row.trial,
                "step": step,
                "train/loss": 1.4 - share,
                "train/learning_rate": 1e-3 * (1 - share),
                "eval/accuracy": accuracy,
                "eval/macro_f1": accuracy - 0.01,
                "eval/loss": 1.3 - 0.8 * share,
                "eval/rows": 250 if step == 60 else 64,
            }
        )
    return pd.DataFrame(found)


def curves(of: SweepResult) -> dict[str, pd.DataFrame]:
    return {row.trial: curve(row) for row in of.trials}


assert result().winner == TRIALS[1]
