"""The study in storage: opened or resumed by name, with the fingerprint of what it searches."""

import fcntl
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import StorageError, StudyError

# User attributes of a study and of its trials.
SWEEP = "sweep"
IDENTITY = "identity"
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

# What Optuna raises where the database cannot be read or written.
_STORAGE_FAULTS = (SQLAlchemyError, StorageInternalError)


def open_storage(root: Path) -> RDBStorage:
    """The SQLite storage of all studies below `root`, made where there is none.

    Raises:
        StorageError: it cannot be made, read or written, or is another Optuna's.
    """
    _quieten()
    path = root / "optuna.db"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        return RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
    except (OSError, RuntimeError, *_STORAGE_FAULTS) as error:  # RuntimeError: the schema of another Optuna
        raise StorageError(
            f"the studies' storage must be a writable SQLite database of the installed Optuna, but {path} is not: "
            f"{_short(error)}; mend its permissions, or move it away to start an empty one"
        ) from error


def _quieten() -> None:
    """Keep Optuna off the screen. What it warns of is meant: a resumed trial reports its steps again, a value that
    someone enqueued beyond its range is counted against the budget, and a short study has few trials a parameter.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for message in (
        "The reported value is ignored",
        "Fixed parameter .* out of range",
        "The value .* is out of",
        "Some regimes for parameter",
    ):
        warnings.filterwarnings("ignore", message, UserWarning)


def study_names(storage: RDBStorage, sweep: str) -> list[str]:
    """Names of a sweep's studies, oldest first: `embedded`, `embedded-2`, …"""
    return [study.study_name for study in storage.get_all_studies() if study.user_attrs.get(SWEEP) == sweep]


def open_study(
    storage: RDBStorage, sweep: str, fingerprint: dict[str, Any], sampler: BaseSampler, pruner: BasePruner, new: bool
) -> optuna.Study:
    """The sweep's newest study, or a new one.

    Raises:
        StudyError: the study in storage was made with another fingerprint; the message says what changed.
        StorageError: the storage cannot be read or written.
    """
    try:
        names = study_names(storage, sweep)
        study = optuna.create_study(
            storage=storage,
            study_name=_free_name(storage, sweep) if new or not names else names[-1],
            sampler=sampler,
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
        stored = study.user_attrs.get(FINGERPRINT)
        if stored is None:
            study.set_user_attr(SWEEP, sweep)
            study.set_user_attr(IDENTITY, uuid4().hex)
            study.set_user_attr(FINGERPRINT, fingerprint)
            return study
    except _STORAGE_FAULTS as error:
        raise StorageError(
            f"the studies' storage {storage.url} cannot be read and written: {_short(error)}; mend its permissions or "
            "the disk, and start again"
        ) from error
    changes = differences(stored, json.loads(json.dumps(fingerprint)))
    if changes:
        raise StudyError(
            f"study {study.study_name} was made with other settings, and its trials would not compare:\n  "
            + "\n  ".join(changes)
            + f"\nput them back to go on with it, or start another study with `agnews-lora sweep {sweep} --new`"
        )
    return study


def _free_name(storage: RDBStorage, sweep: str) -> str:
    """The first of `embedded`, `embedded-2`, … that no sweep has: there may be one called `embedded-2` as well."""
    taken = {study.study_name for study in storage.get_all_studies() if SWEEP in study.user_attrs}
    names = chain([sweep], (f"{sweep}-{number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def differences(stored: Any, present: Any, path: str = "") -> list[str]:
    """What changed between two fingerprints, a line each: `budget: 100000 -> 120000`."""
    if isinstance(stored, dict) and isinstance(present, dict):
        return [
            line
            for key in sorted(stored.keys() | present.keys())
            for line in differences(stored.get(key), present.get(key), f"{path}.{key}" if path else key)
        ]
    if stored == present:
        return []
    return [f"{path}: {json.dumps(stored, ensure_ascii=False)} -> {json.dumps(present, ensure_ascii=False)}"]


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
            )
        )
    return rows


def best_of(rows: list[Standing]) -> Standing | None:
    """The finished trial with the highest final accuracy; ties go to the lower loss, then to the earlier trial."""

    def rank(row: Standing) -> tuple[float, float, int]:
        assert row.accuracy is not None, "Optuna completes no trial without a value"
        return -row.accuracy, math.inf if row.loss is None or math.isnan(row.loss) else row.loss, row.number

    return min((row for row in rows if row.state == "COMPLETE"), key=rank, default=None)


def _short(error: BaseException) -> str:
    """The first line of what went wrong, without SQLAlchemy's and Optuna's wrapping."""
    if isinstance(error, StorageInternalError) and error.__cause__:
        return _short(error.__cause__)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(getattr(error, "orig", None) or error).splitlines()[0].rstrip(".")
