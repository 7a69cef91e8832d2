"""`agnews-lora sweep`: open or resume the study, train its trials, register the winner, say what was found."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import optuna
from rich.console import Console

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.commands import study as studies
from agnews_lora.commands.finish import finish, opening
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.stage import Stage, prepare
from agnews_lora.commands.supervisor import Crew, devices
from agnews_lora.commands.watch import Watch
from agnews_lora.commands.work import Work, log_data, tidy_up
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.errors import StudyError
from agnews_lora.paths import STORES, WORK
from agnews_lora.reporting.progress import Progress
from agnews_lora.reporting.summary import print_summary
from agnews_lora.search import confirmation
from agnews_lora.search.claims import num_ended
from agnews_lora.search.leases import SUPERVISOR, Heart, Leases
from agnews_lora.search.lines import Line
from agnews_lora.search.place import Place, exclusive
from agnews_lora.search.results import SweepResult, best_first, summaries
from agnews_lora.search.study import IDENTITY, TRIALS, answering
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Options:
    """What a start of a sweep was asked for.

    trials: how many are to have ended in all, instead of what the file says. timeout: seconds of training after which
    running trials are put back, to go on at the next start. new: start another study. workers: processes that train.
    storage, tracking: URLs of the stores, instead of the project's own. patience: seconds that they may be away.
    quiet: show the result alone. json: show it as JSON, and nothing else.
    """

    trials: int | None
    timeout: float | None
    new: bool
    workers: int
    storage: str | None
    tracking: str | None
    patience: float
    quiet: bool
    json: bool


def run(name: str, options: Options) -> int:
    """Run a sweep and give the exit code: 0 finished or out of time, 1 without a winner, 128 + signal when stopped.

    Raises:
        AgnewsLoraError: anything that the user can mend; the study is as it was before.
    """
    sweep = load_sweep(name)
    with answering():
        studies.require_feasible(sweep, shape_of(sweep.experiment.base), options.storage, options.new)
        allotted = devices(options.workers) if options.workers > 1 else []
        server = open_client(options.tracking) if options.tracking else None
        stage = prepare(sweep.experiment)
        with exclusive(WORK / sweep.name, sweep.name) as place:
            runs = SweepRuns(server or open_client(STORES), sweep.name, sweep.name)
            trials = options.trials or sweep.trials
            study = studies.opened(sweep, stage, options.storage, trials, options.new)
            leases = Leases.of(study, place.new_owner())
            leases.revoke(f"{place.id}/")  # whoever held this folder is dead
            if leases.holder(SUPERVISOR):
                waiting = "another sweep holds this study: waiting half a minute for a sign of life from it"
                print(f"agnews-lora: {waiting}", file=sys.stderr)
            if not leases.contend(SUPERVISOR):
                raise StudyError(
                    f"study {study.study_name} is being run by a sweep on another machine; add to it with "
                    f"`agnews-lora worker {sweep.name}`, or stop it first"
                )
            try:
                return _Session(name, sweep, stage, study, leases, runs, options, trials, place, allotted).run()
            finally:  # a storage that is gone is said once, by whoever met it first
                Line("the studies' storage").deliver(partial(leases.release, SUPERVISOR))


@dataclass
class _Session:
    """One start of a sweep, from the open study to the last screen."""

    name: str
    sweep: Sweep
    stage: Stage
    study: optuna.Study
    leases: Leases
    runs: SweepRuns
    options: Options
    trials: int
    place: Place
    devices: list[str | None]
    parent_run: str = ""
    record_seconds: float = 0.0
    began: float = 0.0

    def run(self) -> int:
        self.began = time.perf_counter()
        state = "INTERRUPTED"
        with orderly_stop() as request:
            with self.runs.reaching():
                self._open_runs()
            try:
                with Heart(self.leases):
                    self._train(request)
                    if request or self._num_left():
                        self._say_how_to_go_on()
                        return request.exit_code if request else 0
                    result = self._patiently(self._conclude, request)
                state = "COMPLETE"
            finally:
                if state == "INTERRUPTED":
                    Line("the run store", 0).deliver(self._interrupt_parent)
        self._say_what_was_found(result)
        return 0 if result.winner else 1

    def _interrupt_parent(self) -> None:
        with self.runs.reaching():
            self.runs.close_parent("INTERRUPTED")

    def _patiently(self, step: Callable[[], Outcome], request: StopRequest) -> Outcome:
        """Take a step that needs the stores, again where one is away for a while.

        Raises:
            StorageError: it was away for too long.
        """

        def attempt() -> tuple[Outcome]:
            with self.runs.reaching():
                return (step(),)

        outcome = Line("a store", self.options.patience).insist(attempt, lambda: bool(request))
        if outcome is None:
            raise KeyboardInterrupt
        return outcome[0]

    def _open_runs(self) -> None:
        sweep = self.sweep
        self.parent_run = self.runs.open_parent(
            self.study.study_name,
            identity=self.study.user_attrs[IDENTITY],
            params={
                "experiment": sweep.experiment.name,
                "base": self.stage.base.hub_id,
                "budget": sweep.budget,
                "engine": sweep.engine,
                "seed": sweep.seed,
            },
            tags={
                **provenance(),
                "base_revision": self.stage.base.revision,
                "data_digest": self.stage.corpus.digest,
            },
            texts={
                f"{sweep.name}.yaml": sweep.source_text,
                f"experiment-{sweep.experiment.name}.yaml": sweep.experiment.source_text,
            },
        )
        log_data(self.runs, sweep, self.stage)
        self.runs.page().describe(opening(sweep, self.stage))

    def _train(self, request: StopRequest) -> None:
        """Train in this process, or let workers do it, until enough trials have ended or a stop is due."""
        try:
            self._let_train(request)
        finally:
            Line("the studies' storage").deliver(partial(tidy_up, self.sweep, self.study))

    def _let_train(self, request: StopRequest) -> None:
        if not self._num_left():
            return
        options = self.options
        deadline = time.monotonic() + options.timeout if options.timeout else float("inf")

        def stop() -> bool:
            return bool(request) or time.monotonic() > deadline

        if self.devices:
            watch = Watch(self.study, self._overview, self.stage.total_steps)
            Crew(self._worker_arguments(), self.place, self.leases, self.study, self.devices, watch).work(stop)
            return
        work = Work(self.sweep, self.stage, self.study, self.leases, self.runs, stop, options.patience)
        work.run(self._screen)
        self.record_seconds = work.record_seconds

    def _screen(self, study: optuna.Study) -> Progress:
        """What shows how the trials of the study, or of its confirmation round, get on."""
        best = next(iter(best_first(summaries(study))), None) if study is self.study else None
        screen = Progress(
            total_trials=study.user_attrs[TRIALS],
            ended=num_ended(study),
            best=best.accuracy if best else None,
            best_trial=best.trial if best else None,
            confirms=study is not self.study,
            quiet=self.options.quiet or self.options.json,
        )
        if study is not self.study:
            screen.announce("Confirming the best trials: each is trained again with other seeds.")
        return screen

    def _overview(self, study: optuna.Study) -> Progress:
        """The screen of trials that workers train: a table, or none where they print lines of their own."""
        return Progress(quiet=True) if self._workers_speak else self._screen(study)

    @property
    def _workers_speak(self) -> bool:
        return not (self.options.quiet or self.options.json) and Progress().mode == "lines"

    def _num_left(self) -> int:
        """Trials that are still to end: those of the search, then those that confirm its best."""
        if (left := self.trials - num_ended(self.study)) > 0:
            return left
        settings = self.sweep.confirmation
        return confirmation.num_missing(self.study, settings.trials, settings.seeds) if settings else 0

    def _worker_arguments(self) -> list[str]:
        options = self.options
        given = {"--storage": options.storage, "--tracking": options.tracking, "--patience": f"{options.patience:g}"}
        words = [word for key, value in given.items() if value for word in (key, value)]
        return [self.name, *words, *([] if self._workers_speak else ["--quiet"])]

    def _conclude(self) -> SweepResult:
        rounds = confirmation.find_round(self.study) if self.sweep.confirmation else None
        seconds = time.perf_counter() - self.began
        return finish(self.sweep, self.stage, self.study, rounds, self.runs, seconds, self.record_seconds)

    def _say_how_to_go_on(self) -> None:
        left = Line("the studies' storage").ask(self._num_left, None)
        if self.options.json:
            print(json.dumps({"study": self.study.study_name, "state": "INTERRUPTED", "trials_left": left}))
            return
        trials = "trials" if left is None else f"{left} trial{'' if left == 1 else 's'}"
        Console(highlight=False).print(
            f"Stopped with {trials} to go; nothing is lost. "
            f"[bold]agnews-lora sweep {self.sweep.name}[/] goes on where this start ended.",
            soft_wrap=True,
        )

    def _say_what_was_found(self, result: SweepResult) -> None:
        if self.options.json:
            print(json.dumps(result.as_dict()))
        else:
            print_summary(Console(highlight=False), result)
