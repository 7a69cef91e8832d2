"""The result of a finished sweep, read back while it stands: nothing heavy is imported, and nothing is written."""

import json
import sqlite3
from contextlib import suppress

from rich.console import Console
from rich.markup import escape

from agnews_lora.adapters.base_models import resolve
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.errors import AgnewsLoraError
from agnews_lora.paths import RESULTS, RUNS_DATABASE, STORES, STUDIES_DATABASE, read_database
from agnews_lora.reporting.summary import print_summary, typed
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing
from agnews_lora.search.driver import num_left
from agnews_lora.search.racing import choose, repeated
from agnews_lora.search.results import SweepFacts, SweepResult
from agnews_lora.search.trials import summaries
from agnews_lora.tracking.versions import own_folder


def show(result: SweepResult, as_json: bool) -> int:
    """Print the result of a finished sweep, and return the exit code: 1 without a winner."""
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        print_summary(Console(highlight=False), result)
    return 0 if result.winner else 1


def run(sweep: Sweep, trials: int | None, as_json: bool, quiet: bool) -> int | None:
    """Print a result that stands, and return the exit code; None where none does. trials: as of `run_sweep`."""
    found = standing(sweep, trials)
    if found is None:
        return None
    result, study = found
    if not (as_json or quiet):
        print_reached(result.facts, trials, study)
    return show(result, as_json)


def print_reached(facts: SweepFacts, trials: int | None, study: keys.SweepStudy) -> None:
    """Say that nothing is left to train where `--trials` asks for no more than the trials that have ended."""
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ended = len(finished) - keys.num_enqueued(finished)
    if trials and trials <= ended:
        more = typed(facts.command("sweep", "--trials", str(ended + trials)))
        Console(highlight=False).print(
            f"Nothing to train: --trials {trials} counts all trials of the study, and {ended} have ended. "
            f"[bold]{escape(more)}[/] trains {trials} more.",
            soft_wrap=True,
        )


def standing(sweep: Sweep, trials: int | None) -> tuple[SweepResult, keys.SweepStudy] | None:
    """Read the newest study in the project's own stores, and its result; None where the sweep has anything to do.

    It stands where files, base, data, trials, runs and registered version are those that it was made from.

    trials: as of `run_sweep`.
    """
    with suppress(AgnewsLoraError, OSError, ValueError, sqlite3.Error), keys.answering():
        if not (STORES / STUDIES_DATABASE).exists():
            return None
        database = keys.open_storage(STORES)
        name = keys.newest_study(database, sweep.name)
        if name is None:
            return None
        study = keys.SweepStudy(name, database)
        result = SweepResult.from_json((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        same = _inputs_are_same(result, sweep) and _trials_are_same(result, sweep, study, trials)
        return (result, study) if same and _runs_are_there(result) else None
    return None


def _inputs_are_same(result: SweepResult, sweep: Sweep) -> bool:
    facts, experiment = result.facts, sweep.experiment
    read = facts.file, facts.texts, facts.files
    if read != (sweep.reference, sweep.texts, sources.file_hashes(experiment.data_settings)):
        return False
    base = resolve(experiment.base, num_labels=len(facts.labels))
    found = base.hub_id, base.revision, base.shape, sources.describe(experiment.data_settings)
    return found == (facts.base, facts.base_revision, facts.shape, facts.data)


def _trials_are_same(result: SweepResult, sweep: Sweep, study: keys.SweepStudy, trials: int | None) -> bool:
    settings = sweep.confirmation
    wanted = keys.target(study, trials, sweep.trials)
    if num_left(study, wanted) or (settings and num_missing(study, settings.trials, settings.seeds)):
        return False
    rounds = find_confirmation(study) if settings else None
    found = tuple(summaries(study))
    repeats = repeated(found, rounds, result.objective)
    confirmed, _ = choose(repeats, result.objective, settings.model_dump() if settings else None)
    return (study.identity, found, confirmed) == (result.study_id, result.trials, result.confirmed)


def _runs_are_there(result: SweepResult) -> bool:
    """Whether the run store has the sweep's runs, complete, and its registered version under the same aliases.

    The database is read directly: importing MLflow takes longer than the whole answer.
    """
    rows = [*result.trials, *(row for each in result.confirmed for row in each.repeats)]
    runs, version = {result.run_id, *(row.run_id for row in rows if row.run_id)}, result.registration
    with read_database(STORES / RUNS_DATABASE) as database:

        def column(query: str, *values: str | int | None) -> list[str]:
            return [value for (value,) in database.execute(query, values)]

        folders = column(
            "SELECT artifact_uri FROM runs JOIN json_each(?) ON run_uuid = json_each.value "
            "WHERE lifecycle_stage = 'active'",
            json.dumps(sorted(filter(None, runs))),
        )
        state = column("SELECT value FROM tags WHERE run_uuid = ? AND key = 'state'", result.run_id)
        if len(folders) != len(runs) or state != ["COMPLETE"]:
            return False
        if version is not None:
            known = version.model, version.version
            folders += column("SELECT source FROM model_versions WHERE name = ? AND version = ?", *known)
            aliases = column("SELECT alias FROM registered_model_aliases WHERE name = ? AND version = ?", *known)
            if len(folders) == len(runs) or set(aliases) != set(version.aliases):
                return False
    return all(own_folder(STORES, folder) for folder in folders)
