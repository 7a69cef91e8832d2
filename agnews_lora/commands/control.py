"""`agnews-lora status`, `stop` and `enqueue`: a study looked at and steered, beside its driver or between two starts.

They talk to the study's storage alone. The driver reads there what a person asked for: `keys.STOP` at each evaluation,
`keys.ENQUEUED` whenever a slot is free.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import max_rank, require_within_budget
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Sweep
from agnews_lora.data.sources import label_names
from agnews_lora.errors import BudgetError, StudyError, nearest
from agnews_lora.paths import STORES, WORK
from agnews_lora.search import space as search_space
from agnews_lora.search import study as keys
from agnews_lora.search.confirmation import find_confirmation, num_missing
from agnews_lora.search.driver import num_left
from agnews_lora.search.trials import ENDED_STATES, TrialSummary, best_first, trial_name
from agnews_lora.training.interface import SCORES

STATES: Final = {state: word for word, state in ENDED_STATES.items()} | {  # of a trial, with its word
    state: state.lower() for state in ("RUNNING", "INTERRUPTED", "WAITING")
}
WORDS: Final = {"RUNNING": "running", "INTERRUPTED": "stopped", "COMPLETE": "finished"}  # of a study
OTHER_NAMES: Final = {"rank": "rank_share", "rank_share": "rank", "alpha": "alpha_ratio", "alpha_ratio": "alpha"}
KEYS: Final = ("targets", "head", *OTHER_NAMES, "dropout", "learning_rate")
MOST: Final = 10**6  # of a rank that a person gives
SUGGESTED: Final = " (did you mean {}?)"  # within a sentence
PIPED_WIDTH: Final = 160  # columns of a table that no terminal shows


def _found(sweep: Sweep, storage: str | None, what: str) -> tuple[keys.SweepStudy, keys.SweepStudy | None, bool]:
    """A sweep's newest study and its confirmation, opened to be read alone, and whether a driver holds them."""
    database = keys.read_storage(storage or STORES)
    names = keys.study_names(database, sweep.name) if database else []
    if database is None or not names:
        raise StudyError(
            f"Cannot {what}: sweep {sweep.name} has no study in this storage. Start `agnews-lora sweep {sweep.name}`."
        )
    study = keys.SweepStudy(names[-1], database)
    rounds = None if study.num_unmarked else find_confirmation(study)  # an earlier release's would be marked there
    return study, rounds, keys.is_driven(database, WORK / sweep.name, sweep.name)


def status(sweep: Sweep, storage: str | None, as_json: bool) -> int:
    """Print how far a study is. Writes nothing.

    Raises:
        AgnewsLoraError: there is no study, or it cannot be read.
    """
    with keys.answering():
        found = _status(sweep, *_found(sweep, storage, f"show the status of {sweep.name}"))
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _status(sweep: Sweep, study: keys.SweepStudy, rounds: keys.SweepStudy | None, is_driven: bool) -> dict[str, Any]:
    objective, settings, trials = keys.objective_of(study), sweep.confirmation, study.get_trials(deepcopy=False)
    planned = int(study.user_attrs.get(keys.PLANNED, sweep.trials))
    left = num_left(study, planned)
    if settings and not study.num_unmarked:
        left = left or num_missing(study, settings.trials, settings.seeds)
    own = [TrialSummary.from_trial(trial, objective) for trial in trials if study.owns(trial)]
    best = next(iter(best_first(own, objective)), None)
    rows = [_row(study, trial, is_driven) for trial in trials]
    return {
        "sweep": sweep.name,
        "study": study.study_name,
        "state": "RUNNING" if is_driven else "INTERRUPTED" if left else "COMPLETE",
        "objective": objective,
        "budget": study.user_attrs[keys.FINGERPRINT].get("budget"),
        "planned": planned + keys.num_enqueued(trials),
        "trials": {word: sum(row["state"] == state for row in rows) for state, word in STATES.items()},
        "best": next((row for row in rows if best and row["trial"] == best.trial), None),
        "rows": rows,
        "confirmation": [_row(rounds, trial, is_driven) for trial in rounds.get_trials(deepcopy=False)]
        if rounds
        else [],
    }


def _row(study: keys.SweepStudy, trial: FrozenTrial, is_driven: bool) -> dict[str, Any]:
    """One trial. Before its turn, an enqueued one has attributes that may be copied from another trial: not read."""
    row = TrialSummary.from_trial(trial, keys.objective_of(study)) if study.owns(trial) else None
    spec = row.spec if row else None
    pauses = spec and not trial.state.is_finished() and (trial.state is TrialState.WAITING or not is_driven)
    return {
        "trial": row.trial if row else f"t{trial.number:04d}",
        "state": "INTERRUPTED" if pauses else row.state if row else trial.state.name,
        "stopped": keys.is_stopped(trial),
        "configuration": spec.as_dict() if spec else keys.given(trial),
        "step": row.steps if row else 0,
        "total_steps": trial.user_attrs.get(keys.TOTAL_STEPS) if row else None,
        **{name: getattr(row, name, None) for name in (*SCORES, "trainable_parameters", "reason", "run_id")},
    }


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else PIPED_WIDTH)
    best, objective, rows = found["best"], found["objective"], [*found["rows"], *found["confirmation"]]
    ended = sum(found["trials"][word] for word in ENDED_STATES)
    counts = ", ".join(f"{count} {word}" for word, count in found["trials"].items() if count)
    lines = [f"{found['study']}: {WORDS[found['state']]}, {ended} of {found['planned']} trials ended ({counts})"]
    score = f"; best {SCORES[objective]} so far {best[objective]:.2%} ({best['trial']})" if best else ""
    console.print(f"{lines[0]}\nbudget {found['budget']:,} trainable parameters{score}", soft_wrap=True)
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("trial", "state", "step", SCORES[objective], "configuration"):
        view.add_column(column, no_wrap=column != "configuration")
    for row in rows:
        state, score, configuration = STATES[row["state"]], row[objective], row["configuration"]
        if row["stopped"] and row["state"] not in ("COMPLETE", "FAIL"):
            state = "stopped" if row["state"] == "PRUNED" else "stopping"
        given = " ".join(f"{key}={value}" for key, value in configuration.items())
        shown = str(TrialSpec(**configuration)) if "rank" in configuration else given
        step = f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
        view.add_row(row["trial"], state, step, "-" if score is None else f"{score:.2%}", shown)
    console.print(view)
    lines = [f"{row['trial']} failed: {row['reason']}" for row in rows if row["state"] == "FAIL"]
    if found["state"] == "INTERRUPTED":
        lines.append(f"No driver is running: `agnews-lora sweep {found['sweep']}` resumes it.")
    for line in lines:
        console.print(line, soft_wrap=True)


def stop(sweep: Sweep, trial: str, storage: str | None) -> int:
    """Ask for the end of a trial that runs or waits: the driver ends it as pruned, and no start resumes it.

    Args:
        trial: its name (`t0007`), or its number.

    Raises:
        StudyError: there is no such trial, it has ended, or it confirms another.
        StorageError: the storage cannot be read or written.
    """
    name = f"t{int(trial):04d}" if trial.isascii() and trial.isdigit() else trial
    with keys.answering():
        study, rounds, is_driven = _found(sweep, storage, f"stop {name}")
        trials = {f"t{each.number:04d}": each for each in study.get_trials(deepcopy=False)}
        unended = [each for each, found in trials.items() if not found.state.is_finished()]
        remedy = f"Name one that has not ended: {', '.join(unended)}." if unended else "No trial runs or waits."
        if rounds and name in map(trial_name, rounds.get_trials(deepcopy=False)):
            raise StudyError(
                f"Cannot stop {name}: it repeats a trial to confirm it, and the winner is chosen by the mean of all. "
                "Stop the sweep by Ctrl-C, or set `confirmation: null` in its file."
            )
        if name not in trials:
            cause = f"study {study.study_name} has no such trial{nearest(name, trials, SUGGESTED)}"
            raise StudyError(f"Cannot stop {name}: {cause}. {remedy}")
        found = trials[name]
        try:
            if found.state.is_finished():
                raise UpdateFinishedTrialError
            keys.open_storage(storage or STORES).set_trial_user_attr(found._trial_id, keys.STOP, found.number)
        except UpdateFinishedTrialError as error:
            state = study._storage.get_trial(found._trial_id).state.name
            raise StudyError(f"Cannot stop {name}: it has ended ({STATES[state]}). {remedy}") from error
    when = f"at the next start of `agnews-lora sweep {sweep.name}`, since no driver is running"
    if is_driven:
        when = "at its next evaluation" if found.state is TrialState.RUNNING else "when its turn comes, untrained"
    print(f"{name} ends {when}: as pruned, {keys.STOPPED_BY_PERSON}. No start resumes it.")
    return 0


def enqueue(sweep: Sweep, texts: Sequence[str], storage: str | None) -> int:
    """Enqueue a trial on top of the sweep's own; it is the next that the driver starts.

    Args:
        texts: `KEY=VALUE` each, of `KEYS`; the sampler draws what is left open.

    Raises:
        StudyError: a key or value that the space does not have, or a study of another space or budget.
        BudgetError: the trial is above the budget.
        StorageError: the storage cannot be read or written.
    """
    space, budget = sweep.space, sweep.budget
    shape = shape_of(sweep.experiment.base, len(label_names(sweep.experiment.data_settings)))
    given, faults = _parameters(texts, sweep, shape)
    if faults := faults + search_space.faults(given, space, shape, budget):
        raise StudyError(
            f"Cannot enqueue a trial of {sweep.name}: {'; '.join(faults)}. The keys are {', '.join(KEYS)}, where "
            "alpha_ratio is alpha / rank."
        )
    spec, heads = search_space.completed(given, space, shape, budget), _heads(given, sweep, shape)
    try:
        require_within_budget(spec, shape, budget)
    except BudgetError as error:
        raise BudgetError(f"Cannot enqueue a trial of {sweep.name}: {error}.") from error
    asked = search_space.distributions(space, shape, budget).keys()
    drawn = sorted(asked - given.keys() - ({"head"} if len(heads) == 1 else set()))
    with keys.answering():
        study, _, is_driven = _found(sweep, storage, f"enqueue a trial of {sweep.name}")
        _require_same(study, sweep, shape)
        for trial in study.get_trials(deepcopy=False):
            if _is(trial, given, None if drawn else spec):
                print(f"t{trial.number:04d} has this configuration already: nothing was enqueued.")
                return 0
        number = keys.enqueue_on_top(keys.SweepStudy(study.study_name, keys.open_storage(storage or STORES)), given)
    print(
        f"Enqueued as t{number:04d}, on top of the sweep's own trials: {' '.join(texts)}"
        + (f" (the sampler draws {', '.join(drawn)})" if drawn else "")
        + (". It is trained next." if is_driven else f". `agnews-lora sweep {sweep.name}` trains it.")
    )
    return 0


def _is(trial: FrozenTrial, given: dict[str, Any], spec: TrialSpec | None) -> bool:
    """Whether a trial has been or will be asked for the same. One that failed, or was stopped, may be tried again.

    spec: None where the sampler draws a part of it.
    """
    if trial.state is TrialState.FAIL or keys.is_stopped(trial):
        return False
    waits = trial.state is TrialState.WAITING and keys.given(trial) == given
    return waits or (spec is not None and trial.user_attrs.get(keys.SPEC) == spec.as_dict())


def _require_same(study: keys.SweepStudy, sweep: Sweep, shape: ModelShape) -> None:
    """Check that the study searches the file's space, and has its baseline: a driver enqueues that one alone."""
    described = search_space.describe(sweep.space, shape, sweep.budget)
    present = json.loads(json.dumps({"budget": sweep.budget, "space": described}))
    stored = {name: study.user_attrs[keys.FINGERPRINT].get(name) for name in present}
    cause, remedy = "", "Put them back."
    if changes := keys.differences(stored, present):
        cause = f"study {study.study_name} was made with other settings: {'; '.join(changes)}"
    elif not any(trial.user_attrs.get(keys.BASELINE) for trial in study.get_trials(deepcopy=False)):
        cause, remedy = "its study has no baseline yet", "Try again once the sweep has begun."
    if cause:
        raise StudyError(f"Cannot enqueue a trial of {sweep.name}: {cause}. {remedy}")


def _parameters(texts: Sequence[str], sweep: Sweep, shape: ModelShape) -> tuple[dict[str, Any], list[str]]:
    """The parameters of the space that `KEY=VALUE` texts stand for, and what is wrong with them."""
    given: dict[str, Any] = {}
    faults = [] if texts else ["there is no KEY=VALUE"]
    for text in texts:
        key, _, value = text.partition("=")
        if not value:
            faults.append(f"{text!r} is no KEY=VALUE")
        elif key not in KEYS:
            faults.append(f"{key!r} is no parameter{nearest(key, KEYS, SUGGESTED)}")
        elif {key, OTHER_NAMES.get(key)} & given.keys():
            faults.append(f"{key} is given twice")
        else:
            given[key] = _number(value)
    rank, alpha, heads = given.pop("rank", None), given.pop("alpha", None), _heads(given, sweep, shape)
    if given.get("head") in heads and len(sweep.space.heads) == 1:
        del given["head"]  # all trials have it
    if rank is not None:
        if isinstance(rank, int) and 0 < rank < MOST and len(heads) == 1:
            given["rank_share"] = rank / max_rank(given["targets"], heads[0], shape, sweep.budget)
        else:
            needed = "head" if len(heads) > 1 else "targets"
            faults.append(f"rank {rank!r} is no whole number from 1 on, or has no {needed} beside it")
    if alpha is not None:
        if isinstance(alpha, int | float) and "rank_share" in given and rank:
            given["alpha_ratio"] = alpha / rank
        else:
            faults.append(f"alpha {alpha!r} is no number, or has no rank beside it")
    return given, faults


def _heads(given: dict[str, Any], sweep: Sweep, shape: ModelShape) -> list[str]:
    """The heads that a trial may have beside the targets that are given, or the given one; none without targets."""
    targets, head = given.get("targets"), given.get("head")
    if targets not in sweep.space.targets:
        return []
    fitting = search_space.heads_that_fit(str(targets), sweep.space, shape, sweep.budget)
    return [each for each in fitting if head in (None, each)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
