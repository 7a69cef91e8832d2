"""What one process does for a sweep: claims trials, trains them through an engine, and takes down what they did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

from agnews_lora.commands.records import Records
from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.paths import WORK
from agnews_lora.reporting.progress import Progress
from agnews_lora.search import confirmation
from agnews_lora.search.claims import is_done
from agnews_lora.search.leases import Leases
from agnews_lora.search.lines import Line
from agnews_lora.search.quest import Quest, Search
from agnews_lora.search.runner import StudyRunner, tidy
from agnews_lora.tracking.runs import SweepRuns

if TYPE_CHECKING:
    from agnews_lora.training.interface import Engine


def work_folder(sweep: Sweep, study: optuna.Study) -> Path:
    """Where the trials of a study, and those that confirm them, have their work folders."""
    return WORK / sweep.name / study.study_name


def tidy_up(sweep: Sweep, study: optuna.Study) -> None:
    """Remove the work folders of trials that have ended: a kill may have come between the two."""
    folder = work_folder(sweep, study)
    for each in (study, confirmation.find_round(study)):
        if each is not None:
            tidy(each, folder)


@dataclass
class Work:
    """The part of a sweep's work that this process takes.

    leases: whose heart beats meanwhile. stop: polled; once true, nothing is started any more. patience: seconds that a
    store may be away. record_seconds: wall time that recording has taken.
    """

    sweep: Sweep
    stage: Stage
    study: optuna.Study
    leases: Leases
    runs: SweepRuns
    stop: Callable[[], bool]
    patience: float
    record_seconds: float = field(default=0.0, init=False)

    def run(self, screen: Callable[[optuna.Study], Progress]) -> None:
        """Search, then confirm, until no trial is left or running anywhere, or a stop is due.

        screen: for a study, what shows how its trials get on.

        Raises:
            StorageError: a store was away for longer than `patience` seconds; nothing is lost.
        """
        storage = Line("the studies' storage", self.patience)
        if not storage.insist(lambda: is_done(self.study), self.stop):
            self._train(self.study, self._search(), screen(self.study))
        if self.stop() or self.sweep.confirmation is None:
            return
        repeated = storage.insist(self._open_round, self.stop)
        if repeated is not None and not is_done(repeated):
            quest = confirmation.Repeats(self.stage.base.shape, self.sweep.budget, self.stage.total_steps)
            self._train(repeated, quest, screen(repeated))

    def _search(self) -> Search:
        sweep = self.sweep
        return Search(
            space=sweep.space,
            shape=self.stage.base.shape,
            budget=sweep.budget,
            seed=sweep.seed,
            baseline=sweep.experiment.spec,
            baseline_seed=sweep.experiment.seed,
            total_steps=self.stage.total_steps,
        )

    def _open_round(self) -> optuna.Study | None:
        settings = self.sweep.confirmation
        assert settings is not None
        with self.leases.queue(self.stop) as mine:
            if not mine:
                return None
            return confirmation.open_round(self.study, settings.trials, settings.seeds, self.sweep.seed)

    def _train(self, study: optuna.Study, quest: Quest, progress: Progress) -> None:
        sweep = self.sweep
        shared = {"experiment": sweep.experiment.name, "base": self.stage.base.hub_id, "budget": sweep.budget}
        with progress:
            runner = StudyRunner(
                study=study,
                leases=self.leases,
                quest=quest,
                tracker=Records(self.runs, shared, {"study": self.study.study_name}),
                screen=progress,
                folder=work_folder(sweep, self.study),
                stop=self.stop,
                patience=self.patience,
            )
            runner.work(self._engine)
        self.record_seconds += runner.record_seconds

    @cached_property
    def _engine(self) -> "Engine":
        """One for both, so that the base is loaded once."""
        return self.stage.engine(self.sweep.engine, self.sweep.slots)


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
