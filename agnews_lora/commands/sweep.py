"""`agnews-lora sweep`: open or resume the study, train its trials, register the winner, print the result."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from rich.console import Console

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import feasible_ranks, require_within_budget
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.commands.finish import finish, opening
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.config.sweep import Sweep
from agnews_lora.data.sources import label_names
from agnews_lora.errors import BudgetError
from agnews_lora.paths import STORES, WORK
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.reporting.progress import Progress
from agnews_lora.reporting.summary import print_summary
from agnews_lora.search import space as search_space
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing, open_confirmation
from agnews_lora.search.driver import Driver, Search, num_left, tidy
from agnews_lora.search.pruner import PeerMedianPruner
from agnews_lora.search.results import SweepResult, best_first, summaries
from agnews_lora.search.retry import Retry
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import Engine

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Options:
    """How a sweep is started.

    Args:
        trials: how many are to have ended in all, instead of the file's number.
        timeout: seconds of training after which running trials are requeued for the next start.
        new: start another study.
        workers, address: train in Ray actors, of a local Ray or of a running cluster.
        storage, tracking: URLs of the stores, instead of the project's own.
        patience: seconds that a store may be away.
        quiet: show the result alone.
        json: show it as JSON, and nothing else.
    """

    trials: int | None = None
    timeout: float | None = None
    new: bool = False
    workers: int | None = None
    address: str | None = None
    storage: str | None = None
    tracking: str | None = None
    patience: float = 300.0
    quiet: bool = False
    json: bool = False


def run(sweep: Sweep, options: Options) -> int:
    """Run a sweep and return the exit code: 0 finished or out of time, 1 without a winner, 128 + signal when stopped.

    Raises:
        AgnewsLoraError: anything that the user can fix; the study is as it was before.
    """
    with keys.answering():
        shape = shape_of(sweep.experiment.base, len(label_names(sweep.experiment.data_settings)))
        require_feasible(sweep, shape, options.storage, options.new)
        client = open_client(options.tracking) if options.tracking else None
        prepared = prepare(sweep.experiment)
        with keys.sole_driver(WORK / sweep.name, sweep.name):
            runs = SweepRuns(
                client or open_client(STORES),
                sweep.name,
                {"experiment": sweep.experiment.name, "base": prepared.base.hub_id, "budget": sweep.budget},
                {},
                trial_curves,
            )
            storage = keys.open_storage(options.storage or STORES)
            with keys.sole_driver_of(storage, sweep.name):
                study = open_study(sweep, prepared, storage, options.new)
                return _Start(sweep, prepared, study, runs, options).run()


@dataclass
class _Start:
    """One start of a sweep, from the open study to the last screen."""

    sweep: Sweep
    prepared: Prepared
    study: optuna.Study
    runs: SweepRuns
    options: Options
    record_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.num_trials = self.options.trials or self.sweep.trials
        self.folder = WORK / self.sweep.name / self.study.study_name

    def run(self) -> int:
        began = time.perf_counter()
        with orderly_stop() as request, self._parent_run() as complete:
            self._train(request)
            if request or self._num_left():
                self._print_unfinished()
                return request.exit_code if request else 0
            result = self._insist(lambda: self._finish(time.perf_counter() - began), request)
            complete()
        if self.options.json:
            print(json.dumps(result.as_dict()))
        else:
            print_summary(Console(highlight=False), result)
        return 0 if result.winner else 1

    @contextmanager
    def _parent_run(self) -> Iterator[Callable[[], None]]:
        """Keep the parent run open; it ends as interrupted, unless the block calls what it is given."""
        sweep, base = self.sweep, self.prepared.base
        ended = []
        with self.runs.reaching():
            self.runs.open_parent(
                self.study.study_name,
                identity=self.study.user_attrs[keys.IDENTITY],
                params={
                    "experiment": sweep.experiment.name,
                    "base": base.hub_id,
                    "budget": sweep.budget,
                    "objective": sweep.objective,
                    "engine": sweep.engine,
                    "seed": sweep.seed,
                },
                tags={
                    **provenance(),
                    "base_revision": base.revision,
                    "data_digest": self.prepared.corpus.digest,
                },
                texts={
                    f"{sweep.name}.yaml": sweep.source_text,
                    f"experiment-{sweep.experiment.name}.yaml": sweep.experiment.source_text,
                },
            )
            self.prepared.log_data(self.runs)
            self.runs.page().describe(opening(sweep, self.prepared))
        try:
            yield lambda: ended.append(True)
        finally:
            if not ended:
                Retry("the run store", 0).succeeds(self._interrupt_parent)

    def _interrupt_parent(self) -> None:
        with self.runs.reaching():
            self.runs.close_parent("INTERRUPTED")

    def _insist(self, step: Callable[[], Outcome], request: StopRequest) -> Outcome:
        """Take a step that needs the stores, and take it again where one is away for a while.

        Raises:
            StorageError: it was away for too long.
        """

        def attempt() -> tuple[Outcome]:
            with self.runs.reaching():
                return (step(),)

        outcome = Retry("a store", self.options.patience).wait(attempt, lambda: bool(request))
        if outcome is None:
            raise KeyboardInterrupt
        return outcome[0]

    def _train(self, request: StopRequest) -> None:
        """Search, then confirm, until no trial is left or a stop is due."""
        if not self._num_left():
            return
        timeout = self.options.timeout
        deadline = time.monotonic() + timeout if timeout else float("inf")

        def stop() -> bool:
            return bool(request) or time.monotonic() > deadline

        storage, settings = Retry("the study's storage", self.options.patience), self.sweep.confirmation
        try:
            if storage.wait(lambda: num_left(self.study, self.num_trials), stop):
                objective = self.sweep.objective
                best = next(iter(best_first(summaries(self.study), objective)), None)
                self._drive(
                    self.study,
                    self.num_trials,
                    stop,
                    best=best.score(objective) if best else None,
                    best_trial=best.trial if best else None,
                )
            if stop() or settings is None:
                return
            rounds = storage.wait(
                lambda: open_confirmation(self.study, settings.trials, settings.seeds, self.sweep.seed), stop
            )
            if rounds is not None and (num_trials := len(rounds.get_trials(deepcopy=False))):
                self._drive(rounds, num_trials, stop, confirms=True)
        finally:
            storage.succeeds(self._tidy)  # where it is away, that is not what the user is told

    def _tidy(self) -> None:
        tidy([study for study in (self.study, find_confirmation(self.study)) if study], self.folder)

    def _drive(self, study: optuna.Study, num_trials: int, stop: Callable[[], bool], **shown: Any) -> None:
        """Drive a study. shown: of the screen."""
        sweep, options = self.sweep, self.options
        if not num_left(study, num_trials):
            return
        ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        search = Search(
            space=sweep.space,
            shape=self.prepared.base.shape,
            budget=sweep.budget,
            seed=sweep.seed,
            baseline=sweep.experiment.spec,
            baseline_seed=sweep.experiment.seed,
            total_steps=self.prepared.total_steps,
            num_trials=num_trials,
            objective=sweep.objective,
        )
        quiet = options.quiet or options.json
        with Progress(total_trials=num_trials, ended=ended, objective=sweep.objective, quiet=quiet, **shown) as screen:
            if shown.get("confirms"):
                screen.announce("Confirming the best trials: each is trained again with other seeds.")
            driver = Driver(study, search, self.runs, screen, self.folder, stop, options.patience)
            if options.workers is None and options.address is None:
                driver.run(self._engine)
            else:
                from agnews_lora.search import ray_cluster

                factory = self.prepared.engine(sweep.engine, sweep.slots)
                ray_cluster.train(driver, factory, options.workers, options.address, screen.message)
        self.record_seconds += driver.record_seconds

    @cached_property
    def _engine(self) -> Engine:
        """One for search and confirmation, so that the base is loaded once."""
        return self.prepared.engine(self.sweep.engine, self.sweep.slots)()

    def _num_left(self) -> int:
        """Trials that are still to end: those of the search, then those that confirm its best."""
        settings = self.sweep.confirmation
        left = num_left(self.study, self.num_trials)
        return left or (num_missing(self.study, settings.trials, settings.seeds) if settings else 0)

    def _finish(self, wall_seconds: float) -> SweepResult:
        rounds = find_confirmation(self.study) if self.sweep.confirmation else None
        return finish(self.sweep, self.prepared, self.study, rounds, self.runs, wall_seconds, self.record_seconds)

    def _print_unfinished(self) -> None:
        left = Retry("the study's storage").call(self._num_left, None)
        if self.options.json:
            print(json.dumps({"study": self.study.study_name, "state": "INTERRUPTED", "trials_left": left}))
            return
        trials = "trials" if left is None else f"{left} trial{'' if left == 1 else 's'}"
        target = f" --trials {self.options.trials}" if self.options.trials else ""
        Console(highlight=False).print(
            f"Stopped with {trials} to go; nothing is lost. "
            f"[bold]agnews-lora sweep {self.sweep.name}{target}[/] resumes it.",
            soft_wrap=True,
        )


def open_study(sweep: Sweep, prepared: Prepared, storage: RDBStorage, new: bool) -> optuna.Study:
    """The sweep's study, made or resumed, with its baseline enqueued.

    Raises:
        StudyError: it was made with another fingerprint.
        StorageError: it cannot be read or written.
    """
    space, shape, budget = sweep.space, prepared.base.shape, sweep.budget
    study = keys.open_study(
        storage,
        sweep.name,
        fingerprint(sweep, prepared),
        TrialSeededTPE(sweep.seed, sweep.startup_trials, search_space.shared(space, shape, budget)),
        PeerMedianPruner(sweep.pruner.startup_trials, sweep.pruner.warmup_steps),
        new,
    )
    keys.enqueue_baseline(study, sweep.experiment.spec, space, shape, budget)
    return study


def fingerprint(sweep: Sweep, prepared: Prepared) -> dict[str, Any]:
    """What a study may only be resumed with: everything that its trials' results depend on."""
    base = prepared.base
    return {
        "budget": sweep.budget,
        "space": search_space.describe(sweep.space, base.shape, sweep.budget),
        "baseline": sweep.experiment.spec.as_dict(),
        "base": {"id": base.hub_id, "revision": base.revision, "weights_sha256": base.weights_sha256},
        "data": prepared.corpus.digest,
        "training": asdict(sweep.experiment.settings),
        "objective": sweep.objective,
        "engine": sweep.engine,
        "seed": {"sweep": sweep.seed, "experiment": sweep.experiment.seed},
    }


def require_feasible(sweep: Sweep, shape: ModelShape, storage: str | None, new: bool) -> None:
    """Count the baseline and every enqueued trial, before any data is read.

    Raises:
        BudgetError: one of them breaks the budget, or no preset fits it.
    """
    feasible_ranks(list(sweep.space.targets), list(sweep.space.heads), shape, sweep.budget)
    with _blamed(f"experiment {sweep.experiment.name}, the baseline of {sweep.name}"):
        require_within_budget(sweep.experiment.spec, shape, sweep.budget)
    where: Path | str = storage or STORES
    if new or (isinstance(where, Path) and not (where / "optuna.db").exists()):
        return
    database = keys.open_storage(where)
    for study_name in keys.study_names(database, sweep.name)[-1:]:
        study = optuna.load_study(study_name=study_name, storage=database)
        for number, spec in keys.enqueued_specs(study, sweep.space, shape, sweep.budget):
            with _blamed(f"trial {number}, enqueued in study {study_name} (`--new` starts another without it)"):
                require_within_budget(spec, shape, sweep.budget)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"{what}: {error}") from error
