"""What the shipped sweep costs and finds on this machine: `make bench`.

Runs `agnews-lora sweep embedded` in an empty folder, as a user does, by either engine, and reads the rest from the
stores it left: wall time, memory, samples/s of the engine, the share of time after start-up that is neither training
nor evaluating, and how the winner compares on the test split with the baseline and with TF-IDF + logistic regression on
the same training rows.
"""

import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from mlflow.artifacts import download_artifacts
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from agnews_lora import paths
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.config.sweep import load_sweep
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import prepare_test
from agnews_lora.data.tokens import TokenTable
from agnews_lora.paths import STORES, TOKENS
from agnews_lora.search.results import SweepResult
from agnews_lora.search.trials import TrialSummary
from agnews_lora.serving import reload
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.store import tracking_uri
from benchmarks import ROOT
from benchmarks.result_files import commit_of, slug, write

SWEEP = "embedded"
VARIANTS: dict[str, dict[str, object]] = {
    "multilora": {"engine": "multilora"},
    "multilora, 1 slot": {"engine": "multilora", "slots": 1},
    "multilora, 8 slots": {"engine": "multilora", "slots": 8},
    "trainer": {"engine": "trainer"},
}
WALL = "wall time of the whole command"


def main() -> None:
    """Run the sweep in each variant, measure, print the table and write it to `results/`."""
    measured = {name: run_and_measure(keys) for name, keys in VARIANTS.items()}
    tags = provenance()
    rows = {
        what: [values.get(what, "") for values in measured.values()] for values in measured.values() for what in values
    }
    wall = {name: float(values[WALL].removesuffix(" s")) for name, values in measured.items()}
    lines = [
        f"# `make bench`: sweep {SWEEP} by both engines, {tags['device']}, {datetime.date.today()}",
        "",
        f"Commit {commit_of(tags)}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"peft {version('peft')}. One sweep after the other, each in an empty folder.",
        "",
        f"| what | {' | '.join(VARIANTS)} |",
        f"| --- |{' ---: |' * len(VARIANTS)}",
        *(f"| {what} | {' | '.join(values)} |" for what, values in rows.items()),
        "",
        f"By multilora, as shipped, the whole command takes {wall['multilora'] / wall['trainer']:.0%} of the time that "
        "it takes by trainer. Where trials share their time, no trial's own seconds can be told apart.",
    ]
    text = "\n".join(lines) + "\n"
    write(f"sweep-minilm-{slug(tags['device'])}", text)


def run_and_measure(keys: dict[str, object]) -> dict[str, str]:
    """Run the shipped sweep with these keys in an empty folder, and measure it there."""
    with tempfile.TemporaryDirectory() as folder:
        for shipped in ("experiments", "sweeps"):
            shutil.copytree(ROOT / shipped, Path(folder, shipped))
        with Path(folder, "sweeps", f"{SWEEP}.yaml").open("a", encoding="utf-8") as file:
            file.writelines(f"{key}: {value}\n" for key, value in keys.items())
        os.chdir(folder)
        try:
            began = time.time()
            process = subprocess.Popen([sys.executable, "-m", "agnews_lora", "sweep", SWEEP])
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                raise SystemExit(f"the sweep with {keys} ended with status {status}")
            return measure(began, time.time()) | {"peak memory": f"{usage.ru_maxrss / 2**20:.2f} GB"}
        finally:
            os.chdir(ROOT)


def measure(began: float, ended: float) -> dict[str, str]:
    """The table's rows, from the stores below the working directory. began, ended: Unix time of the process."""
    sweep = load_sweep(SWEEP)
    prepared = prepare(sweep.experiment)
    result = SweepResult.from_json((paths.RESULTS / f"{SWEEP}.json").read_text(encoding="utf-8"))
    repeats = [row for each in result.confirmed for row in each.repeats]
    rows = [*result.trials, *repeats]
    train_seconds = sum(row.train_seconds or 0 for row in rows)
    eval_seconds = sum(row.eval_seconds or 0 for row in rows)
    samples = sum(row.rows_seen or 0 for row in rows)
    study = optuna.load_study(study_name=SWEEP, storage=f"sqlite:///{STORES / 'optuna.db'}")
    started = min(trial.datetime_start for trial in study.trials if trial.datetime_start).timestamp()
    neither = (ended - started) - train_seconds - eval_seconds
    complete = [row for row in result.trials if row.state == "COMPLETE"]
    table = {
        "repetitions of the best, to confirm them": f"{len(repeats)}",
        "trials ended (complete, pruned)": f"{len(result.trials)} ({len(complete)}, {result.counts['pruned']})",
        "training rows of all trials": f"{samples:,.0f}",
        "training rows of an unpruned trial, at least": f"{min(row.rows_seen or 0 for row in complete):,.0f}",
        WALL: f"{ended - began:.0f} s",
        "of it start-up, until the first trial begins": f"{started - began:.0f} s",
    }
    if sweep.engine == "trainer" or sweep.slots == 1:  # one trial at a time: their seconds add up
        table |= {
            "training": f"{train_seconds:.0f} s",
            "evaluating": f"{eval_seconds:.0f} s",
            "neither, after start-up": f"{neither:.0f} s = {neither / (ended - started):.1%}",
            "samples/s while training": f"{samples / train_seconds:.0f}",
        }
    return table | compare(prepared, result)


def compare(prepared: Prepared, result: SweepResult) -> dict[str, str]:
    """Accuracy on the test split: winner, baseline, TF-IDF + logistic regression, and the best possible."""
    experiment = prepared.experiment
    rows, table = prepare_test(
        experiment.data_settings, experiment.seed, prepared.base.folder, experiment.settings.max_length, TOKENS
    )
    winner, baseline = result.winner, result.baseline
    assert winner is not None and baseline is not None
    return {
        "test rows": f"{len(rows):,}",
        "winner": f"{winner.trial}: {winner.spec}",
        "winner on the test split": f"{accuracy(prepared, winner, table):.2%}",
        f"baseline ({baseline.spec})": f"{accuracy(prepared, baseline, table):.2%}",
        "TF-IDF + logistic regression, same training rows": f"{tf_idf(prepared.corpus.train_rows, rows):.2%}",
        "best possible": f"{prepared.corpus.best_accuracy:.2%}",
    }


def accuracy(prepared: Prepared, trial: TrialSummary, test: TokenTable) -> float:
    """Accuracy of a trial's adapter, loaded by plain PEFT, in fp32."""
    adapter = download_artifacts(run_id=trial.run_id, artifact_path="adapter", tracking_uri=tracking_uri(STORES))
    logits = reload.logits(Path(adapter), prepared.base, test)
    return float(np.mean(logits.argmax(axis=-1) == test.labels))


def tf_idf(train: Rows, test: Rows) -> float:
    """The best test accuracy over variants of TF-IDF and strengths of regularisation: generous to the peer."""
    variants: tuple[dict[str, Any], ...] = ({}, {"sublinear_tf": True, "ngram_range": (1, 2)})
    return max(
        make_pipeline(TfidfVectorizer(**variant), LogisticRegression(max_iter=1000, C=strength))
        .fit(train.texts, train.labels)
        .score(test.texts, test.labels)
        for variant in variants
        for strength in (1, 3, 10, 30)
    )


if __name__ == "__main__":
    main()
