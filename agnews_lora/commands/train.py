"""`agnews-lora train`: one experiment, trained once, kept as a folder with adapter and tokenizer."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Final

import optuna
from mlflow.artifacts import download_artifacts
from optuna.pruners import NopPruner
from rich.console import Console

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import head_parameters, trainable_parameters
from agnews_lora.commands.interrupts import orderly_stop
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.config.experiment import Experiment
from agnews_lora.config.sweep import Range, Space
from agnews_lora.data.sources import label_names
from agnews_lora.data.tokens import load_tokenizer
from agnews_lora.errors import StorageError
from agnews_lora.paths import STORES, TRAINED, temporary_files
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.reporting.progress import Progress
from agnews_lora.search import study as keys
from agnews_lora.search.driver import Driver, Search
from agnews_lora.search.trials import TrialSummary
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client

TRIAL: Final = "train"


def run(experiment: Experiment, quiet: bool, as_json: bool) -> int:
    """Train an experiment and return the exit code: 0, 1 where the training failed, 128 + signal when stopped.

    Writes `trained_models/final_model/`, `accuracy_curve.png` and `loss_curve.png`, and a run in MLflow.

    Args:
        quiet: show the result alone.
        as_json: show it as JSON, and nothing else.

    Raises:
        AgnewsLoraError: anything that the user can fix.
    """
    prepared = prepare(experiment, "trainer")
    with _writing():
        TRAINED.mkdir(parents=True, exist_ok=True)
        for place in (TRAINED, Path()):  # before hours of training
            TemporaryFile(dir=place).close()
    shared = {"experiment": experiment.name, "base": prepared.base.hub_id}
    runs = SweepRuns(open_client(STORES), experiment.name, shared, provenance(), trial_curves)
    keys.quieten()
    study = optuna.create_study(pruner=NopPruner(), direction="maximize")
    keys.enqueue_named(study, TRIAL, experiment.spec, experiment.seed)
    with (
        temporary_files(),
        TemporaryDirectory() as folder,
        orderly_stop() as request,
        Progress(total_trials=1, quiet=quiet or as_json) as screen,
    ):
        for note in prepared.notes:
            screen.message(note)
        driver = Driver(study, _search(prepared), runs, screen, Path(folder), lambda: bool(request))
        driver.run(prepared.engine(slots=1)())
    trained = TrialSummary.from_trial(study.trials[0])
    if trained.state != "COMPLETE":
        failure = trained.reason if trained.state == "FAIL" else None
        _print_unfinished(experiment.name, failure, as_json)
        return 1 if failure else request.exit_code
    with _writing():
        _keep(trained, prepared, runs)
    _print_finished(experiment, trained, len(prepared.corpus.validation), as_json)
    return 0


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Cannot write {TRAINED} and the curves: {error.strerror}: {error.filename}. Free or unlock its folder."
        ) from error


def _search(prepared: Prepared) -> Search:
    """Of one trial whose configuration is given: nothing is asked from the space, and the budget is its own size."""
    experiment, shape = prepared.experiment, prepared.base.shape
    rate = experiment.spec.learning_rate
    return Search(
        space=Space(learning_rate=Range(low=rate, high=rate)),
        shape=shape,
        budget=trainable_parameters(experiment.spec, shape),
        seed=experiment.seed,
        baseline=experiment.spec,
        baseline_seed=experiment.seed,
        total_steps=prepared.total_steps,
        num_trials=1,
    )


def _print_unfinished(experiment: str, failure: str | None, as_json: bool) -> None:
    if as_json:
        state = "FAILED" if failure else "INTERRUPTED"
        print(json.dumps({"experiment": experiment, "state": state, "reason": failure}))
        return
    stopped = "Stopped. Nothing is kept of an unfinished training; start it again."
    Console(highlight=False, markup=False).print(failure or stopped)


def _print_finished(experiment: Experiment, trained: TrialSummary, num_rows: int, as_json: bool) -> None:
    spec, written = experiment.spec, TRAINED / "final_model"
    if as_json:
        found = {
            "experiment": experiment.name,
            "state": "COMPLETE",
            "configuration": spec.as_dict(),
            "accuracy": trained.accuracy,
            "macro_f1": trained.macro_f1,
            "loss": trained.loss,
            "validation_rows": num_rows,
            "trainable_parameters": trained.trainable_parameters,
            "folder": str(written),
        }
        print(json.dumps(found))
        return
    shape = shape_of(experiment.base, len(label_names(experiment.data_settings)))
    head, size = head_parameters(spec.head, shape), trainable_parameters(spec, shape)
    Console(highlight=False).print(
        f"\n[bold]{experiment.name}[/]: {spec}\n"
        f"validation accuracy   {trained.accuracy:.2%}  (macro-F1 {trained.macro_f1:.4f}, {num_rows:,} rows)\n"
        f"trainable parameters  {size:,}  ({head:,} head + {size - head:,} adapter)\n"
        f"written               {written}/  accuracy_curve.png  loss_curve.png",
        soft_wrap=True,
    )


def _keep(trained: TrialSummary, prepared: Prepared, runs: SweepRuns) -> None:
    """Put adapter, tokenizer and curves where the seed project put them."""
    uri = runs.client.tracking_uri
    with TemporaryDirectory(dir=TRAINED) as folder:
        adapter = download_artifacts(run_id=trained.run_id, artifact_path="adapter", tracking_uri=uri, dst_path=folder)
        load_tokenizer(prepared.base.folder).save_pretrained(adapter)
        final = TRAINED / "final_model"
        shutil.rmtree(final, ignore_errors=True)
        Path(adapter).replace(final)
        for name, path in trial_curves(runs.curve(TRIAL), experiment_title(prepared), Path(folder)).items():
            if "/" not in name:
                path.replace(Path(name))


def experiment_title(prepared: Prepared) -> str:
    """Of the curves."""
    spec = prepared.experiment.spec
    return f"{TRIAL}-{spec.targets}-r{spec.rank}"
