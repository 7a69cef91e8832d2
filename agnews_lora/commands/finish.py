"""How a sweep ends: the result computed once, its winner registered, and files, figures and pages made from it.

Finishing again changes nothing but what is new.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, astuple, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from scipy.special import softmax

from agnews_lora.commands import report
from agnews_lora.commands.prepare import Prepared
from agnews_lora.commands.report import RESULT
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.errors import RunDeleted
from agnews_lora.paths import RESULTS
from agnews_lora.reporting.figures import ANSWER_FIGURES, FIGURES, busy_seconds, draw, stretches, thumbnails
from agnews_lora.reporting.summary import certainty, next_steps
from agnews_lora.search import space
from agnews_lora.search import study as keys
from agnews_lora.search.results import Answers, SweepFacts, SweepResult
from agnews_lora.serving import reload
from agnews_lora.serving.model_package import Winner, locator, register, registration_of
from agnews_lora.serving.predict import free_name
from agnews_lora.serving.stats import count_pairs
from agnews_lora.tracking.descriptions import (
    Pages,
    model_description,
    sweep_description,
    version_description,
    winner_description,
)
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.runs import RunPage, SweepRuns, find_run, page_of
from agnews_lora.tracking.store import name_of
from agnews_lora.tracking.versions import Version
from agnews_lora.training.interface import SCORES, Objective
from agnews_lora.training.metrics import accuracy, macro_f1

PREDICTIONS: Final = "predictions.csv"  # artifact of the winner's run
WINNER: Final = "winner"  # tag of a trial's run
NUM_MISTAKES: Final = 10
NUM_BINS: Final = 10
MAX_CLASSES: Final = 20  # of which a prediction shows every probability
MAX_WEIGHTS: Final = 100_000_000  # of TF-IDF's classifier, and of one that is solved exactly
MAX_EXACT_WEIGHTS: Final = 10_000_000
# What a logged model shows of the run that trained it.
MODEL_PARAMS: Final = (
    *("targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "head"),
    *("trainable_parameters", "budget", "seed", "base"),
)
PROBABILITIES: Final = ("probability_better_than_baseline", "probability_better_than_runner_up")
MODEL_METRICS: Final = ("eval/accuracy", "eval/macro_f1", "eval/loss")

Logits = npt.NDArray[np.float32]  # [validation rows, classes]


def finish(
    sweep: Sweep,
    prepared: Prepared,
    study: optuna.Study,
    rounds: optuna.Study | None,
    runs: SweepRuns,
    options: Mapping[str, str],
    record_seconds: float,
) -> SweepResult:
    """Register the winner and publish the result of a study whose trials have all ended.

    Args:
        options: see `SweepFacts`.
        rounds: the study of the confirmation, where there is one.
        record_seconds: see `SweepResult`.

    Raises:
        PromotionError, BudgetError, AdapterError: the winner cannot be registered; the parent run stays open.
    """
    parent, registry = runs.page(), Registry(runs.client, sweep.experiment.name)
    aliases = registry.aliases()
    result = SweepResult.from_study(
        study,
        rounds,
        facts_of(sweep, prepared, len(study.get_trials(deepcopy=False)), options),
        state="COMPLETE",
        run_id=parent.run_id,
        links=runs.links,
        record_seconds=record_seconds,
    )
    winner, version = result.winner, None
    with TemporaryDirectory() as name:
        folder = Path(name)
        if winner is not None:
            adapter = _adapter(runs.client, folder, winner.run_id)
            base, validation = locator(prepared.base), prepared.corpus.validation
            logits = cache(lambda: reload.reload(adapter, base, validation))
            version = _register(result, sweep, prepared, runs, registry, adapter, logits)
            answers = _known_answers(result) or _answer(result, prepared, runs, folder, logits)
            result = replace(result, answers=answers, registration=registration_of(registry, version))
        curves = {row.trial: runs.curve(row.trial) for row in result.trials}
        rows = (*result.trials, *(row for each in result.confirmed for row in each.repeats))
        worked = stretches({row.trial: runs.times(row.trial) for row in rows}, {row.trial: row.state for row in rows})
        result = replace(result, wall_seconds=busy_seconds(worked))
        drawn = draw(result, curves, folder, worked)
        if winner is not None:
            answered = {name: drawn[name] for name in ANSWER_FIGURES}
            runs.page(winner.run_id).log_files(answered | thumbnails(answered, folder))
        parent.log_table("leaderboard", result.frame())
        _describe(result, runs.page, registry, version, drawn)
        _mark_winner(result, runs)
        show_study(study, result)
        runs.close_parent(
            "COMPLETE",
            metrics={name: round(value, 6) for name, value in metrics_of(result).items()},
            tags={"best_trial": winner.trial, "best_run": str(winner.run_id)} if winner else {},
            artifacts={**drawn, **thumbnails(drawn, folder), RESULT: write(result)},
        )
        report.write(runs.client, parent.run_id, result, folder, drawn)
    refresh_changed(runs.client, registry, aliases, {version.number} if version else set())
    return result


def refresh_changed(client: MlflowClient, registry: Registry, before: Mapping[str, str], done: Collection[int]) -> None:
    """Refresh the versions that have won or lost an alias. before: numbers by alias. done: versions to leave out."""
    after = registry.aliases()
    moved = {int(number) for alias, number in before.items() ^ after.items()}
    for number in sorted(moved.difference(done)):
        refresh(client, registry.version(number))


def refresh(client: MlflowClient, version: Version) -> None:
    """Bring result, pages and report of a version's sweep up to date, after its aliases or tags have changed.

    A version that is not the result of its sweep any more, or whose sweep has left no result, is described alone. One
    whose run is gone stays as it is.
    """
    if find_run(client, version.run_id) is None:  # somebody deleted it: there is no page to lead to
        return
    registry, own = Registry(client, version.model), page_of(client, version.run_id)
    parent = own.parent()
    result = _stored(parent.read_text(RESULT) if parent else None)
    if parent is None or result is None or result.winner is None or result.winner.run_id != version.run_id:
        registry.describe(version, version_description(version, own, parent))
        return
    result = result.registered(registration_of(registry, version))
    parent.log_files({RESULT: write(result)})
    drawn = {item.path for item in client.list_artifacts(parent.run_id)}
    _describe(result, partial(RunPage, client, parent.experiment_id), registry, version, drawn)
    with TemporaryDirectory() as folder:
        report.write(client, parent.run_id, result, Path(folder))


def facts_of(sweep: Sweep, prepared: Prepared, num_trials: int, options: Mapping[str, str]) -> SweepFacts:
    """What a result says of its sweep beside the trials. options: see `SweepFacts`."""
    experiment, base, corpus = sweep.experiment, prepared.base, prepared.corpus
    labels = np.asarray(corpus.validation.labels)
    majority = np.full_like(labels, np.bincount(corpus.train.labels).argmax())
    return SweepFacts(
        sweep=sweep.name,
        experiment=experiment.name,
        base=base.hub_id,
        base_revision=base.revision,
        shape=base.shape,
        budget=sweep.budget,
        engine=prepared.engine_name,
        seed=sweep.seed,
        planned_trials=num_trials,
        total_steps=prepared.total_steps,
        num_train_rows=len(corpus.train),
        num_validation_rows=len(corpus.validation),
        data_digest=corpus.digest,
        labels=corpus.labels,
        bound=corpus.best_accuracy,
        objective=sweep.objective,
        majority_accuracy=accuracy(majority, labels),
        majority_macro_f1=macro_f1(majority, labels),
        settings=asdict(experiment.settings),
        space=space.describe(sweep.space, base.shape, sweep.budget),
        data=sources.describe(experiment.data_settings),
        files=sources.file_hashes(experiment.data_settings),
        texts=sweep.texts,
        provenance=provenance(),
        heads=tuple(sweep.space.heads),
        adapter=experiment.spec,
        confirmation=sweep.confirmation.model_dump() if sweep.confirmation else None,
        profile=corpus.profile,
        file=sweep.reference,
        options=options,
    )


def metrics_of(result: SweepResult) -> dict[str, float]:
    """What the parent run says in numbers, in the order in which the UI shows them: the winner's accuracy first."""
    winner, baseline, mean = result.winner, result.baseline, result.confirmation
    found: dict[str, float | None] = {}
    if winner is not None:
        found |= {f"best/{name}": getattr(winner, name) for name in (*SCORES, "loss", "trainable_parameters")}
        found |= {"best/gain": result.gain}
        found |= {f"baseline/{name}": baseline.score(name) if baseline else None for name in SCORES}
    if mean is not None:
        shown = mean.as_dict(result.objective, result.facts.num_validation_rows)
        found |= {f"confirmation/{name}": shown[name] for name in shown if name not in ("seeds", "failed")}
    if chosen := result.selection:
        found |= {f"confirmation/{name}": getattr(chosen, name) for name in PROBABILITIES}
    found |= {f"{peer.key}/{name}": peer.scores[name] for peer in result.peers for name in SCORES}
    found |= {f"trials/{word}": count for word, count in result.counts.items()}
    found |= {"record_seconds": result.record_seconds}
    return {name: value for name, value in found.items() if value is not None}


def write(result: SweepResult) -> Path:
    """Write the result below the stores; gives its file."""
    path = RESULTS / f"{result.study}.json"
    result.write(path)
    return path


def _stored(text: str | None) -> SweepResult | None:
    """The result in a file's text; None without one, or where another release wrote it."""
    try:
        return SweepResult.from_json(text) if text else None
    except ValueError:
        return None


# The winner ----------------------------------------------------------------------------------------------------------


def _adapter(client: MlflowClient, folder: Path, run_id: str | None) -> Path:
    """A run's adapter, in a folder of its own below `folder`.

    Raises:
        RunDeleted: somebody deleted it.
    """
    assert run_id is not None, "a trial that ended has its run"
    if not client.list_artifacts(run_id, "adapter"):
        raise RunDeleted(
            f"Cannot finish the sweep: the adapter of run {run_id} is gone from {name_of(client)}. Put the run's "
            "artifacts back, or start another study with `agnews-lora sweep --new`."
        )
    to = folder / run_id
    to.mkdir(exist_ok=True)
    uri = client.tracking_uri
    return Path(download_artifacts(run_id=run_id, artifact_path="adapter", tracking_uri=uri, dst_path=str(to)))


def _register(
    result: SweepResult,
    sweep: Sweep,
    prepared: Prepared,
    runs: SweepRuns,
    registry: Registry,
    adapter: Path,
    logits: Callable[[], Logits],
) -> Version:
    winner, mean, experiment = result.winner, result.confirmation, sweep.experiment
    assert winner is not None and winner.run_id is not None, "a trial that ended has its run"
    assert winner.accuracy is not None and winner.loss is not None, "a trial that ended has its scores"
    scores = winner.accuracy, winner.loss
    version = register(
        registry,
        Winner(winner.run_id, adapter, sweep.name, result.study, sweep.budget, *scores),
        prepared.base,
        prepared.corpus,
        sources.describe(experiment.data_settings),
        logits,
    )
    if mean is not None:
        tags = mean.as_dict(result.objective, result.facts.num_validation_rows)
        registry.set_tags(
            version, {f"confirmation_{name}": str(value) for name, value in tags.items() if value is not None}
        )
    data = f"{experiment.data_settings.source}-validation", prepared.corpus.validation_rows.digest()
    registry.link(version, runs.page().run_id, MODEL_PARAMS, MODEL_METRICS, data)
    return registry.version(version.number)


def known_result(study: str) -> SweepResult | None:
    """The result that a study of the project had at its last end; None where it has left none."""
    path = RESULTS / f"{study}.json"
    return _stored(path.read_text(encoding="utf-8") if path.is_file() else None)


def _known_answers(result: SweepResult) -> Answers | None:
    """From an earlier end of the same study with the same winner and baseline."""
    found = known_result(result.study)
    if found is None:
        return None
    old, new = (
        [each.study_id, *(row and row.run_id for row in (each.winner, each.baseline))] for each in (found, result)
    )
    return found.answers if old == new else None


def _answer(
    result: SweepResult, prepared: Prepared, runs: SweepRuns, folder: Path, logits: Callable[[], Logits]
) -> Answers:
    """How the winner answers. Every prediction, and the table of mistakes, are put on its run."""
    winner, baseline, corpus = result.winner, result.baseline, prepared.corpus
    assert winner is not None
    other = None
    if baseline is not None and baseline.run_id is not None and find_run(runs.client, baseline.run_id):
        adapter = _adapter(runs.client, folder, baseline.run_id)
        other = reload.logits(adapter, prepared.base, corpus.validation).argmax(axis=-1)
    probabilities = softmax(logits().astype(np.float64), axis=-1)
    tfidf = tfidf_scores(corpus.train_rows, corpus.validation_rows)
    answers = replace(
        answers_of(probabilities, corpus, other),
        tfidf_accuracy=tfidf.get("accuracy"),
        tfidf_macro_f1=tfidf.get("macro_f1"),
    )
    page = runs.page(winner.run_id)
    predictions_of(probabilities, corpus).to_csv(folder / PREDICTIONS, index=False, float_format="%.6f")
    page.log_files({PREDICTIONS: folder / PREDICTIONS})
    columns = ["row", "label", "predicted", "confidence", "text"]
    page.log_table("mistakes", pd.DataFrame(answers.mistakes, columns=columns))
    return answers


def predictions_of(probabilities: npt.NDArray[np.float64], corpus: Corpus) -> pd.DataFrame:
    """One row per validation row: its label, the answer and its confidence, and with few classes all probabilities.

    probabilities: [validation rows, classes].
    """
    names = np.asarray(corpus.labels, dtype=object)
    known = {
        "row": np.arange(len(probabilities)),
        "label": names[corpus.validation.labels],
        "predicted": names[probabilities.argmax(axis=-1)],
        "confidence": probabilities.max(axis=-1),
    }
    classes = dict(zip(corpus.labels, probabilities.T, strict=True)) if len(names) <= MAX_CLASSES else {}
    return pd.DataFrame({free_name(name, classes): column for name, column in known.items()} | classes)


def tfidf_scores(train: Rows, validation: Rows) -> dict[Objective, float]:
    """Score TF-IDF over words and bigrams with logistic regression: what the same rows give without an encoder.

    Empty where no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, SGDClassifier

    num_classes = max(train.labels) + 1
    vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=MAX_WEIGHTS // num_classes)
    try:
        known = vectors.fit_transform(train.texts)
    except ValueError:  # scikit-learn's "empty vocabulary"
        return {}
    # Its solver keeps some 25 copies of the weights. With many classes, each is told from the rest by SGD.
    exact = known.shape[1] * num_classes <= MAX_EXACT_WEIGHTS
    alpha = 1 / (10 * len(train))
    peer = LogisticRegression(C=10, max_iter=1000) if exact else SGDClassifier("log_loss", alpha=alpha, random_state=0)
    predicted = peer.fit(known, train.labels).predict(vectors.transform(validation.texts))
    labels = np.asarray(validation.labels)
    return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}


def answers_of(
    probabilities: npt.NDArray[np.float64], corpus: Corpus, other: npt.NDArray[np.int64] | None = None
) -> Answers:
    """Count how the winner answers.

    Args:
        probabilities: [validation rows, classes], the winner's.
        other: [validation rows], labels that the baseline predicts.
    """
    labels, predicted = np.asarray(corpus.validation.labels), probabilities.argmax(axis=-1)
    confidence, right = probabilities.max(axis=-1), predicted == labels
    pairs, rows = np.unique(np.column_stack([labels, predicted]), axis=0, return_counts=True)
    # The tenths as they are written: 0.3 is an edge, though 3 * 0.1 lies beyond it. An edge belongs to the bin below.
    bins = np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence, side="left")
    wrong = np.flatnonzero(~right)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:NUM_MISTAKES]
    against = None
    if other is not None:
        counts = astuple(count_pairs(right, other == labels))
        against = dict(zip(("both", "only_winner", "only_baseline", "neither"), counts, strict=True))
    return Answers(
        confusion=tuple(
            (label, answer, count) for (label, answer), count in zip(pairs.tolist(), rows.tolist(), strict=True)
        ),
        calibration=tuple(
            {
                "low": int(each) / NUM_BINS,
                "count": int((bins == each).sum()),
                "confidence": float(confidence[bins == each].mean()),
                "accuracy": float(right[bins == each].mean()),
            }
            for each in np.unique(bins)
        ),
        mistakes=tuple(
            {
                "row": int(row),
                "label": corpus.labels[labels[row]],
                "predicted": corpus.labels[predicted[row]],
                "confidence": float(confidence[row]),
                "text": corpus.validation_rows.texts[row],
            }
            for row in surest
        ),
        against_baseline=against,
    )


# Pages ---------------------------------------------------------------------------------------------------------------


def _describe(
    result: SweepResult, pages: Pages, registry: Registry, version: Version | None, drawn: Collection[str]
) -> None:
    """Describe the parent run, the winner's run, the model and the version. drawn: figures that the parent run has."""
    parent, figures = pages(str(result.run_id)), {name: FIGURES[name] for name in FIGURES if name in drawn}
    parent.describe(sweep_description(result, pages, figures, next_steps(result), certainty(result)))
    if version is not None:
        own = pages(version.run_id)
        own.describe(winner_description(result, pages, ANSWER_FIGURES))
        registry.introduce(model_description(version.model, result.facts))
        registry.describe(version, version_description(version, own, parent))


def show_study(study: optuna.Study, result: SweepResult) -> None:
    """Say in optuna-dashboard what the study is, and which trial won: confirmed, it need not be the best one."""
    facts, winner, score = result.facts, result.winner, SCORES[result.objective]
    note = (
        f"### Sweep {facts.sweep}\n\nThe LoRA adapter of {facts.base} with the best {score} and at most "
        f"{facts.budget:,} trainable parameters. The value of a trial is its {score} on "
        f"{facts.num_validation_rows:,} validation rows.\n\n"
    )
    if winner is None or (value := winner.score(result.objective)) is None:
        keys.show(study, note + "No winner yet.")
        return
    mean = result.confirmation.mean(result.objective) if result.confirmation else None
    seeds = "" if mean is None else f", mean over seeds {mean:.2%}"
    found = f"{winner.trial}: {winner.spec}, {score} {value:.2%}{seeds}"
    keys.show(study, f"{note}**Winner:** {found}", found)


def _mark_winner(result: SweepResult, runs: SweepRuns) -> None:
    """The tag of the winner's run; a run that won before loses it, and says so."""
    rows = {row.run_id: row for row in result.trials if row.spec}
    winner = result.winner.run_id if result.winner else None
    for run_id in runs.marked(WINNER):
        if run_id != winner and run_id in rows:
            runs.page(run_id).set_tags({WINNER: "false"})
            runs.page(run_id).describe(winner_description(result, runs.page, ANSWER_FIGURES, rows[run_id]))
    if winner:
        runs.page(winner).set_tags({WINNER: "true"})
