"""What must hold of a sweep that was killed again and again, read from the stores that it left."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Final

import optuna
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.adapter_files import load_with_peft, recount
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.paths import STORES
from agnews_lora.search.study import RUN_ID, SPEC, TRAINABLE, open_storage
from agnews_lora.search.trials import trial_name
from agnews_lora.tracking.runs import METRICS, RUN_STATUS
from agnews_lora.tracking.store import open_client, tracking_uri
from benchmarks.chaos.killing import Chaos

History = dict[str, list[tuple[int, float, int]]]  # {metric: [(step, value, Unix ms), …]}, as they are in the store

ORPHANS_SECONDS: Final = 15.0


@dataclass
class Stores:
    """What a sweep left in a project's folder. children: the trials' runs. histories: by trial."""

    folder: Path
    sweep: Sweep
    prepared: Prepared
    trials: list[FrozenTrial]
    client: MlflowClient
    parents: list[Run]
    children: list[Run]
    histories: dict[str, History]

    @classmethod
    def of(cls, folder: Path, name: str) -> "Stores":
        """Open the stores of the project in `folder`, whose sweep ended."""
        with chdir(folder):
            sweep = load_sweep(name)
            prepared = prepare(sweep.experiment)
            trials = optuna.load_study(study_name=name, storage=open_storage(STORES)).trials
            client = open_client(STORES)
        [experiment] = client.search_experiments(filter_string=f"name = '{name}'")
        runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
        children = [run for run in runs if "trial" in run.data.tags]
        histories = {
            run.data.tags["trial"]: {
                key: sorted((m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            }
            for run in children
        }
        parents = [run for run in runs if run not in children]
        return cls(folder, sweep, prepared, trials, client, parents, children, histories)

    def last_step(self, trial: FrozenTrial) -> int:
        """The step that a trial ended at."""
        complete = trial.state is TrialState.COMPLETE
        return self.prepared.total_steps if complete else max(trial.intermediate_values, default=0)

    def comparable(self) -> dict[str, Any]:
        """All that must be equal to the bit in two sweeps of one trial at a time, by what it is."""
        metrics: dict[str, Any] = {
            f"{metric} of {trial}": [(step, value) for step, value, _ in history.get(metric, [])]
            for trial, history in self.histories.items()
            for metric in METRICS
        }
        ends = {trial_name(t): (t.state.name, t.user_attrs[SPEC], t.values) for t in self.trials}
        return ends | metrics


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
    """Look at all that must hold after a sweep was killed as `chaos` says."""
    judgement = Judgement()
    states = Counter(trial.state.name for trial in stores.trials)
    points = sum(len(points) for history in stores.histories.values() for points in history.values())
    complete = [trial for trial in stores.trials if trial.state is TrialState.COMPLETE]
    orphans = [kill.orphans_seconds for kill in chaos.kills if kill.orphans_seconds is not None]
    judgement.note("last start", f"exit code {exit_code}", [f"exit code {exit_code}"] if exit_code else [])
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    judgement.note("trials", ended, _trial_faults(stores))
    judgement.note("runs", f"1 parent and {len(stores.children)} children, none RUNNING", _run_faults(stores))
    judgement.note("metric points", f"{points:,}, each step once and none missing", _metric_faults(stores))
    judgement.note("after a trial's end", "nothing of it was trained again", _again_faults(stores, chaos))
    judgement.note("after a kill", "no trial resumed from before its newest checkpoint", _resume_faults(chaos))
    judgement.note("adapters", f"{len(complete)} load by plain PEFT and recount", _adapter_faults(stores, complete))
    if orphans:
        late = [f"workers outlived their driver by {each:.1f} s" for each in orphans if each > ORPHANS_SECONDS]
        found = f"gone within {max(orphans):.1f} s (limit {ORPHANS_SECONDS:.0f} s)"
        judgement.note("workers of a killed driver", found, late)
    left = [path.name for path in sorted((stores.folder / "mlruns" / "work" / stores.sweep.name).glob("*/t*"))]
    judgement.note("work folders", "none is left", [f"{name} is left" for name in left])
    judgement.note("output of all starts", "no traceback", _output_faults(chaos))
    return judgement


def _trial_faults(stores: Stores) -> Iterator[str]:
    numbers, wanted = [trial.number for trial in stores.trials], stores.sweep.trials
    if numbers != list(range(wanted)):
        yield f"there must be trials 0 to {wanted - 1}, but there are {numbers}"
    for trial in stores.trials:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            yield f"{trial_name(trial)} is {trial.state.name}: {trial.user_attrs.get('reason', '')}"
    counts = Counter(str(sorted(trial.user_attrs.get(SPEC, {}).items())) for trial in stores.trials)
    yield from (f"trained {count} times: {spec}" for spec, count in counts.items() if count > 1)


def _run_faults(stores: Stores) -> Iterator[str]:
    if [run.info.status for run in stores.parents] != ["FINISHED"]:
        yield f"parent runs are {[run.info.status for run in stores.parents]}"
    yield from (f"the run of {run.data.tags['trial']} is RUNNING" for run in stores.children if _is_running(run))
    names = sorted(run.data.tags["trial"] for run in stores.children)
    if names != [trial_name(trial) for trial in stores.trials]:
        yield f"there are runs of {names}"
        return
    runs = {run.data.tags["trial"]: run for run in stores.children}
    for trial in stores.trials:
        run, state = runs[trial_name(trial)], "FAILED" if trial.state is TrialState.FAIL else trial.state.name
        if run.info.run_id != trial.user_attrs.get(RUN_ID):
            yield f"{trial_name(trial)} names another run than its own"
        if run.info.status != RUN_STATUS.get(state):  # type: ignore[call-overload]
            yield f"{trial_name(trial)} is {state}, its run {run.info.status}"


def _is_running(run: Run) -> bool:
    return bool(run.info.status == "RUNNING")


def _metric_faults(stores: Stores) -> Iterator[str]:
    settings = stores.sweep.experiment.settings
    for trial in stores.trials:
        name, last = trial_name(trial), stores.last_step(trial)
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


def _again_faults(stores: Stores, chaos: Chaos) -> Iterator[str]:
    """A trial is over with the last line of its log: whatever was killed then, nothing of it is trained again."""
    for number, kill in enumerate(chaos.kills, 1):
        for trial in sorted(kill.ended):
            history = stores.histories.get(trial, {})
            latest = max((time for metric in METRICS for _, _, time in history.get(metric, [])), default=0)
            if latest > kill.at * 1000:
                yield f"{trial} had ended by kill {number}, and trained again"


def _resume_faults(chaos: Chaos) -> Iterator[str]:
    outputs = [output.read_bytes() for output in chaos.outputs]
    for number, kill in enumerate(chaos.kills, 1):
        start, offset = kill.output
        later = b"".join([outputs[start][offset:], *outputs[start + 1 :]]).decode().splitlines()
        for trial, step in kill.checkpoints.items():
            steps = (line.split()[2] for line in later if line.startswith(f"{trial} step "))
            first = next((int(reached.split("/")[0]) for reached in steps), step)
            if first < step:
                yield f"after kill {number}, {trial} was evaluated at step {first}, but had its checkpoint of {step}"


def _adapter_faults(stores: Stores, complete: list[FrozenTrial]) -> Iterator[str]:
    uri = tracking_uri(stores.folder / STORES)
    for trial in complete:
        run = trial.user_attrs[RUN_ID]
        adapter = Path(download_artifacts(run_id=run, artifact_path="adapter", tracking_uri=uri))
        load_with_peft(adapter, stores.prepared.base)
        if (counted := recount(adapter)) != trial.user_attrs[TRAINABLE] or counted > stores.sweep.budget:
            yield f"the adapter of {trial_name(trial)} has {counted:,} parameters"


def _output_faults(chaos: Chaos) -> Iterator[str]:
    for number, path in enumerate(chaos.outputs, 1):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(line.startswith("Traceback") for line in lines):
            yield f"start {number} has a traceback, which ends with: {lines[-1]}"
