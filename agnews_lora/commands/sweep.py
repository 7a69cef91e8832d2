"""`agnews-lora sweep`: open or resume the study, train its trials, register the winner, say what was found."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from rich.console import Console

from agnews_lora.adapters.bases import shape_of
from agnews_lora.adapters.budget import feasible_ranks, require_within_budget
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.commands import board
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.places import STORES, WORK
from agnews_lora.commands.records import Records
from agnews_lora.commands.stage import Stage, prepare
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.data import sources
from agnews_lora.errors import BudgetError
from agnews_lora.reporting.progress import Progress
from agnews_lora.reporting.summary import SweepSummary, print_summary
from agnews_lora.search import space as search_space
from agnews_lora.search.pruner import PeerMedianPruner
from agnews_lora.search.queue import enqueue_baseline, waiting_specs
from agnews_lora.search.runner import Quest, StudyRunner
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import (
    ENDED,
    IDENTITY,
    Standing,
    best_of,
    exclusive,
    give_back_stale,
    open_storage,
    open_study,
    standings,
    study_names,
)
from agnews_lora.serving.registration import Winner, register
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.registry import Registry, Version
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client


def run(name: str, trials: int | None, timeout: float | None, new: bool) -> int:
    """Run a sweep and give the exit code: 0 finished or out of time, 1 without a winner, 128 + signal when stopped.

    trials: how many are to have ended in all, instead of what the file says. timeout: seconds of training after which
    the running trial is put back, to go on at the next start. new: start another study.

    Raises:
        AgnewsLoraError: anything that the user can mend; the study is as it was before.
    """
    sweep = load_sweep(name)
    shape = shape_of(sweep.experiment.base)
    _require_feasible(sweep, shape, new)
    stage = prepare(sweep.experiment)
    with exclusive(WORK / sweep.name, sweep.name):
        client = open_client(STORES)
        sampler = TrialSeededTPE(
            sweep.seed, sweep.startup_trials, search_space.shared(sweep.space, shape, sweep.budget)
        )
        pruner = PeerMedianPruner(sweep.pruner.startup_trials, sweep.pruner.warmup_steps)
        study = open_study(open_storage(STORES), sweep.name, fingerprint(sweep, stage), sampler, pruner, new)
        enqueue_baseline(study, sweep.experiment.spec, sweep.space, shape, sweep.budget)
        return _Session(sweep, stage, study, client, trials or sweep.trials, timeout).run()


def _require_feasible(sweep: Sweep, shape: ModelShape, new: bool) -> None:
    """Count the baseline and every enqueued trial, before any data is read.

    Raises:
        BudgetError: one of them breaks the budget, or no preset fits it.
    """
    feasible_ranks(list(sweep.space.targets), list(sweep.space.heads), shape, sweep.budget)
    with _blamed(f"experiment {sweep.experiment.name}, the baseline of {sweep.name}"):
        require_within_budget(sweep.experiment.spec, shape, sweep.budget)
    if new or not (STORES / "optuna.db").exists():
        return
    storage = open_storage(STORES)
    for study_name in study_names(storage, sweep.name)[-1:]:
        study = optuna.load_study(study_name=study_name, storage=storage)
        for number, spec in waiting_specs(study, sweep.space, shape, sweep.budget):
            with _blamed(f"trial {number}, enqueued in study {study_name} (`--new` starts another without it)"):
                require_within_budget(spec, shape, sweep.budget)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"{what}: {error}") from error


def fingerprint(sweep: Sweep, stage: Stage) -> dict[str, Any]:
    """What a study may only be resumed with: everything that its trials' results depend on."""
    base = stage.base
    return {
        "budget": sweep.budget,
        "space": search_space.describe(sweep.space, base.shape, sweep.budget),
        "baseline": sweep.experiment.spec.as_dict(),
        "base": {"id": base.hub_id, "revision": base.revision, "weights_sha256": base.weights_sha256},
        "data": stage.corpus.digest,
        "training": asdict(sweep.experiment.settings),
        "engine": sweep.engine,
        "seed": {"sweep": sweep.seed, "experiment": sweep.experiment.seed},
    }


@dataclass
class _Session:
    """One start of a sweep, from the open study to the last screen."""

    sweep: Sweep
    stage: Stage
    study: optuna.Study
    client: MlflowClient
    trials: int
    timeout: float | None
    record_seconds: float = 0.0

    def run(self) -> int:
        began = time.perf_counter()
        give_back_stale(self.study)
        runs = self._open_runs()
        state = "INTERRUPTED"
        try:
            with orderly_stop() as request:
                self._train(runs, request)
            if request or self._num_ended() < self.trials:
                self._say_how_to_go_on()
                return request.exit_code if request else 0
            version = self._conclude(runs)
            state = "COMPLETE"
        finally:
            if state == "INTERRUPTED":
                runs.close_parent("INTERRUPTED")
        print_summary(Console(highlight=False), self._summary(version, time.perf_counter() - began))
        return 0 if version else 1

    def _num_ended(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=ENDED))

    def _open_runs(self) -> SweepRuns:
        sweep, corpus = self.sweep, self.stage.corpus
        runs = SweepRuns(self.client, sweep.name, sweep.name)
        runs.open_parent(
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
                "data_digest": corpus.digest,
            },
            texts={
                f"{sweep.name}.yaml": sweep.source_text,
                f"experiment-{sweep.experiment.name}.yaml": sweep.experiment.source_text,
            },
        )
        description = ", ".join(f"{key} {value}" for key, value in self._data().items())
        for context, rows in (("training", corpus.train_rows), ("validation", corpus.validation_rows)):
            runs.log_dataset(
                f"{self._data()['source']}-{context}",
                rows.digest(),
                num_rows=len(rows),
                profile={"num_classes": len(set(rows.labels))},
                source=description,
                context=context,
            )
        return runs

    def _data(self) -> dict[str, str]:
        return sources.describe(self.sweep.experiment.data_settings)

    def _train(self, runs: SweepRuns, request: StopRequest) -> None:
        """Let the engine have the study's trials, until enough have ended or a stop is due."""
        if self._num_ended() >= self.trials:
            return
        sweep, stage, rows = self.sweep, self.stage, standings(self.study)
        deadline = time.monotonic() + self.timeout if self.timeout else float("inf")
        best = best_of(rows)
        quest = Quest(
            space=sweep.space,
            shape=stage.base.shape,
            budget=sweep.budget,
            trials=self.trials,
            seed=sweep.seed,
            baseline=sweep.experiment.spec,
            baseline_seed=sweep.experiment.seed,
            total_steps=stage.total_steps,
        )
        shared = {"experiment": sweep.experiment.name, "base": stage.base.hub_id, "budget": sweep.budget}
        with Progress(
            total_trials=self.trials,
            ended=self._num_ended(),
            best=best.accuracy if best else None,
            best_trial=best.trial if best else None,
        ) as progress:
            runner = StudyRunner(
                study=self.study,
                quest=quest,
                tracker=Records(runs, shared, {"study": self.study.study_name}),
                screen=progress,
                folder=WORK / sweep.name / self.study.study_name,
                stop=lambda: bool(request) or time.monotonic() > deadline,
            )
            try:
                stage.engine(sweep.engine, sweep.slots).run(runner, runner)
            finally:
                runner.close()
                self.record_seconds = runner.record_seconds

    def _conclude(self, runs: SweepRuns) -> Version | None:
        """Leaderboard, figures and the winner's registration; the version, or None without a winner."""
        rows = standings(self.study)
        winner = best_of(rows)
        version = self._register(winner) if winner else None
        trials = board.trials_frame(rows)
        runs.log_leaderboard(board.leaderboard(trials))
        best = {"best/accuracy": winner.accuracy} if winner and winner.accuracy is not None else {}
        with TemporaryDirectory() as folder:
            artifacts = board.draw(
                self.study, trials, runs, self.sweep.budget, self.stage.corpus.best_accuracy, Path(folder)
            )
            runs.close_parent(
                "COMPLETE",
                metrics={"record_seconds": self.record_seconds, **best},
                tags={"best_trial": winner.trial, "best_run": str(winner.run_id)} if winner else {},
                artifacts=artifacts,
            )
        return version

    def _register(self, winner: Standing) -> Version:
        assert winner.run_id is not None, "a trial that ended has its run"
        adapter = download_artifacts(
            run_id=winner.run_id, artifact_path="adapter", tracking_uri=self.client.tracking_uri
        )
        return register(
            Registry(self.client, self.sweep.experiment.name),
            Winner(winner.run_id, Path(adapter), self.sweep.name, self.study.study_name, self.sweep.budget),
            self.stage.base,
            self.stage.corpus,
            self._data(),
        )

    def _say_how_to_go_on(self) -> None:
        left = self.trials - self._num_ended()
        Console(highlight=False).print(
            f"Stopped with {left} of {self.trials} trials to go; nothing is lost. "
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
