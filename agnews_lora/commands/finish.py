"""How a sweep ends: the result computed once, its winner registered, and files, figures and pages made from it.

Finishing again changes nothing but what is new.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from agnews_lora.commands import report
from agnews_lora.commands.prepare import Prepared
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.data.corpus import Corpus
from agnews_lora.data.splits import LABELS
from agnews_lora.paths import STORES
from agnews_lora.reporting import figures
from agnews_lora.reporting import winner as answer_figures
from agnews_lora.reporting.canvas import thumbnail
from agnews_lora.reporting.occupancy import slot_occupancy
from agnews_lora.reporting.paired import count_pairs
from agnews_lora.search import space
from agnews_lora.search.results import Answers, Registration, SweepFacts, SweepResult, TrialSummary
from agnews_lora.search.study import TRIALS
from agnews_lora.serving import reload
from agnews_lora.serving.registration import Winner, register
from agnews_lora.tracking import descriptions
from agnews_lora.tracking.descriptions import ANSWER_FIGURES, SWEEP_FIGURES, THUMBNAILS, Pages
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.registry import Registry, Version
from agnews_lora.tracking.runs import RunPage, SweepRuns, page_of

RESULTS: Final = STORES / "results"
RESULT: Final = "result.json"  # artifact of the parent run
PREDICTIONS: Final = "predictions.csv"  # artifact of the winner's run
WINNER: Final = "winner"  # tag of a trial's run
NUM_MISTAKES: Final = 10
DIMENSIONS: Final = ("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate")
# What a logged model shows of the run that trained it.
MODEL_PARAMS: Final = (*DIMENSIONS, "head", "trainable_parameters", "budget", "seed", "base")
MODEL_METRICS: Final = ("eval/accuracy", "eval/macro_f1", "eval/loss")
# A trial gives a sign at least every few seconds; one that gave none for longer was stopped meanwhile.
PAUSE_SECONDS: Final = 30.0
PAUSE_FACTOR: Final = 10.0

Logits = npt.NDArray[np.float32]  # [validation rows, classes]


def finish(
    sweep: Sweep,
    prepared: Prepared,
    study: optuna.Study,
    rounds: optuna.Study | None,
    runs: SweepRuns,
    wall_seconds: float,
    record_seconds: float,
) -> SweepResult:
    """Register the winner and publish the result of a study whose trials have all ended.

    Args:
        rounds: the study of the confirmation, where there is one.
        wall_seconds, record_seconds: of this start of the sweep so far, see `SweepResult`.

    Raises:
        GateError, BudgetError, AdapterError: the winner cannot be registered; the parent run stays open.
    """
    began, parent = time.perf_counter(), runs.page()
    result = SweepResult.from_study(
        study,
        rounds,
        facts_of(sweep, prepared, study.user_attrs[TRIALS]),
        state="COMPLETE",
        run_id=parent.run_id,
        record_seconds=record_seconds,
    )
    winner, version, artifacts = result.winner, None, {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if winner is not None:
            logits = cache(partial(_logits, runs.client, prepared, folder))
            version = _register(result, sweep, prepared, runs, folder, logits)
            earlier = _earlier(result)
            answers, checks = (earlier.answers, _checks(earlier, version)) if earlier else (None, ())
            if answers is None:
                answers, artifacts = _answer(result, prepared.corpus, runs, folder, logits)
            result = replace(result, answers=answers, registration=registration_of(version, checks))
        artifacts |= draw(result, runs, folder)
        artifacts |= thumbnails(artifacts, folder)
        result = replace(result, wall_seconds=wall_seconds + time.perf_counter() - began)
        artifacts[RESULT] = write(result)
        parent.log_table("leaderboard", trials_frame(result, result.ranking))
        _describe(result, runs.page, Registry(runs.client, sweep.experiment.name), version)
        _mark_winner(result, runs)
        runs.close_parent(
            "COMPLETE",
            metrics={name: round(value, 6) for name, value in metrics_of(result).items()},
            tags={"best_trial": winner.trial, "best_run": str(winner.run_id)} if winner else {},
            artifacts=artifacts,
        )
        report.write(runs.client, parent.run_id, study.user_attrs, folder)
    return result


def refresh(client: MlflowClient, version: Version, checks: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Bring result, pages and report of a version's sweep up to date, after its aliases or tags have changed.

    A version that is not the result of its sweep any more, or of a sweep without a result, is described alone.

    Args:
        checks: `{rule, found, passed}` each, where they were made just now.
    """
    registry, own = Registry(client, version.model), page_of(client, version.run_id)
    parent = own.parent()
    text = parent.read_text(RESULT) if parent else None
    result = SweepResult.from_json(text) if text else None
    if parent is None or result is None or result.winner is None or result.winner.run_id != version.run_id:
        registry.describe(version, descriptions.version(version, own, parent))
        return
    if checks is None:
        checks = result.registration.checks if result.registration else ()
    result = result.registered(registration_of(version, checks))
    parent.log_files({RESULT: write(result)})
    _describe(result, partial(RunPage, client, parent.experiment_id), registry, version)
    with TemporaryDirectory() as folder:
        report.write(client, parent.run_id, {}, Path(folder))


def facts_of(sweep: Sweep, prepared: Prepared, planned_trials: int) -> SweepFacts:
    """What a result says of its sweep beside the trials."""
    experiment, base, corpus = sweep.experiment, prepared.base, prepared.corpus
    return SweepFacts(
        sweep=sweep.name,
        experiment=experiment.name,
        base=base.hub_id,
        base_revision=base.revision,
        shape=base.shape,
        budget=sweep.budget,
        engine=sweep.engine,
        seed=sweep.seed,
        planned_trials=planned_trials,
        total_steps=prepared.total_steps,
        num_train_rows=len(corpus.train),
        num_validation_rows=len(corpus.validation),
        data_digest=corpus.digest,
        labels=LABELS,
        bound=corpus.best_accuracy,
        settings=asdict(experiment.settings),
        space=space.describe(sweep.space, base.shape, sweep.budget),
        data=sources.describe(experiment.data_settings),
        texts={
            f"{sweep.name}.yaml": sweep.source_text,
            f"experiment-{experiment.name}.yaml": experiment.source_text,
        },
        provenance=provenance(),
        heads=tuple(sweep.space.heads),
        adapter=experiment.spec,
        confirmation=sweep.confirmation.model_dump() if sweep.confirmation else None,
    )


def registration_of(version: Version, checks: Sequence[Mapping[str, Any]]) -> Registration:
    """A version as the result names it, with the test score in its tags. checks: of its last promotion."""
    tags, test = version.tags, None
    if "test_accuracy" in tags:
        names = {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high", "macro_f1": "macro_f1"}
        test = {name: float(tags[f"test_{tag}"]) for name, tag in names.items()} | {"rows": int(tags["test_rows"])}
    return Registration(version.model, version.number, version.aliases, tuple(checks), test)


def metrics_of(result: SweepResult) -> dict[str, float]:
    """What the parent run says in numbers: trials by how they ended, scores of winner and baseline, costs."""
    winner, baseline, mean = result.winner, result.baseline, result.confirmation
    found: dict[str, float | None] = {f"trials/{word}": count for word, count in result.counts.items()}
    found["record_seconds"] = result.record_seconds
    if winner is not None:
        found |= {
            "best/accuracy": winner.accuracy,
            "best/macro_f1": winner.macro_f1,
            "best/loss": winner.loss,
            "best/trainable_parameters": winner.trainable_parameters,
            "best/gain": result.gain,
            "baseline/accuracy": baseline.accuracy if baseline else None,
        }
    if mean is not None:
        found |= {
            "confirmation/mean_accuracy": mean.mean_accuracy,
            "confirmation/std_accuracy": mean.std_accuracy,
            "confirmation/drop": mean.drop,
        }
    return {name: value for name, value in found.items() if value is not None and isfinite(value)}


def write(result: SweepResult) -> Path:
    """Write the result below the stores; gives its file."""
    path = RESULTS / f"{result.study}.json"
    result.write(path)
    return path


# The winner ----------------------------------------------------------------------------------------------------------


def _logits(client: MlflowClient, prepared: Prepared, folder: Path, run_id: str) -> Logits:
    """Of the adapter that a run has, on the validation split, by plain PEFT in fp32."""
    return reload.logits(_adapter(client, folder, run_id), prepared.base, prepared.corpus.validation)


def _adapter(client: MlflowClient, folder: Path, run_id: str) -> Path:
    to = folder / run_id
    to.mkdir(exist_ok=True)
    uri = client.tracking_uri
    return Path(download_artifacts(run_id=run_id, artifact_path="adapter", tracking_uri=uri, dst_path=str(to)))


def _register(
    result: SweepResult,
    sweep: Sweep,
    prepared: Prepared,
    runs: SweepRuns,
    folder: Path,
    logits: Callable[[str], Logits],
) -> Version:
    winner, mean, experiment = result.winner, result.confirmation, sweep.experiment
    assert winner is not None and winner.run_id is not None, "a trial that ended has its run"
    registry = Registry(runs.client, experiment.name)
    version = register(
        registry,
        Winner(winner.run_id, _adapter(runs.client, folder, winner.run_id), sweep.name, result.study, sweep.budget),
        prepared.base,
        prepared.corpus,
        sources.describe(experiment.data_settings),
        partial(logits, winner.run_id),
    )
    if mean is not None:
        tags = {"seeds": len(mean.runs), "mean_accuracy": mean.mean_accuracy, "std_accuracy": mean.std_accuracy}
        registry.set_tags(
            version, {f"confirmation_{name}": str(value) for name, value in tags.items() if value is not None}
        )
    data = f"{experiment.data_settings.source}-validation", prepared.corpus.validation_rows.digest()
    registry.link(version, runs.page().run_id, MODEL_PARAMS, MODEL_METRICS, data)
    return registry.version(version.number)


def _earlier(result: SweepResult) -> SweepResult | None:
    """The result of an earlier end of the same study with the same winner and baseline: what they answer stands."""
    try:
        found = SweepResult.from_json((RESULTS / f"{result.study}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or another version's
        return None
    old, new = ([row and row.run_id for row in (each.winner, each.baseline)] for each in (found, result))
    return found if (found.study_id, old) == (result.study_id, new) else None


def _checks(earlier: SweepResult, version: Version) -> tuple[Mapping[str, Any], ...]:
    known = earlier.registration
    return known.checks if known and (known.model, known.version) == (version.model, version.number) else ()


def _answer(
    result: SweepResult, corpus: Corpus, runs: SweepRuns, folder: Path, logits: Callable[[str], Logits]
) -> tuple[Answers, dict[str, Path]]:
    """How the winner answers, and its figures; both are also put on its run, with every prediction."""
    winner, baseline = result.winner, result.baseline
    assert winner is not None and winner.run_id is not None, "a trial that ended has its run"
    page, labels = runs.page(winner.run_id), np.asarray(corpus.validation.labels)
    predictions = predictions_frame(logits(winner.run_id), corpus)
    pairs = None
    if baseline is not None and baseline.run_id is not None and runs.is_there(baseline.run_id):
        right, other = (logits(run_id).argmax(axis=-1) == labels for run_id in (winner.run_id, baseline.run_id))
        both = count_pairs(right, other)
        pairs = {
            "both": both.both,
            "only_winner": both.only_first,
            "only_baseline": both.only_second,
            "neither": both.neither,
        }
    mistakes = answer_figures.mistakes(predictions, corpus.validation_rows.texts, NUM_MISTAKES)
    answers = Answers(
        confusion=tuple(map(tuple, answer_figures.confusion(predictions).tolist())),
        calibration=tuple(answer_figures.reliability(predictions).to_dict("records")),
        mistakes=tuple(mistakes.to_dict("records")),
        against_baseline=pairs,
    )
    drawn = {name: folder / name for name in ANSWER_FIGURES}
    title = f"{winner.trial} on {len(predictions):,} validation rows"
    answer_figures.confusion_matrix(predictions, title, drawn["confusion_matrix.png"])
    answer_figures.calibration(predictions, winner.trial, drawn["calibration.png"])
    predictions.to_csv(folder / PREDICTIONS, index=False, float_format="%.6f")
    page.log_files({**drawn, **thumbnails(drawn, folder), PREDICTIONS: folder / PREDICTIONS})
    page.log_table("mistakes", mistakes)
    return answers, drawn


def predictions_frame(logits: Logits, corpus: Corpus) -> pd.DataFrame:
    """Logits as predictions: `row`, `label`, `predicted`, and the probability of each class."""
    exact = logits.astype(np.float64)
    probabilities = np.exp(exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True))
    names = np.asarray(LABELS)
    return pd.DataFrame(
        {
            "row": np.arange(len(logits)),
            "label": names[corpus.validation.labels],
            "predicted": names[logits.argmax(axis=-1)],
            **{name: probabilities[:, index] for index, name in enumerate(LABELS)},
        }
    )


# Pages and figures ---------------------------------------------------------------------------------------------------


def _describe(result: SweepResult, pages: Pages, registry: Registry, version: Version | None) -> None:
    """Descriptions of the parent run, the winner's run, the model and the version."""
    parent = pages(str(result.run_id))
    parent.describe(descriptions.sweep(result, pages))
    if result.winner is not None and version is not None:
        own = pages(version.run_id)
        own.describe(descriptions.winner(result, pages))
        registry.introduce(descriptions.model(version.model, result.facts.sweep))
        registry.describe(version, descriptions.version(version, own, parent))


def _mark_winner(result: SweepResult, runs: SweepRuns) -> None:
    """The tag of the winner's run; a run that won before loses it, and says so."""
    rows = {row.run_id: row for row in result.trials if row.spec}
    for run_id, tags in runs.children().items():
        won = result.winner is not None and run_id == result.winner.run_id
        if run_id in rows and (won or tags.get(WINNER) == "true"):
            runs.page(run_id).set_tags({WINNER: str(won).lower()})
            if not won:
                runs.page(run_id).describe(descriptions.winner(result, runs.page, rows[run_id]))


def trials_frame(result: SweepResult, rows: Sequence[TrialSummary]) -> pd.DataFrame:
    """One row a trial, in the columns that `reporting.figures` reads."""
    unknown = float("nan")
    return pd.DataFrame(
        [
            {
                "trial": row.trial,
                "number": row.number,
                "state": row.state,
                "baseline": row.baseline,
                "accuracy": unknown if row.accuracy is None else row.accuracy,
                "macro_f1": row.macro_f1,
                "loss": row.loss,
                "trainable_parameters": row.trainable_parameters,
                "targets": row.spec and row.spec.targets,
                "lora_r": row.spec and row.spec.rank,
                "lora_alpha": row.spec and row.spec.alpha,
                "lora_dropout": row.spec and row.spec.dropout,
                "learning_rate": row.spec and row.spec.learning_rate,
                "head": row.spec and row.spec.head,
                "run_id": row.run_id,
                "reason": row.reason,
                "winner": row == result.winner,
            }
            for row in rows
        ]
    )


def draw(result: SweepResult, runs: SweepRuns, folder: Path) -> dict[str, Path]:
    """The study's figures as files in `folder`, by artifact name: those of `SWEEP_FIGURES`."""
    name, facts, baseline = result.study, result.facts, result.baseline
    drawn = {figure: folder / figure for figure in SWEEP_FIGURES}
    trials = trials_frame(result, result.trials)
    figures.optimization_history(
        trials,
        f"{name}: optimisation history",
        drawn["optimization_history.png"],
        baseline=baseline.accuracy if baseline else None,
        bound=facts.bound,
    )
    figures.accuracy_against_parameters(
        trials, facts.budget, f"{name}: accuracy against size", drawn["accuracy_against_parameters.png"]
    )
    points = pd.concat([runs.curve(row.trial) for row in result.trials], ignore_index=True)
    figures.learning_curves(points, trials, f"{name}: learning curves", drawn["learning_curves.png"])
    figures.parallel_coordinates(trials, DIMENSIONS, f"{name}: configurations", drawn["parallel_coordinates.png"])
    figures.parameter_importance(result.importances, f"{name}: what matters", drawn["parameter_importance.png"])
    ended = [*result.trials, *(row for each in result.confirmed for row in each.repeats)]
    states = {row.trial: row.state for row in ended}
    intervals = stretches({trial: runs.times(trial) for trial in states}, states)
    slot_occupancy(intervals, f"{name}: which trials trained when", drawn["slot_occupancy.png"])
    return drawn


def thumbnails(drawn: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Small copies of figures, made in `folder`, by artifact name."""
    small = {f"{THUMBNAILS}/{name}": folder / THUMBNAILS / name for name in drawn}
    for path, to in zip(drawn.values(), small.values(), strict=True):
        thumbnail(path, to)
    return small


def stretches(times: Mapping[str, Sequence[float]], states: Mapping[str, str]) -> pd.DataFrame:
    """When trials trained, in the columns that `reporting.occupancy` reads.

    A long silence divides a trial: it was stopped, and resumed later.

    Args:
        times: of every sign of life of a trial, ascending, in seconds.
        states: how each trial ended.
    """
    rows = []
    for trial, signs in times.items():
        if not signs:
            continue
        gaps = [later - earlier for earlier, later in pairwise(signs)]
        longest = max(PAUSE_SECONDS, PAUSE_FACTOR * median(gaps)) if gaps else PAUSE_SECONDS
        breaks = [index + 1 for index, gap in enumerate(gaps) if gap > longest]
        for start, end in zip([0, *breaks], [*breaks, len(signs)], strict=True):
            state = states[trial] if end == len(signs) else "STOPPED"
            rows.append({"trial": trial, "began": signs[start], "ended": signs[end - 1], "state": state})
    return pd.DataFrame(rows, columns=["trial", "began", "ended", "state"])
