"""What is wrong with the project in the working directory, and how to get it back: for `agnews-lora doctor`.

A project that was moved or copied whole works in its new place. One that was copied or deleted in part has stores that
do not fit together. Looking changes nothing.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.utils.file_utils import local_file_uri_to_path

from agnews_lora.commands.report import RESULT
from agnews_lora.config import experiment as experiments
from agnews_lora.config import sweep as sweeps
from agnews_lora.errors import AgnewsLoraError
from agnews_lora.paths import RESULTS, RUNS_DATABASE, STORES, STUDIES_DATABASE
from agnews_lora.search import study as keys
from agnews_lora.serving.model_package import Package
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import ARTIFACTS, open_client, reaching, recorded_place
from agnews_lora.tracking.versions import CANDIDATE, CHAMPION, PREVIOUS

STUDIES = STORES / STUDIES_DATABASE


@dataclass(frozen=True)
class Found:
    """Something about the project. remedy: how to mend it; empty where nothing is wrong."""

    what: str
    state: str
    remedy: str = ""


def examine() -> Iterator[Found]:
    """Compare studies, runs, artifacts and registered versions with one another, and with the files of the project."""
    runs, studies = (STORES / RUNS_DATABASE).exists(), STUDIES.exists()
    if not runs and not studies:
        left = (STORES / ARTIFACTS).exists()
        state = "its artifacts alone are there" if left else "no sweep has run here"
        yield Found("project", state, f"Put {STORES / RUNS_DATABASE} and {STUDIES} back." if left else "")
        return
    source, known = "COPY/mlruns", dict[str, tuple[str, set[str]]]()
    try:
        if runs and (recorded := recorded_place(STORES)) and recorded != STORES.resolve():
            how = "moved from"
            if recorded.exists():
                source, how = str(recorded), "copied from"
            yield Found("project", f"{how} {recorded.parent}; it works here, and writes nothing there")
        if studies:
            known = _studies()
        if not runs:
            names = {sweep for sweep, _ in known.values()}
            yield _gone(STORES / RUNS_DATABASE, "runs, registered versions and champion", source, names)
            return
        client = open_client(STORES, read=True)
        with reaching(client):
            yield from _versions(client, source)
            yield from _runs(client, known, studies, source)
    except AgnewsLoraError as error:
        cause, _, remedy = str(error).partition(". ")
        yield Found("stores", cause, remedy or "Put the file back from a copy.")


def _gone(path: Path, what: str, source: str, names: set[str]) -> Found:
    again = "".join(f" `agnews-lora sweep {name} --new`" for name in sorted(names)[:1])
    return Found(
        f"store {path}", f"gone, and with it {what}", f"Put it back ({_copy(source, path)}), or begin anew:{again}."
    )


def _copy(source: str, path: Path) -> str:
    """The command that copies a part of the stores back."""
    return shlex.join(["cp", "-a", f"{source}/{path.relative_to(STORES)}", f"{path.parent}/"])


def _studies() -> dict[str, tuple[str, set[str]]]:
    """The sweep of each study by its name, and the ids of its runs."""
    found = {}
    with keys.answering():
        storage = keys.open_storage(STORES)
        for study in storage.get_all_studies():
            if keys.SWEEP in study.user_attrs and not study.study_name.endswith(keys.CONFIRMATION):
                trials = storage.get_all_trials(study._study_id, deepcopy=False)
                ids = {trial.user_attrs.get(keys.RUN_ID) for trial in trials}
                found[study.study_name] = study.user_attrs[keys.SWEEP], {str(run_id) for run_id in ids if run_id}
    return found


def _runs(client: MlflowClient, known: dict[str, tuple[str, set[str]]], studies: bool, source: str) -> Iterator[Found]:
    """Runs that are deleted or have lost their artifacts; then studies beside them."""
    present, parents = dict[str, Run](), dict[str, Run]()
    for experiment in client.search_experiments(view_type=ViewType.ALL):
        if experiment.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            yield Found(f"sweep {experiment.name}", "its MLflow experiment is deleted", _mlflow(client, restore))
            continue
        for run in client.search_runs([experiment.experiment_id], max_results=50_000):
            present[run.info.run_id] = run
            if run.data.tags.get("kind") == "sweep":
                parents[run.data.tags.get("study", "")] = run
    lost = [run for run in present.values() if run.info.status == "FINISHED" and not _artifacts_of(run)]
    if lost:
        state = f"{len(lost)} of {len(present)} runs have lost their artifacts, adapters among them"
        yield Found(f"store {STORES / ARTIFACTS}", state, f"Put them back: {_copy(source, STORES / ARTIFACTS)}")
    if not studies and parents:
        names = {run.data.tags.get("sweep", "") for run in parents.values()}
        yield _gone(STUDIES, "what the sweeps would go on with; champions stay of use", source, names)
    yield from _sweeps(client, parents, known if studies else None)
    yield from _compared(client, known, present, parents)


def _sweeps(
    client: MlflowClient, parents: dict[str, Run], known: dict[str, tuple[str, set[str]]] | None
) -> Iterator[Found]:
    """Sweeps that have lost their files, their winner or their study. known: None where all studies are gone."""
    for study, run in parents.items():
        sweep = run.data.tags.get("sweep", "")
        yield from _files(study, sweep, run)
        if (best := run.data.tags.get("best_run")) and not client.search_model_versions(f"run_id = '{best}'"):
            again = f"Run `agnews-lora sweep {sweep}`, which registers it again."
            yield Found(f"study {study}", "its winner is not registered any more", again)
        if known is not None and study not in known:
            again = f"Or `agnews-lora sweep {sweep}` starts another."
            yield Found(f"study {study}", f"not in {STUDIES}, which has {len(known)} others", f"Put it back. {again}")


def _compared(
    client: MlflowClient, known: dict[str, tuple[str, set[str]]], present: dict[str, Run], parents: dict[str, Run]
) -> Iterator[Found]:
    """Studies and whether their runs are there."""
    for study, (sweep, ids) in known.items():
        if ids and study not in parents:
            yield Found(f"study {study}", "its run in MLflow is deleted", f"Run `agnews-lora sweep {sweep}`.")
        if missing := ids - present.keys():
            restore = f"mlflow runs restore --run-id {min(missing)}"
            state = f"{len(missing)} of its {len(ids)} runs are deleted"
            again = f"Or start another study: `agnews-lora sweep {sweep} --new`."
            yield Found(f"study {study}", state, f"{_mlflow(client, restore)} {again}")
        else:
            yield Found(f"study {study}", f"{len(ids)} trials, with their runs")


def _mlflow(client: MlflowClient, command: str) -> str:
    return f"Restore it: `MLFLOW_TRACKING_URI={client.tracking_uri} {command}`."


def _artifacts_of(run: Run) -> bool:
    folder = Path(local_file_uri_to_path(run.info.artifact_uri))
    return folder.is_dir() and any(folder.iterdir())


def _files(study: str, sweep: str, run: Run) -> Iterator[Found]:
    """YAML files and result of a sweep that are gone; the run keeps copies."""
    kept = Path(local_file_uri_to_path(run.info.artifact_uri))
    facts = {}
    if (kept / RESULT).is_file():
        facts = json.loads((kept / RESULT).read_text(encoding="utf-8")).get("facts", {})
        if not (result := RESULTS / f"{study}.json").is_file():
            yield Found(f"result {result}", "gone", f"Run `agnews-lora sweep {sweep}`, which writes it again.")
    given, experiment = str(facts.get("file", "")), run.data.params.get("experiment", sweep)
    places = {
        f"{sweep}.yaml": Path(given) if "/" in given else sweeps.FOLDER / f"{sweep}.yaml",
        f"experiment-{experiment}.yaml": experiments.FOLDER / f"{experiment}.yaml",
    }
    for name, path in places.items():
        if not path.exists() and (kept / name).is_file():
            copy = shlex.join(["cp", str(kept / name), str(path)])
            yield Found(f"file {path}", "gone", f"Put it back: mkdir -p {shlex.quote(str(path.parent))} && {copy}")


def _versions(client: MlflowClient, source: str) -> Iterator[Found]:
    """Whether the files of the versions in use are those that were registered."""
    for model in client.search_registered_models():
        registry = Registry(client, model.name)
        for alias in (CHAMPION, CANDIDATE, PREVIOUS):
            version = registry.aliased(alias)
            if version is None or "sweep" not in version.tags:  # of another program
                continue
            what = f"{alias} of {model.name}"
            try:
                Package.verified(registry, version)
            except AgnewsLoraError as error:
                cause = str(error).partition(": ")[2].partition(". ")[0]
                back = f"Put its files back: {_copy(source, STORES / ARTIFACTS)}"
                if alias == CHAMPION and registry.aliased(PREVIOUS):
                    back += f". Or go back: `agnews-lora promote {version.tags['sweep']} --rollback`"
                yield Found(what, f"{version}: {cause}", back)
            else:
                score = version.tags.get("test_accuracy")
                scored = f", test accuracy {float(score):.2%}" if score else ""
                yield Found(what, f"{version}: its files are those that were registered{scored}")
