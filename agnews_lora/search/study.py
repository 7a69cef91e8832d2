"""The study in storage: opened or resumed by name, with the fingerprint of what it searches."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FixedTrial, TrialState
from sqlalchemy import func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.errors import StorageError, StudyError
from agnews_lora.paths import lock_file
from agnews_lora.search import space as search_space
from agnews_lora.search.retry import STORAGE_FAULTS, brief
from agnews_lora.training.interface import Objective

# User attributes of a study and of its trials.
SWEEP = "sweep"
IDENTITY = "identity"
FINGERPRINT = "fingerprint"
BASELINE = "baseline"
NAME = "name"  # of a trial that was enqueued with its configuration and seed
CONFIRMS = "confirms"
SEED = "seed"
SPEC = "spec"
RUN_ID = "run_id"
CHECKPOINT = "checkpoint_step"
ATTEMPTS = "attempts"
TRAINABLE = "trainable_parameters"
SCORES = "scores"  # of the last evaluation
REASON = "reason"
COSTS = "costs"

ENDING_SECONDS: Final = 5.0  # that a driver which was asked to stop, or killed, may take to release a lock


def open_storage(where: Path | str, create: bool = True) -> RDBStorage:
    """The storage of all studies: SQLite below a folder, or the database of a URL (SQLite or PostgreSQL).

    create: make what is missing; without it, only what somebody made before is opened.

    Raises:
        StorageError: it cannot be made, read or written, is another Optuna's, or the URL is not one to use.
    """
    quieten()
    url = _url(where)
    try:
        if url.database and url.get_backend_name() == "sqlite":
            path = Path(url.database)
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab" if create else "rb"):
                pass
        return RDBStorage(url.render_as_string(), engine_kwargs=_engine_arguments(url), skip_table_creation=not create)
    except ImportError as error:
        raise StorageError(
            "Cannot open a study in PostgreSQL: psycopg is not installed. Run `pip install 'agnews-lora[postgres]'`."
        ) from error
    except (OSError, RuntimeError, *STORAGE_FAULTS) as error:  # RuntimeError: the schema of another Optuna
        remedy = "Fix its permissions, or move it away to start an empty one."
        if not create:
            remedy = "Start `agnews-lora sweep` on it first: that creates what is missing."
        shown = url.database
        if url.get_backend_name() != "sqlite":
            shown = url.render_as_string()
            remedy = f"Check that the server is up, and PGPASSWORD or the libpq password file. {remedy}"
        raise StorageError(f"Cannot open the study's storage {shown}: {brief(error)}. {remedy}") from error


@contextmanager
def answering() -> Iterator[None]:
    """Raise StorageError where the study's storage does not answer in the block."""
    try:
        yield
    except STORAGE_FAULTS as error:
        raise StorageError(
            f"Cannot reach the study's storage: {brief(error)}. Fix it, and start again: nothing is lost."
        ) from error


def _url(where: Path | str) -> URL:
    """Where the studies are stored, with the driver that is used and no password.

    Raises:
        StorageError: not a URL of SQLite or PostgreSQL, or one with a password in it.
    """
    if isinstance(where, Path):
        return URL.create("sqlite", database=str(where.resolve() / "optuna.db"))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError) as error:
        raise StorageError(f"Cannot use the storage: it is no URL. {_RULE}") from error
    secret = [key for key in url.query if "pass" in key.lower() and key != "passfile"]  # sslpassword, and slips of it
    if url.password is not None or secret:
        safe = url._replace(password=None).difference_update_query(secret).render_as_string()
        raise StorageError(
            "Cannot use the storage: its URL holds a password, which others would read in logs and process lists. Give "
            f"{safe}, and the password by PGPASSWORD or in a libpq password file (PGPASSFILE)."
        )
    match url.get_backend_name():
        case "postgresql":
            return url.set(drivername="postgresql+psycopg")
        case "sqlite" if url.database and url.database != ":memory:":
            return url.set(drivername="sqlite", database=str(Path(url.database).resolve()))
    raise StorageError(f"Cannot use the storage {where}: no database of a kind that is known. {_RULE}")


_RULE = "Give the URL of a database, sqlite:///PATH or postgresql://USER@HOST/DATABASE."


def _engine_arguments(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}
    # A server that went away must be noticed within seconds, not by TCP's own two hours.
    patience = {"connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3}
    return {"pool_pre_ping": True, "connect_args": {**patience, "tcp_user_timeout": 15_000}}


def quieten() -> None:
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


@contextmanager
def sole_driver(folder: Path, sweep: str) -> Iterator[None]:
    """Hold the work folder of a sweep for one driver; the system releases it when the process ends, however it ends.

    Raises:
        StudyError: another driver holds it, and is not just ending.
        StorageError: the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            acquire = held.enter_context(lock_file(folder / "lock"))
        except OSError as error:
            raise StorageError(
                f"Cannot write the work folder {folder}: {error.strerror}. Fix its permissions."
            ) from error
        _wait_for(acquire, sweep)
        yield


@contextmanager
def sole_driver_of(storage: RDBStorage, sweep: str) -> Iterator[None]:
    """Hold a sweep on a PostgreSQL server for one driver, wherever its work folder lies (an advisory lock).

    Raises:
        StudyError: another driver holds it, and is not just ending.
    """
    if storage.engine.dialect.name != "postgresql":
        yield
        return
    key = int.from_bytes(hashlib.sha256(f"agnews-lora {sweep}".encode()).digest()[:8], "big", signed=True)
    with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _wait_for(lambda: connection.execute(select(func.pg_try_advisory_lock(key))).scalar(), sweep)
        yield


def _wait_for(locked: Callable[[], Any], sweep: str) -> None:
    deadline = time.monotonic() + ENDING_SECONDS
    while not locked():
        if time.monotonic() > deadline:
            raise StudyError(
                f"Cannot start sweep {sweep}: another process is running it. Wait for it to end or stop it, and start "
                "again."
            )
        time.sleep(0.1)


def open_study(
    storage: RDBStorage, sweep: str, fingerprint: dict[str, Any], sampler: BaseSampler, pruner: BasePruner, new: bool
) -> optuna.Study:
    """The sweep's newest study, or a new one.

    Raises:
        StudyError: the study in storage was made with another fingerprint; the message says what changed.
        StorageError: the storage cannot be read or written.
    """
    with answering():
        names = study_names(storage, sweep)
        study = optuna.create_study(
            storage=storage,
            study_name=_free_name(storage, sweep) if new or not names else names[-1],
            sampler=sampler,
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
        if FINGERPRINT not in study.user_attrs:
            name_objective(study, fingerprint.get("objective", "accuracy"))
            study.set_user_attr(SWEEP, sweep)
            study.set_user_attr(IDENTITY, uuid4().hex)
            study.set_user_attr(FINGERPRINT, fingerprint)
            return study
    _require_same(study, fingerprint)
    return study


def name_objective(study: optuna.Study, objective: Objective) -> None:
    """Store which score the study's values are: it is the metric's name in Optuna."""
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        study.set_metric_names([objective])


def objective_of(study: optuna.Study) -> Objective:
    """The score that a study's values are: accuracy, unless it was named."""
    return "macro_f1" if study.metric_names == ["macro_f1"] else "accuracy"


def enqueue_baseline(study: optuna.Study, baseline: TrialSpec, space: Space, shape: ModelShape, budget: int) -> None:
    """Enqueue the experiment's own configuration as the first trial, once in a study's life.

    Where it lies inside the space, the sampler learns from it. Where it lies outside (a learning rate that is not
    searched, say), it has no parameters, and only its result counts.
    """
    if any(trial.user_attrs.get(BASELINE) for trial in study.get_trials(deepcopy=False)):
        return
    inside = not search_space.outside(baseline, space, shape, budget)
    parameters = search_space.parameters_of(baseline, space, shape, budget) if inside else {}
    study.enqueue_trial(parameters, user_attrs={BASELINE: True})


def enqueue_named(study: optuna.Study, name: str, spec: TrialSpec, seed: int, **attributes: Any) -> None:
    """Enqueue a trial whose configuration and seed are given, not asked from a space."""
    study.enqueue_trial({}, user_attrs={NAME: name, SPEC: spec.as_dict(), SEED: seed, **attributes})


def enqueued_specs(
    study: optuna.Study, space: Space, shape: ModelShape, budget: int
) -> Iterator[tuple[int, TrialSpec]]:
    """(number, configuration) of each trial that a person enqueued, completed by the smallest values.

    One with a value that Optuna refuses has no configuration; it fails when its turn comes.
    """
    smallest = search_space.smallest(space, shape, budget)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if SPEC in trial.user_attrs or BASELINE in trial.user_attrs:  # requeued, or not asked from the space
            continue
        fixed = trial.system_attrs.get("fixed_params", {})  # Optuna's own key
        try:
            yield trial.number, search_space.suggest(FixedTrial(smallest | fixed), space, shape, budget)
        except ValueError:
            continue


def _require_same(study: optuna.Study, fingerprint: dict[str, Any]) -> None:
    implied = {"objective": "accuracy"}  # of a study from before there was a choice
    changes = differences(implied | study.user_attrs[FINGERPRINT], implied | json.loads(json.dumps(fingerprint)))
    if changes:
        raise StudyError(
            f"Cannot resume study {study.study_name}: it was made with other settings, and its trials would not "
            "compare:\n  "
            + "\n  ".join(changes)
            + f"\nPut them back, or start another study: `agnews-lora sweep {study.user_attrs[SWEEP]} --new`."
        )


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
