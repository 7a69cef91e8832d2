"""What one process does for a study: claims its trials, trains them through an engine, and takes down what they did."""

from collections.abc import Callable
from pathlib import Path

import optuna

from agnews_lora.commands.places import WORK
from agnews_lora.commands.records import Records
from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.reporting.progress import Progress
from agnews_lora.search.leases import Leases
from agnews_lora.search.runner import Quest, StudyRunner
from agnews_lora.tracking.runs import SweepRuns


def work_folder(sweep: Sweep, study: optuna.Study) -> Path:
    """Where the trials of a study have their work folders."""
    return WORK / sweep.name / study.study_name


def train(
    sweep: Sweep,
    stage: Stage,
    study: optuna.Study,
    leases: Leases,
    runs: SweepRuns,
    progress: Progress,
    stop: Callable[[], bool],
    patience: float,
) -> float:
    """Train until no trial is left or running anywhere, or a stop is due; the seconds that recording took.

    leases: whose heart beats meanwhile.

    Raises:
        StorageError: a store was away for longer than `patience` seconds; nothing is lost.
    """
    quest = Quest(
        space=sweep.space,
        shape=stage.base.shape,
        budget=sweep.budget,
        seed=sweep.seed,
        baseline=sweep.experiment.spec,
        baseline_seed=sweep.experiment.seed,
        total_steps=stage.total_steps,
    )
    shared = {"experiment": sweep.experiment.name, "base": stage.base.hub_id, "budget": sweep.budget}
    engine = stage.engine(sweep.engine, sweep.slots)
    with progress:
        runner = StudyRunner(
            study=study,
            leases=leases,
            quest=quest,
            tracker=Records(runs, shared, {"study": study.study_name}),
            screen=progress,
            folder=work_folder(sweep, study),
            stop=stop,
            patience=patience,
        )
        runner.work(engine)
    return runner.record_seconds


def log_data(runs: SweepRuns, sweep: Sweep, stage: Stage) -> None:
    """Make the data sets inputs of all runs that start from now on."""
    data = sources.describe(sweep.experiment.data_settings)
    description = ", ".join(f"{key} {value}" for key, value in data.items())
    for context, rows in (("training", stage.corpus.train_rows), ("validation", stage.corpus.validation_rows)):
        runs.log_dataset(
            f"{data['source']}-{context}",
            rows.digest(),
            num_rows=len(rows),
            profile={"num_classes": len(set(rows.labels))},
            source=description,
            context=context,
        )
