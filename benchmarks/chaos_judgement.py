"""What must hold of a sweep that was killed again and again, read from the stores it left."""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import chdir, closing
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Final

import optuna
from agnews_lora.commands.stage import Stage, prepare
from agnews_lora.search.standings import trial_name
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.adapter_files import load_with_peft, recount
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.paths import STORES
from agnews_lora.search.study import RUN_ID, SPEC, TRAINABLE, open_storage
from agnews_lora.tracking.runs import METRICS, RUN_STATUS
from agnews_lora.tracking.store import open_client, tracking_uri
from benchmarks.chaos_harness import Chaos, Kill

History = dict[str, list[tuple[int, float, int]]]  # {metric: [(step, value, Unix ms), …]}, as they are in the store

ORPHANS_SECONDS: Final = 5.0

_STATES: Final = {
    TrialState.COMPLETE: RUN_STATUS["COMPLETE"],
    TrialState.PRUNED: RUN_STATUS["PRUNED"],
    TrialState.FAIL: RUN_STATUS["FAILED"],
}


@dataclass
class Stores:
    """What a sweep left in a project's folder. runs: the child runs by their trial's name."""

    folder: Path
    sweep: Sweep
    stage: Stage
    trials: list[FrozenTrial]
    client: MlflowClient
    parents: list[Run]
    children: list[Run]
    histories: dict[str, History] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, name: str) -> "Stores":
        """Open the stores of the project in `folder`, whose sweep ended."""
        with chdir(folder):
            sweep = load_sweep(name)
            stage = prepare(sweep.experiment)
            study = optuna.load_study(study_name=name, storage=open_storage(STORES, create=False))
            client = open_client(STORES)
        [experiment] = client.search_experiments(filter_string=f"name = '{name}'")
        runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
        children = [run for run in runs if run.data.tags.get("kind") == "trial"]
        parents = [run for run in runs if run.data.tags.get("kind") == "sweep"]
        stores = cls(folder, sweep, stage, study.trials, client, parents, children)
        for run in children:
            stores.histories[run.data.tags["trial"]] = {
                key: sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            }
        return stores

    def last_step(self, trial: FrozenTrial) -> int:
        """The step a trial ended at."""
        return (
            self.stage.total_steps if trial.state is TrialState.COMPLETE else max(trial.intermediate_values, default=0)
        )

    def adapter(self, trial: FrozenTrial) -> Path:
        """The folder of a complete trial's adapter."""
        uri = tracking_uri(self.folder / STORES)
        return Path(download_artifacts(run_id=trial.user_attrs[RUN_ID], artifact_path="adapter", tracking_uri=uri))


@dataclass
class Judgement:
    """faults: what does not hold, a line each. found: {what was looked at: what was found}."""

    faults: list[str] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, found: str, faults: Iterable[str]) -> None:
        """Take down one thing that was looked at, and what does not hold of it."""
        wrong = list(faults)
        self.faults += wrong
        self.found[what] = found if not wrong else f"**{'; '.join(wrong)}**"


def judge(stores: Stores, chaos: Chaos, exit_code: int) -> Judgement:
    """All that must hold after a sweep was killed as `chaos` says."""
    judgement, trials = Judgement(), stores.trials
    states = Counter(trial.state.name for trial in trials)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    points = sum(len(points) for history in stores.histories.values() for points in history.values())
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    judgement.note("last start", f"exit code {exit_code}", [f"exit code {exit_code}"] if exit_code else [])
    judgement.note("trials ended", ended, _trial_faults(stores))
    judgement.note("configurations", f"{len(trials)}, all different", _configuration_faults(trials))
    judgement.note("runs", f"1 parent and {len(stores.children)} children, none RUNNING", _run_faults(stores))
    judgement.note("metric points", f"{points:,}, each step once and none missing", _metric_faults(stores))
    judgement.note("after a trial's end", "no point of it was measured", _again_faults(stores, chaos.kills))
    judgement.note("after a kill", "no trial went on from before its newest checkpoint", _resume_faults(chaos))
    judgement.note("adapters", f"{len(complete)} load by plain PEFT and recount", _adapter_faults(stores, complete))
    orphans = [kill.orphans_seconds for kill in chaos.kills if kill.orphans_seconds is not None]
    if orphans:
        late = [f"a worker outlived its supervisor by {each:.1f} s" for each in orphans if each > ORPHANS_SECONDS]
        found = f"gone within {max(orphans):.1f} s (limit {ORPHANS_SECONDS:.0f} s)"
        judgement.note("workers of a killed supervisor", found, late)
    judgement.note("left behind", "no work folder, no lease", _left_faults(stores))
    judgement.note("output of all starts", "no traceback", _output_faults(chaos))
    return judgement


def _trial_faults(stores: Stores) -> Iterator[str]:
    numbers, wanted = [trial.number for trial in stores.trials], stores.sweep.trials
    if numbers != list(range(wanted)):
        yield f"there must be trials 0 to {wanted - 1}, but there are {numbers}"
    for trial in stores.trials:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            yield f"{trial_name(trial.number)} is {trial.state.name}: {trial.user_attrs.get('reason', '')}"


def _configuration_faults(trials: list[FrozenTrial]) -> Iterator[str]:
    counts = Counter(str(sorted(trial.user_attrs.get(SPEC, {}).items())) for trial in trials)
    return (f"trained {count} times: {spec}" for spec, count in counts.items() if count > 1)


def _run_faults(stores: Stores) -> Iterator[str]:
    if [run.info.status for run in stores.parents] != ["FINISHED"]:
        yield f"parent runs are {[run.info.status for run in stores.parents]}"
        return
    [parent] = stores.parents
    for run in stores.children:
        if run.info.status == "RUNNING":
            yield f"the run of {run.data.tags['trial']} is RUNNING"
        if run.data.tags.get(MLFLOW_PARENT_RUN_ID) != parent.info.run_id:
            yield f"the run of {run.data.tags['trial']} has another parent"
    names = sorted(run.data.tags["trial"] for run in stores.children)
    if names != [trial_name(trial.number) for trial in stores.trials]:
        yield f"there are runs of {names}"
        return
    runs = {run.data.tags["trial"]: run for run in stores.children}
    for trial in stores.trials:
        run = runs[trial_name(trial.number)]
        if run.info.run_id != trial.user_attrs.get(RUN_ID):
            yield f"{trial_name(trial.number)} names another run than its own"
        if run.info.status != _STATES.get(trial.state):
            yield f"{trial_name(trial.number)} is {trial.state.name}, its run {run.info.status}"


def _metric_faults(stores: Stores) -> Iterator[str]:
    settings = stores.sweep.experiment.settings
    for trial in stores.trials:
        name, last = trial_name(trial.number), stores.last_step(trial)
        history = stores.histories.get(name, {})
        for metric in METRICS:
            every = settings.eval_every if metric.startswith("eval/") else settings.log_every
            wanted = sorted({*range(every, last + 1, every), last})
            if (steps := [step for step, _, _ in history.get(metric, [])]) != wanted:
                yield f"{metric} of {name} has steps {steps} instead of {wanted}"
        for metric in history.keys() - set(METRICS):
            if [step for step, _, _ in history[metric]] != [last]:
                yield f"{metric} of {name} is there {len(history[metric])} times"
        if not all(isfinite(value) for points in history.values() for _, value, _ in points):
            yield f"{name} has a value that is no number"
        if {step: value for step, value, _ in history.get("eval/accuracy", [])} != trial.intermediate_values:
            yield f"the study has other accuracies of {name} than its run"


def _again_faults(stores: Stores, kills: list[Kill]) -> Iterator[str]:
    """A trial is over with the end of its journal: whatever was killed then, nothing of it is trained again."""
    for number, kill in enumerate(kills, 1):
        for trial in sorted(trial for trial, what in kill.marks if what == "end"):
            history = stores.histories.get(trial, {})
            latest = max((time for metric in METRICS for _, _, time in history.get(metric, [])), default=0)
            if latest > kill.began * 1000:
                yield f"{trial} had ended by kill {number}, and trained again"


def _resume_faults(chaos: Chaos) -> Iterator[str]:
    outputs = [output.read_text(encoding="utf-8") for output, _ in chaos.starts]
    for number, kill in enumerate(chaos.kills, 1):
        start, offset = kill.output
        later = (outputs[start].encode()[offset:].decode() + "".join(outputs[start + 1 :])).splitlines()
        for trial, step in kill.checkpoints.items():
            steps = (line.split()[2] for line in later if line.startswith(f"{trial} step "))
            first = next((int(reached.split("/")[0]) for reached in steps), step)
            if first < step:
                yield f"after kill {number}, {trial} was evaluated at step {first}, but had its checkpoint of {step}"


def _adapter_faults(stores: Stores, complete: list[FrozenTrial]) -> Iterator[str]:
    for trial in complete:
        adapter = stores.adapter(trial)
        load_with_peft(adapter, stores.stage.base)
        if (counted := recount(adapter)) != trial.user_attrs[TRAINABLE] or counted > stores.sweep.budget:
            yield f"the adapter of {trial_name(trial.number)} has {counted:,} parameters"


def _left_faults(stores: Stores) -> Iterator[str]:
    work = stores.folder / "mlruns" / "work" / stores.sweep.name
    yield from (f"{path.name} is left in the work folder" for path in sorted(work.glob("*/t*")))
    with closing(sqlite3.connect(stores.folder / "mlruns" / "optuna.db")) as connection:
        for name, owner in connection.execute("SELECT name, owner FROM agnews_lora_leases"):
            yield f"the lease of {name} is left with {owner}"


def _output_faults(chaos: Chaos) -> Iterator[str]:
    for number, paths in enumerate(chaos.starts, 1):
        for path in paths:
            lines = path.read_text(encoding="utf-8").splitlines()
            if any(line.startswith("Traceback") for line in lines):
                yield f"start {number} has a traceback, which ends with: {lines[-1]}"


def told(stores: Stores, kill: Kill) -> str:
    """For a kill as a trial finished: whether the study had been told of it."""
    if kill.blow.moment != "finish":
        return ""
    [trial] = [trial for trial in stores.trials if trial_name(trial.number) == kill.reached.split()[0]]
    assert trial.datetime_complete is not None
    return ", the study told" if trial.datetime_complete.timestamp() <= kill.began else ", the study not yet told"
