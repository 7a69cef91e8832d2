"""`agnews-lora sweep`: open or resume the study, train its trials, register the winner, say what was found."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import optuna
from rich.console import Console

from agnews_lora.adapters.bases import shape_of
from agnews_lora.commands import study as studies
from agnews_lora.commands.conclusion import Conclusion
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.places import STORES, WORK
from agnews_lora.commands.stage import Stage, prepare
from agnews_lora.commands.supervisor import Crew, devices
from agnews_lora.commands.work import log_data, train, work_folder
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.errors import StudyError
from agnews_lora.reporting.progress import Progress
from agnews_lora.reporting.summary import SweepSummary, print_summary
from agnews_lora.search.claims import num_ended
from agnews_lora.search.leases import SUPERVISOR, Heart, Leases
from agnews_lora.search.lines import Line
from agnews_lora.search.place import Place, exclusive
from agnews_lora.search.runner import tidy
from agnews_lora.search.study import IDENTITY, answering, best_of, standings
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.registry import Version
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Options:
    """What a start of a sweep was asked for.

    trials: how many are to have ended in all, instead of what the file says. timeout: seconds of training after which
    running trials are put back, to go on at the next start. new: start another study. workers: processes that train.
    storage, tracking: URLs of the stores, instead of the project's own. patience: seconds that they may be away.
    """

    trials: int | None
    timeout: float | None
    new: bool
    workers: int
    storage: str | None
    tracking: str | None
    patience: float


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
                print("Another sweep holds this study: waiting for half a minute whether it gives a sign of life.")
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
    record_seconds: float = 0.0

    def run(self) -> int:
        began = time.perf_counter()
        state = "INTERRUPTED"
        with orderly_stop() as request:
            with self.runs.reaching():
                self._open_runs()
            try:
                with Heart(self.leases):
                    self._train(request)
                    if request or num_ended(self.study) < self.trials:
                        self._say_how_to_go_on()
                        return request.exit_code if request else 0
                    version = self._patiently(self._conclude, request)
                state = "COMPLETE"
            finally:
                if state == "INTERRUPTED":
                    Line("the run store", 0).deliver(self._interrupt_parent)
        print_summary(Console(highlight=False), self._summary(version, time.perf_counter() - began))
        return 0 if version else 1

    def _interrupt_parent(self) -> None:
        with self.runs.reaching():
            self.runs.close_parent("INTERRUPTED")

    def _patiently(self, step: Callable[[], Outcome], request: StopRequest) -> Outcome:
        """Take a step that needs the stores, again where one is away for a while.

        Raises:
            StorageError: it was away for too long.
        """
        line, outcomes = Line("a store", self.options.patience), list[Outcome]()

        def attempt() -> None:
            with self.runs.reaching():
                outcomes.append(step())

        while not line.deliver(attempt):
            if line.loss:
                raise line.loss
            if request:
                raise KeyboardInterrupt
            time.sleep(1.0)
        return outcomes[0]

    def _open_runs(self) -> None:
        sweep = self.sweep
        self.runs.open_parent(
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

    def _train(self, request: StopRequest) -> None:
        """Train in this process, or let workers do it, until enough trials have ended or a stop is due."""
        try:
            self._let_train(request)
        finally:
            Line("the studies' storage").deliver(partial(tidy, self.study, work_folder(self.sweep, self.study)))

    def _let_train(self, request: StopRequest) -> None:
        if num_ended(self.study) >= self.trials:
            return
        options = self.options
        deadline = time.monotonic() + options.timeout if options.timeout else float("inf")

        def stop() -> bool:
            return bool(request) or time.monotonic() > deadline

        if self.devices:
            Crew(self._worker_arguments(), self.place, self.leases, self.study, self.devices).work(stop)
            return
        best = best_of(standings(self.study))
        progress = Progress(
            total_trials=self.trials,
            ended=num_ended(self.study),
            best=best.accuracy if best else None,
            best_trial=best.trial if best else None,
        )
        self.record_seconds = train(
            self.sweep, self.stage, self.study, self.leases, self.runs, progress, stop, options.patience
        )

    def _worker_arguments(self) -> list[str]:
        options = self.options
        given = {"--storage": options.storage, "--tracking": options.tracking, "--patience": f"{options.patience:g}"}
        return [self.name, *(word for key, value in given.items() if value for word in (key, value))]

    def _conclude(self) -> Version | None:
        conclusion = Conclusion(self.sweep, self.stage, self.study, self.runs)
        return conclusion.draw({"record_seconds": self.record_seconds})

    def _say_how_to_go_on(self) -> None:
        ended = Line("the studies' storage").ask(lambda: num_ended(self.study), None)
        left = "trials" if ended is None else f"{self.trials - ended} of {self.trials} trials"
        Console(highlight=False).print(
            f"Stopped with {left} to go; nothing is lost. "
            f"[bold]agnews-lora sweep {self.sweep.name}[/] goes on where this start ended.",
            soft_wrap=True,
        )

    def _summary(self, version: Version | None, seconds: float) -> SweepSummary:
        rows = standings(self.study)
        winner = best_of(rows)
        baseline = next((row for row in rows if row.baseline and row.state == "COMPLETE"), None)
        counts = {state: sum(row.state == state for row in rows) for state in ("COMPLETE", "PRUNED", "FAIL")}
        named = "" if self.sweep.name == "embedded" else f" SWEEP={self.sweep.name}"
        return SweepSummary(
            study=self.study.study_name,
            num_complete=counts["COMPLETE"],
            num_pruned=counts["PRUNED"],
            num_failed=counts["FAIL"],
            winner=winner.trial if winner else None,
            configuration=str(winner.spec) if winner else None,
            accuracy=winner.accuracy if winner else None,
            trainable_parameters=winner.trainable_parameters if winner else None,
            budget=self.sweep.budget,
            baseline_accuracy=baseline.accuracy if baseline else None,
            bound=self.stage.corpus.best_accuracy,
            wall_seconds=seconds,
            registered=f"{version} as {', '.join(version.aliases) or 'a version'}" if version else None,
            next_commands=(
                ("make ui", "browse the runs"),
                (f"make promote{named}", "put the winner through the gate, and make it champion"),
            ),
        )
