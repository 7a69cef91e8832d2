"""What the stores say of a sweep, read into the values that a report is composed from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
from mlflow import MlflowClient

from agnews_lora.adapters.adapter_files import RECORD, read_record
from agnews_lora.adapters.base_models import KNOWN
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.config.experiment import Experiment, read_experiment
from agnews_lora.config.sweep import Sweep, read_sweep
from agnews_lora.data.sources import best_accuracy
from agnews_lora.errors import AdapterError, ConfigError
from agnews_lora.reporting.report import gallery
from agnews_lora.reporting.report.dossier import Answers, Dossier, Registered
from agnews_lora.reporting.report.drawing import draw
from agnews_lora.search.study import FINGERPRINT, TRIALS
from agnews_lora.serving.model_package import recorded_score
from agnews_lora.tracking import reading
from agnews_lora.tracking.reading import RunRecord, fetch
from agnews_lora.tracking.registry import Registry
from agnews_lora.training.interface import TrainSettings

_PREDICTIONS: Final = "predictions.csv"
_MISTAKES: Final = "mistakes.csv"
_CONFIRMATION: Final = "confirmation.csv"
_RECORD: Final = f"adapter/{RECORD}"
_COSTS: Final = ("rows_seen", "train_seconds", "eval_seconds", "peak_memory_bytes")


def gather(client: MlflowClient, parent_id: str, attributes: Mapping[str, Any], folder: Path) -> Dossier:
    """Everything that a report says. attributes: the study's. folder: where files are downloaded and drawn.

    What a store does not have, or has in a form that this version cannot read, is left out.
    """
    parent = reading.read_run(client, parent_id)
    assert parent is not None, "whoever asks for a report has found the sweep's parent run"
    children = [run for run in reading.trials_of(client, parent_id) if "trial" in run.tags]
    searched = [run for run in children if "confirms" not in run.tags]
    trials = trials_frame(searched)
    complete = parent.tags.get("state") == "COMPLETE"
    best = parent.tags.get("best_trial") if complete else _best_so_far(trials)
    best_run = parent.tags.get("best_run") if complete else _run_of(trials, best)
    baseline = next((run for run in searched if run.tags.get("baseline") == "true"), None)
    files = _files(client, parent, folder / "files")
    experiment, definition = _definitions(parent, files)
    shape = _shape(client, parent, best_run, folder / "record")
    answers = _answers(client, best_run, baseline, folder / "answers")
    asked = attributes.get(TRIALS, definition.trials if definition else None)
    bound = best_accuracy(experiment.data_settings) if experiment else None
    dossier = Dossier(
        sweep=parent.tags.get("sweep", parent.name),
        study=parent.tags.get("study", parent.name),
        state=parent.tags.get("state", "RUNNING"),
        began=_moment(parent.began),
        ended=_moment(parent.ended) if parent.ended else None,
        as_of=_newest(parent, children),
        params=parent.params,
        tags=parent.tags,
        trials=trials,
        asked=asked,
        files=files,
        experiment=experiment,
        definition=definition,
        settings=_settings(attributes, experiment),
        datasets=tuple({(used.context, used.digest): used for used in parent.datasets}.values()),
        shape=shape,
        winner=best,
        baseline=baseline.tags["trial"] if baseline else None,
        confirmation=_confirmation(client, parent, folder) if complete else None,
        answers=answers,
        registered=_registered(client, parent, best_run, folder / "gate"),
        bound=bound,
    )
    return replace(dossier, pictures=_pictures(client, dossier, parent, searched, folder / "pictures"))


def trials_frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a trial, in the columns that a `Dossier` says."""
    columns = [*_row(RunRecord("", "", {}, {"trial": "t0000"}, {}, (), 0, None))]
    frame = pd.DataFrame([_row(run) for run in runs], columns=columns)
    return frame.sort_values("number", kind="stable").reset_index(drop=True)


def _row(run: RunRecord) -> dict[str, Any]:
    state, params, metrics = run.tags.get("state", "RUNNING"), run.params, run.metrics
    number = run.tags["trial"].lstrip("t")
    return {
        "trial": run.tags["trial"],
        "number": int(number) if number.isdigit() else -1,
        "state": "FAIL" if state == "FAILED" else state,
        "baseline": run.tags.get("baseline") == "true",
        "accuracy": metrics.get("eval/accuracy", float("nan")),
        "macro_f1": metrics.get("eval/macro_f1", float("nan")),
        "loss": metrics.get("eval/loss", float("nan")),
        "trainable_parameters": int(params.get("trainable_parameters", 0)),
        "targets": params.get("targets"),
        "lora_r": int(params.get("lora_r", 0)),
        "lora_alpha": float(params.get("lora_alpha", "nan")),
        "lora_dropout": float(params.get("lora_dropout", "nan")),
        "learning_rate": float(params.get("learning_rate", "nan")),
        "head": params.get("head", "full"),
        "run_id": run.run_id,
        "reason": run.tags.get("error") or run.tags.get("reason") or None,
        **{cost: metrics.get(cost, float("nan")) for cost in _COSTS},
    }


def _best_so_far(trials: pd.DataFrame) -> str | None:
    done = trials[trials["state"] == "COMPLETE"]
    ranked = done.sort_values(["accuracy", "loss", "number"], ascending=[False, True, True])
    return None if ranked.empty else str(ranked["trial"].iloc[0])


def _run_of(trials: pd.DataFrame, trial: str | None) -> str | None:
    found = trials.loc[trials["trial"] == trial, "run_id"]
    return None if found.empty else str(found.iloc[0])


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _newest(parent: RunRecord, children: Sequence[RunRecord]) -> datetime:
    return _moment(max(moment for run in (parent, *children) for moment in (run.began, run.ended or 0)))


def _files(client: MlflowClient, parent: RunRecord, folder: Path) -> dict[str, str]:
    """The sweep's and the experiment's file, word for word."""
    names = [f"{parent.tags.get('sweep')}.yaml", f"experiment-{parent.params.get('experiment')}.yaml"]
    return {
        name: path.read_text(encoding="utf-8") for name, path in fetch(client, parent.run_id, names, folder).items()
    }


def _definitions(parent: RunRecord, files: Mapping[str, str]) -> tuple[Experiment | None, Sweep | None]:
    sweep, name = parent.tags.get("sweep", ""), parent.params.get("experiment", "")
    try:
        experiment = read_experiment(name, files[f"experiment-{name}.yaml"])
    except (ConfigError, KeyError):  # another version's, or gone: the listing still shows what there is
        return None, None
    try:
        return experiment, read_sweep(sweep, files[f"{sweep}.yaml"], experiment)
    except (ConfigError, KeyError):
        return experiment, None


def _settings(attributes: Mapping[str, Any], experiment: Experiment | None) -> TrainSettings | None:
    """As the study was opened with them, since a default may have changed; else as the experiment's file says."""
    try:
        return TrainSettings(**attributes[FINGERPRINT]["training"])
    except (KeyError, TypeError):  # no study, or another version's
        return experiment.settings if experiment else None


def _shape(client: MlflowClient, parent: RunRecord, best_run: str | None, folder: Path) -> ModelShape | None:
    """From the record beside the winner's adapter; else that of a known base."""
    found = fetch(client, best_run, [_RECORD], folder) if best_run else {}
    if _RECORD in found:
        try:
            return read_record(found[_RECORD].parent).shape
        except AdapterError:  # another version's
            pass
    base = parent.params.get("base")
    return next((known.shape for known in KNOWN.values() if known.hub_id == base), None)


def _answers(client: MlflowClient, best_run: str | None, baseline: RunRecord | None, folder: Path) -> Answers:
    if best_run is None:
        return Answers()
    own = fetch(client, best_run, [_PREDICTIONS, _MISTAKES], folder / "winner")
    other = fetch(client, baseline.run_id, [_PREDICTIONS], folder / "baseline") if baseline else {}

    def read(path: Path | None) -> pd.DataFrame | None:
        return pd.read_csv(path, keep_default_na=False) if path else None  # a text may be `NA`

    return Answers(read(own.get(_PREDICTIONS)), read(other.get(_PREDICTIONS)), read(own.get(_MISTAKES)))


def _confirmation(client: MlflowClient, parent: RunRecord, folder: Path) -> pd.DataFrame | None:
    found = fetch(client, parent.run_id, [_CONFIRMATION], folder)
    return pd.read_csv(found[_CONFIRMATION]) if found else None


def _registered(client: MlflowClient, parent: RunRecord, best_run: str | None, folder: Path) -> Registered | None:
    if best_run is None or "experiment" not in parent.params:
        return None
    version = Registry(client, parent.params["experiment"]).of_run(best_run)
    if version is None:
        return None
    name = f"promotion/v{version.number}/report.json"
    found = fetch(client, version.run_id, [name], folder)
    checks = json.loads(found[name].read_text(encoding="utf-8"))["checks"] if found else []
    return Registered(version, recorded_score(version), tuple(checks))


def _pictures(
    client: MlflowClient, dossier: Dossier, parent: RunRecord, searched: Sequence[RunRecord], folder: Path
) -> dict[str, Path]:
    """The figures that the parent run has; what it has not, or of an earlier end, is drawn."""
    found = fetch(client, parent.run_id, gallery.OF_SWEEP, folder) if dossier.is_complete else {}
    missing = {name: folder / name for name in gallery.DRAWN if name not in found}
    curves = {run.tags["trial"]: partial(reading.curve, client, run, run.tags["trial"]) for run in searched}
    return found | draw(dossier, curves, missing)
