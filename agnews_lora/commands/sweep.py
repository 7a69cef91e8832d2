"""`agnews-lora sweep`: open or resume the study, train its trials, register the winner, print the result."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from rich.console import Console
from rich.markup import escape

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import feasible_ranks, require_within_budget
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.commands.finish import facts_of, finish, show_study
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.commands.reprint import print_reached, show
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.data.sources import label_names
from agnews_lora.errors import BudgetError
from agnews_lora.paths import STORES, STUDIES_DATABASE, WORK, temporary_files
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.reporting.progress import Progress
from agnews_lora.reporting.summary import next_steps, print_pages, typed
from agnews_lora.search import space as search_space
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing, open_confirmation
from agnews_lora.search.driver import Driver, Search, num_left, tidy
from agnews_lora.search.prior import known_good
from agnews_lora.search.pruner import McNemarPruner
from agnews_lora.search.results import INTERRUPTED, SweepResult
from agnews_lora.search.retry import Retry
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.trials import ENDED_STATES, TrialSummary, summaries
from agnews_lora.tracking.descriptions import opening_description
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.tracking.views import UI

Outcome = TypeVar("Outcome")


class Stopped(KeyboardInterrupt):
    """A sweep was stopped by a signal, in order: nothing is lost."""

    def __init__(self, result: SweepResult, exit_code: int) -> None:
        super().__init__("the sweep was stopped; the same call resumes it")
        self.result = result
        self.exit_code = exit_code


def run(sweep: Sweep, as_json: bool, quiet: bool, **options: Any) -> int:
    """Run a sweep, print its result, and return the exit code: 0 finished or out of time, 1 without a winner,
    128 + signal when stopped.

    Args:
        as_json: show the result as JSON, and nothing else.
        quiet, options: see `run_sweep`.

    Raises:
        AgnewsLoraError: anything that the user can fix; the study is as it was before.
    """
    stopped = 0
    try:
        result = run_sweep(sweep, quiet=quiet or as_json, **options)
    except Stopped as stop:
        result, stopped = stop.result, stop.exit_code
    if result.state == INTERRUPTED:
        _print_unfinished(result, as_json)
        return stopped
    return show(result, as_json)


def run_sweep(
    sweep: Sweep | str | Path,
    *,
    trials: int | None = None,
    timeout: float | None = None,
    new: bool = False,
    workers: int | None = None,
    address: str | None = None,
    storage: str | None = None,
    tracking: str | None = None,
    patience: float = 300.0,
    quiet: bool = False,
) -> SweepResult:
    """Run a sweep in the working directory's project, or resume it where it stopped.

    Args:
        sweep: what `load_sweep` gave, or the name or path of the file.
        trials: how many are to have ended in all, instead of the file's number. The study keeps it: a call without it
            goes on to the larger of both.
        timeout: seconds of training after which running trials are requeued for the next call.
        new: start another study.
        workers, address: train in Ray actors, of a local Ray or of a running cluster.
        storage, tracking: URLs of the stores, instead of the project's own.
        patience: seconds that a store may be away.
        quiet: show no progress.

    Returns:
        The result; its state is `INTERRUPTED` where the timeout came first.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, after the running trials were requeued: the same call resumes them.
        AgnewsLoraError: anything that the user can fix; the study is as it was before.
    """
    sweep = load_sweep(sweep)
    with keys.answering():
        shape = shape_of(sweep.experiment.base, len(label_names(sweep.experiment.data_settings)))
        require_feasible(sweep, shape, storage, new)
        client = open_client(tracking) if tracking else None
        prepared = prepare(sweep.experiment, sweep.engine, sweep.slots)
        if prepared.base.shape != shape:  # downloaded only now, its weights turned out to have no pooler
            require_feasible(sweep, prepared.base.shape, storage, new)
        with keys.sole_driver(WORK / sweep.name, sweep.name), temporary_files():
            runs = SweepRuns(
                client or open_client(STORES),
                sweep.name,
                {"experiment": sweep.experiment.name, "base": prepared.base.hub_id, "budget": sweep.budget},
                {},
                trial_curves,
            )
            database = keys.open_storage(storage or STORES)
            with keys.sole_driver_of(database, sweep.name):
                study = open_study(sweep, prepared, database, new)
                given = {"--storage": storage, "--tracking": tracking, "--workers": workers, "--address": address}
                options = {name: str(value) for name, value in given.items() if value is not None}
                return _Start(
                    sweep, prepared, study, runs, options, trials, timeout, workers, address, patience, quiet
                ).run()


@dataclass
class _Start:
    """One start of a sweep, from the open study to its result; see `run_sweep`."""

    sweep: Sweep
    prepared: Prepared
    study: keys.SweepStudy
    runs: SweepRuns
    options: dict[str, str]
    trials: int | None
    timeout: float | None
    workers: int | None
    address: str | None
    patience: float
    quiet: bool
    record_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.num_trials = keys.target(self.study, self.trials, self.sweep.trials)
        if self.trials:
            self.study.set_user_attr(keys.TARGET, self.trials)
        if self.num_trials != self.sweep.trials:
            self.options["--trials"] = str(self.num_trials)
        self.facts = facts_of(self.sweep, self.prepared, self.num_trials, self.options)
        self.folder = keys.work_folder(self.study, WORK / self.sweep.name)

    def run(self) -> SweepResult:
        with orderly_stop() as request, self._parent_run() as complete:
            if not self.quiet:
                Console(highlight=False, markup=False).print(
                    f"Engine {self.prepared.engine_name}: {self.prepared.engine_reason}.", soft_wrap=True
                )
                if not self._num_left():
                    print_reached(self.facts, self.trials, self.study)
            self._train(request)
            if request:
                raise Stopped(self._interrupted(), request.exit_code)
            if self._num_left():
                return self._interrupted()
            result = self._insist(self._finish, request)
            complete()
        return result

    @contextmanager
    def _parent_run(self) -> Iterator[Callable[[], None]]:
        """Keep the parent run open; it ends as interrupted, unless the block calls what it is given.

        One that was complete stays so where nothing was left to train.
        """
        sweep, base = self.sweep, self.prepared.base
        ended = []
        left = self._num_left()
        trials = self.study.get_trials(deepcopy=False)
        self.runs.require_known([trial.user_attrs[keys.RUN_ID] for trial in trials if keys.RUN_ID in trial.user_attrs])
        with self.runs.reaching():
            self.runs.open_parent(
                self.study.study_name,
                identity=self.study.identity,
                params={
                    "experiment": sweep.experiment.name,
                    "base": base.hub_id,
                    "budget": sweep.budget,
                    "objective": sweep.objective,
                    "engine": self.prepared.engine_name,
                    "seed": sweep.seed,
                },
                tags={
                    **provenance(),
                    "base_revision": base.revision,
                    "data_digest": self.prepared.corpus.digest,
                },
                texts=sweep.texts,
            )
            self.prepared.log_data(self.runs)
            self.runs.page().describe(opening_description(self.facts, next_steps(self._unread()), self.runs.links))
        try:
            yield lambda: ended.append(True)
        finally:
            if not ended:
                Retry("the run store", 0).succeeds(lambda: self.runs.leave_parent(complete=not left))

    def _insist(self, step: Callable[[], Outcome], request: StopRequest) -> Outcome:
        """Take a step that needs the stores, and take it again where one is away for a while.

        Raises:
            StorageError: it was away for too long.
        """

        def attempt() -> tuple[Outcome]:
            with self.runs.reaching():
                return (step(),)

        outcome = Retry("a store", self.patience).wait(attempt, lambda: bool(request))
        if outcome is None:
            raise KeyboardInterrupt
        return outcome[0]

    def _train(self, request: StopRequest) -> None:
        """Search and confirm, until no trial is left or a stop is due."""
        if not self._num_left():
            return
        deadline = time.monotonic() + self.timeout if self.timeout else float("inf")

        def stop() -> bool:
            return bool(request) or time.monotonic() > deadline

        storage = Retry("the study's storage", self.patience)
        storage.succeeds(lambda: show_study(self.study, self._unread()))
        try:
            if (before := storage.wait(self._ended, stop)) is not None:
                self._drive(stop, *before)
        finally:
            storage.succeeds(self._tidy)  # where it is away, that is not what the user is told

    def _tidy(self) -> None:
        tidy([study for study in (self.study, find_confirmation(self.study)) if study], self.folder)

    def _ended(self) -> tuple[list[TrialSummary], list[TrialSummary]]:
        """The trials of the search that have ended, and the repetitions."""
        rounds = find_confirmation(self.study) if self.sweep.confirmation else None
        found = [summaries(study) if study else [] for study in (self.study, rounds)]
        trials, repeated = ([row for row in rows if row.state in ENDED_STATES.values()] for rows in found)
        return trials, repeated

    def _drive(self, stop: Callable[[], bool], ended: list[TrialSummary], repeated: list[TrialSummary]) -> None:
        """Drive search and confirmation. ended, repeated: before."""
        sweep, settings = self.sweep, self.sweep.confirmation
        search = Search(
            space=sweep.space,
            shape=self.prepared.base.shape,
            budget=sweep.budget,
            seed=sweep.seed,
            baseline=sweep.experiment.spec,
            baseline_seed=sweep.experiment.seed,
            total_steps=self.prepared.total_steps,
            num_trials=self.num_trials,
            objective=sweep.objective,
        )

        def confirm(left: int) -> optuna.Study | None:
            if settings is None:
                return None
            return open_confirmation(self.study, settings.trials, settings.seeds, sweep.seed, left)

        with Progress(
            total_trials=self.num_trials,
            objective=sweep.objective,
            ended=ended,
            num_confirmed=settings.trials if settings else 0,
            repeated=len(repeated),
            link=self._link(),
            quiet=self.quiet,
        ) as screen:
            for note in self.prepared.notes if len(ended) < self.num_trials else ():
                screen.message(note)
            driver = Driver(self.study, search, self.runs, screen, self.folder, stop, self.patience, confirm)
            factory = self.prepared.engine(sweep.slots)
            if self.workers is None and self.address is None:
                driver.run(factory())
            else:
                from agnews_lora.search import ray_cluster

                ray_cluster.train(driver, factory, self.workers, self.address, screen.message)
        self.record_seconds = driver.record_seconds

    def _link(self) -> str:
        """Of the sweep's run in MLflow."""
        server, page = self.facts.options.get("--tracking"), self.runs.page().url
        if server:
            return f"MLflow run: {server.rstrip('/')}/{page}"
        return f"MLflow run, while `{typed('agnews-lora ui')}` runs: {UI}/{page}"

    def _num_left(self) -> int:
        """Trials that are still to end: those of the search, then those that confirm its best."""
        settings = self.sweep.confirmation
        left = num_left(self.study, self.num_trials)
        return left or (num_missing(self.study, settings.trials, settings.seeds) if settings else 0)

    def _finish(self) -> SweepResult:
        rounds = find_confirmation(self.study) if self.sweep.confirmation else None
        return finish(self.sweep, self.prepared, self.study, rounds, self.runs, self.options, self.record_seconds)

    def _interrupted(self) -> SweepResult:
        """What the study holds so far; nothing of its trials where the storage is away."""
        run_id = self.runs.page().run_id

        def read() -> SweepResult:
            rounds, left = find_confirmation(self.study) if self.sweep.confirmation else None, self._num_left()
            return SweepResult.from_study(
                self.study,
                rounds,
                self.facts,
                state=INTERRUPTED,
                run_id=run_id,
                trials_left=left,
                links=self.runs.links,
            )

        return Retry("the study's storage").call(read, self._unread())

    def _unread(self) -> SweepResult:
        """An unfinished result, without trials."""
        run_id = self.runs.page().run_id
        return SweepResult(
            self.facts,
            self.study.study_name,
            "",
            INTERRUPTED,
            (),
            (),
            {},
            run_id,
            trials_left=None,
            links=self.runs.links,
        )


def _print_unfinished(result: SweepResult, as_json: bool) -> None:
    left, command = result.trials_left, next_steps(result)[0].command
    if as_json:
        print(json.dumps({"study": result.study, "state": result.state, "trials_left": left, "resume": command}))
        return
    trials = "trials" if left is None else f"{left} trial{'' if left == 1 else 's'}"
    console = Console(highlight=False)
    console.print(
        f"Stopped with {trials} to go; nothing is lost. [bold]{escape(typed(command))}[/] resumes it.", soft_wrap=True
    )
    print_pages(console, result)


def open_study(sweep: Sweep, prepared: Prepared, storage: RDBStorage, new: bool) -> keys.SweepStudy:
    """The sweep's study, made or resumed, with the trials enqueued that it begins with.

    Raises:
        StudyError: it was made with another fingerprint, is not the sweep's, or holds what keeps it from going on.
        StorageError: it cannot be read or written.
    """
    space, shape, budget = sweep.space, prepared.base.shape, sweep.budget
    asked, shared = search_space.distributions(space, shape, budget), search_space.shared(space, shape, budget)
    sampler = TrialSeededTPE(sweep.seed, sweep.startup_trials, asked, shared)
    study = keys.open_study(
        storage,
        sweep.name,
        fingerprint(sweep, prepared),
        sampler,
        McNemarPruner(sweep.pruner.standard_errors, prepared.total_steps),
        new,
    )
    keys.require_compatible(study, space, shape, budget)
    keys.enqueue_baseline(study, sweep.experiment.spec, space, shape, budget)
    if sweep.sampler.prior:
        known = known_good(space, shape, budget, sweep.experiment.spec, sweep.startup_trials - 1)
        keys.enqueue_known(study, known, space, shape, budget)
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
        "engine": prepared.engine_name,
        "seed": {"sweep": sweep.seed, "experiment": sweep.experiment.seed},
    }


def require_feasible(sweep: Sweep, shape: ModelShape, storage: str | None, new: bool) -> None:
    """Count the baseline and every enqueued trial, before any data is read.

    Raises:
        BudgetError: one of them breaks the budget, or no preset fits it.
        ConfigError: the base's family does not have a preset that the file names.
        StudyError: the storage has a study of the sweep's name, or a copy of one, that is not the sweep's.
    """
    feasible_ranks(sweep.space.presets(shape.family), list(sweep.space.heads), shape, sweep.budget)
    with _blamed(f"the baseline of {sweep.name} (experiment {sweep.experiment.name})"):
        require_within_budget(sweep.experiment.spec, shape, sweep.budget)
    where: Path | str = storage or STORES
    if new or (isinstance(where, Path) and not (where / STUDIES_DATABASE).exists()):
        return
    database = keys.open_storage(where)
    if study_name := keys.newest_study(database, sweep.name):
        study = keys.SweepStudy(study_name, database)
        for number, spec in keys.enqueued_specs(study, sweep.space, shape, sweep.budget):
            with _blamed(f"trial {number}, enqueued in study {study_name} (`--new` starts another without it)"):
                require_within_budget(spec, shape, sweep.budget)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"Cannot train {what}: {error}.") from error
