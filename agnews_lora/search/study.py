"""The study in storage: opened or resumed by name, with the fingerprint of what it searches."""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError, StudyError

# User attributes of a study and of its trials.
FINGERPRINT = "fingerprint"
BASELINE = "baseline"
SPEC = "spec"
RUN_ID = "run_id"
CHECKPOINT = "checkpoint"
TRAINABLE = "trainable_parameters"
LOSS = "loss"
MACRO_F1 = "macro_f1"
REASON = "reason"

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_storage(root: Path) -> RDBStorage:
    """The SQLite storage of all studies below `root`, made where there is none.

    Raises:
        StorageError: it cannot be made, read or written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = root / "optuna.db"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        return RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
    except (OSError, SQLAlchemyError) as error:
        raise StorageError(
            f"the study's storage {path} cannot be opened for writing ({_short(error)}); make the folder writable, "
            "or move a file that is no longer a database out of the way"
        ) from error


def study_names(storage: RDBStorage, sweep: str) -> list[str]:
    """Names of a sweep's studies, oldest first: `embedded`, `embedded-2`, …"""
    matches = [re.fullmatch(rf"{re.escape(sweep)}(?:-(\d+))?", name) for name in optuna.get_all_study_names(storage)]
    return [match[0] for match in sorted(filter(None, matches), key=lambda match: int(match[1] or 1))]


def open_study(
    storage: RDBStorage, sweep: str, fingerprint: dict[str, Any], sampler: BaseSampler, pruner: BasePruner, new: bool
) -> optuna.Study:
    """The sweep's newest study, or a new one.

    Raises:
        StudyError: the study in storage was made with another fingerprint; the message says what changed.
        StorageError: the storage cannot be written.
    """
    names = study_names(storage, sweep)
    name = names[-1] if names else sweep
    if new and names:
        name = f"{sweep}-{len(names) + 1}"
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
        )
        stored = study.user_attrs.get(FINGERPRINT)
        if stored is None:
            study.set_user_attr(FINGERPRINT, fingerprint)
            return study
    except SQLAlchemyError as error:
        raise StorageError(f"the study {name} cannot be written ({_short(error)}); make its folder writable") from error
    changes = differences(stored, json.loads(json.dumps(fingerprint)))
    if changes:
        raise StudyError(
            f"study {name} was made with other settings, and its trials would not compare:\n  "
            + "\n  ".join(changes)
            + f"\nput them back to go on with it, or start another study with `agnews-lora sweep {sweep} --new`"
        )
    return study


def differences(stored: Any, present: Any, path: str = "") -> list[str]:
    """What changed between two fingerprints, a line each: `budget: 100000 -> 120000`."""
    if isinstance(stored, dict) and isinstance(present, dict):
        return [
            line
            for key in sorted(stored.keys() | present.keys())
            for line in differences(stored.get(key), present.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if stored == present else [f"{path}: {json.dumps(stored)} -> {json.dumps(present)}"]


@contextmanager
def exclusive(folder: Path, study: str) -> Iterator[None]:
    """Hold the study for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        StudyError: another process holds it.
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError(
            f"the work folder {folder} cannot be written ({error.strerror}); make it writable"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                f"study {study} is being run by another process; wait for it to end, or stop it, and start again"
            ) from error
        yield


def give_back(study: optuna.Study, trial_id: int) -> None:
    """Put a running trial back in the queue: the next `ask` returns it with its number, parameters and reports."""
    study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def give_back_stale(study: optuna.Study) -> list[FrozenTrial]:
    """Put every running trial back. For the process that holds the study: none of them can still be running."""
    stale = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in stale:
        give_back(study, trial._trial_id)
    return stale


@dataclass(frozen=True)
class Standing:
    """One trial of a study as a reader wants it. accuracy: final, or the last reported one of a pruned trial."""

    trial: str
    number: int
    state: str
    spec: TrialSpec | None
    baseline: bool
    accuracy: float | None
    loss: float | None
    macro_f1: float | None
    trainable_parameters: int | None
    run_id: str | None
    reason: str | None
    seconds: float | None


def trial_name(number: int) -> str:
    """`t0007`."""
    return f"t{number:04d}"


def standings(study: optuna.Study) -> list[Standing]:
    """All trials that were ever started, by number."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        if SPEC not in attributes and trial.state is TrialState.WAITING:
            continue
        reported = trial.intermediate_values
        value = trial.value if trial.state is TrialState.COMPLETE else reported[max(reported)] if reported else None
        rows.append(
            Standing(
                trial=trial_name(trial.number),
                number=trial.number,
                state=trial.state.name,
                spec=TrialSpec(**attributes[SPEC]) if SPEC in attributes else None,
                baseline=bool(attributes.get(BASELINE)),
                accuracy=value,
                loss=attributes.get(LOSS),
                macro_f1=attributes.get(MACRO_F1),
                trainable_parameters=attributes.get(TRAINABLE),
                run_id=attributes.get(RUN_ID),
                reason=attributes.get(REASON),
                seconds=trial.duration.total_seconds() if trial.duration else None,
            )
        )
    return rows


def best_of(rows: list[Standing]) -> Standing | None:
    """The finished trial with the highest final accuracy; ties go to the lower loss, then to the earlier trial."""
    finished = [row for row in rows if row.state == "COMPLETE"]
    return min(finished, key=lambda row: (-(row.accuracy or 0.0), row.loss or 0.0, row.number), default=None)


def _short(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
