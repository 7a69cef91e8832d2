"""The study in storage: opened or resumed by name, with the fingerprint of what it searches."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import column, func, select, table, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.sweep import Space
from agnews_lora.errors import StorageError, StudyError
from agnews_lora.paths import STUDIES_DATABASE, is_locked, lock_file
from agnews_lora.search import space as search_space
from agnews_lora.search.retry import STORAGE_FAULTS, brief
from agnews_lora.training.interface import Objective

# User attributes of a study and of its trials.
SWEEP = "sweep"
WINNER = "winner"
IDENTITY = "identity"  # a random id of the study; of a trial: its study's, and its own number
BOUND = "bound"  # [the study's own name, the number of trials from before trials had an identity]
FINGERPRINT = "fingerprint"
PLANNED = "planned_trials"  # of a study: those that its last driver was to end, beside those enqueued on top
BASELINE = "baseline"
SOURCE = "source"  # of a trial that was enqueued as a configuration that is known to be good
NAME = "name"  # of a trial that was enqueued with its configuration and seed
CONFIRMS = "confirms"
TARGET = "target_trials"  # of a study: the number that `--trials` gave last
SEED = "seed"
SPEC = "spec"
RUN_ID = "run_id"
CHECKPOINT = "checkpoint_step"
ATTEMPTS = "attempts"
TRAINABLE = "trainable_parameters"
TOTAL_STEPS = "total_steps"
SCORES = "scores"  # of the last evaluation
REASON = "reason"
COSTS = "costs"
OF_TRIALS: Final = {BASELINE, SOURCE, NAME, CONFIRMS, SEED, SPEC, TRAINABLE, TOTAL_STEPS} | {
    *(RUN_ID, CHECKPOINT, ATTEMPTS, SCORES, REASON, COSTS),
}

RIGHT: Final = "right:"  # and a step: system attribute of a trial, `EvalPoint.right` of that step

# What a person asks of a trial while a driver may hold the study: these two come from other processes.
STOP: Final = "stop"  # end the trial of this number
ENQUEUED: Final = "enqueued"  # train the trial on top of the sweep's own; a random id, which a copy shares
STOPPED_BY_PERSON: Final = "stopped by a person"

CONFIRMATION: Final = "/confirmation"  # ends the identity and the name of a confirmation's study
ENDING_SECONDS: Final = 5.0  # that a driver which was asked to stop, or killed, may take to release a lock


def open_storage(where: Path | str) -> RDBStorage:
    """The storage of all studies: SQLite below a folder, or the database of a URL (SQLite or PostgreSQL).

    Raises:
        StorageError: it cannot be made, read or written, is another Optuna's, or the URL is not one to use.
    """
    url = _url(where)
    with _opening(url):
        if url.database and url.get_backend_name() == "sqlite":
            path = Path(url.database)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        return RDBStorage(url.render_as_string(), engine_kwargs=_engine_arguments(url))


def read_storage(where: Path | str) -> RDBStorage | None:
    """The same, to be read alone: the database refuses every write. None where there is none.

    Raises:
        StorageError: it cannot be read, is another Optuna's, or the URL is not one to use.
    """
    url = _url(where)
    arguments = _engine_arguments(url)
    if url.database and url.get_backend_name() == "sqlite":
        if not Path(url.database).exists():
            return None
        url = url.set(database=f"file:{quote(url.database)}", query={"mode": "ro", "uri": "true"})
    else:
        arguments["connect_args"]["options"] = "-c default_transaction_read_only=on"
    with _opening(url):
        return RDBStorage(url.render_as_string(), engine_kwargs=arguments, skip_table_creation=True)


@contextmanager
def _opening(url: URL) -> Iterator[None]:
    quieten()
    try:
        yield
    except ImportError as error:
        raise StorageError(
            "Cannot open a study in PostgreSQL: psycopg is not installed. "
            "Run `.venv/bin/pip install -c constraints.txt -e '.[postgres]'` in the checkout."
        ) from error
    except (OSError, RuntimeError, *STORAGE_FAULTS) as error:  # RuntimeError: the schema of another Optuna
        remedy = "Fix its permissions, or move it away to start an empty one."
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
        return URL.create("sqlite", database=str(where.resolve() / STUDIES_DATABASE))
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


class SweepStudy(optuna.Study):
    """A study that shows the trials of its sweep alone, and those that a person enqueued for it.

    Anybody may add trials to a study in storage, with any values and attributes, those of the sweep's own trials among
    them. A trial is the sweep's where it holds the study's identity and its own number, which no copy of it has.
    """

    def __init__(
        self,
        study_name: str,
        storage: BaseStorage,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
    ) -> None:
        super().__init__(study_name, storage, sampler, pruner)
        attributes = self.user_attrs
        self.identity = str(attributes.get(IDENTITY, ""))
        self.num_unmarked = int(attributes[BOUND][1]) if BOUND in attributes else 0

    def mark(self, number: int) -> str:
        """The identity of a trial."""
        return f"{self.identity}:{number}"

    def owns(self, trial: FrozenTrial) -> bool:
        """Whether a trial is the sweep's: its driver started it, or enqueued it itself."""
        attributes = trial.user_attrs
        if trial.number < self.num_unmarked and IDENTITY not in attributes:
            return trial.state is TrialState.RUNNING or not attributes.keys().isdisjoint({BASELINE, SPEC, REASON})
        return bool(attributes.get(IDENTITY) == self.mark(trial.number))

    def added(self) -> list[FrozenTrial]:
        """The trials that others added or enqueued, and the sweep has not started."""
        return [trial for trial in super()._get_trials(deepcopy=False) if not self.owns(trial)]

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> optuna.Trial:
        """The next trial of the queue, or a new one, running from now on.

        It is marked as the sweep's before: where a kill comes between, it waits, and is the next one still. What it
        holds of the sweep's attributes until then was copied from another trial.
        """
        assert not fixed_distributions, "the sweep's trials are asked one parameter after another"
        while True:
            trial = next(iter(self._get_trials(deepcopy=False, states=(TrialState.WAITING,))), None)
            if trial is None:
                trial_id = self._storage.create_new_trial(self._study_id, create_trial(state=TrialState.WAITING))
                trial = self._storage.get_trial(trial_id)
            with suppress(UpdateFinishedTrialError):  # by somebody else, just now
                if not self.owns(trial):
                    for key in OF_TRIALS & trial.user_attrs.keys():
                        self._storage.set_trial_user_attr(trial._trial_id, key, None)
                    self._storage.set_trial_user_attr(trial._trial_id, IDENTITY, self.mark(trial.number))
                if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    return running(self, trial)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [
            trial
            for trial in super()._get_trials(deepcopy, states, use_cache)
            if self.owns(trial) or self._is_enqueued(trial)
        ]

    def _is_enqueued(self, trial: FrozenTrial) -> bool:
        """Whether a person enqueued a trial. One that has reported anything was added."""
        searches = not self.identity.endswith(CONFIRMATION)
        return searches and trial.state is TrialState.WAITING and not trial.intermediate_values


def is_stopped(trial: FrozenTrial) -> bool:
    """Whether a person has asked for a trial's end: of this one, not of one that it was copied from."""
    return bool(trial.user_attrs.get(STOP) == trial.number)


def num_enqueued(trials: Sequence[FrozenTrial]) -> int:
    """How many trials a person enqueued on top of the sweep's own."""
    return len({str(trial.user_attrs[ENQUEUED]) for trial in trials if ENQUEUED in trial.user_attrs})


def running(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """A trial that is running in the study, to be asked for its parameters."""
    study._thread_local.cached_all_trials = None  # the sampler sees what there is now
    return optuna.Trial(study, trial._trial_id)


def study_names(storage: RDBStorage, sweep: str) -> list[str]:
    """Names of a sweep's studies, oldest first: `embedded`, `embedded-2`, …

    A copy under another name (`optuna.copy_study`) has the attributes of the study that it was made of, and is none.
    """
    found: dict[str, str] = {}  # by identity: a copy of a study that does not hold its name comes after it
    for study in storage.get_all_studies():
        attributes = study.user_attrs
        own = attributes.get(SWEEP) == sweep and {IDENTITY, FINGERPRINT} <= attributes.keys()
        if own and attributes.get(BOUND, [study.study_name])[0] == study.study_name:
            found.setdefault(attributes[IDENTITY], study.study_name)
    return list(found.values())


def newest_study(storage: RDBStorage, sweep: str) -> str | None:
    """The name of a sweep's newest study; None where it has none.

    Raises:
        StudyError: it has none, and a study of that name is another's, or a copy of one is there.
    """
    if names := study_names(storage, sweep):
        return names[-1]
    for study in storage.get_all_studies():
        if study.study_name == sweep and SWEEP not in study.user_attrs:
            cause = f"the storage has a study of that name that no sweep made ({_content(storage, study)})"
            remedy = "Give another database by --storage, or rename the sweep's file. To use this database"
        elif study.user_attrs.get(SWEEP) == sweep and BOUND in study.user_attrs:
            own = study.user_attrs[BOUND][0]
            cause = f"its study {own} is gone, and {study.study_name} is a copy of it"
            remedy = f"To go on with the copy, copy it back as {own} (`optuna.copy_study`). To begin anew"
        else:
            continue
        raise StudyError(
            f"Cannot start sweep {sweep}: {cause}. It was left as it is. {remedy}, start a study of another name: "
            f"`agnews-lora sweep {sweep} --new`."
        )
    return None


def _content(storage: RDBStorage, study: Any) -> str:
    directions = ", ".join(direction.name.lower() for direction in study.directions)
    return f"direction {directions}, {storage.get_n_trials(study._study_id)} trials"


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
    key = _advisory_key(sweep)
    with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _wait_for(lambda: connection.execute(select(func.pg_try_advisory_lock(key))).scalar(), sweep)
        yield


def is_driven(storage: RDBStorage, folder: Path, sweep: str) -> bool:
    """Whether a driver holds a sweep, by one lock or the other. Writes nothing."""
    if is_locked(folder / "lock"):
        return True
    if storage.engine.dialect.name != "postgresql":
        return False
    with storage.engine.connect() as connection:
        return not connection.execute(select(func.pg_try_advisory_xact_lock_shared(_advisory_key(sweep)))).scalar()


def _advisory_key(sweep: str) -> int:
    return int.from_bytes(hashlib.sha256(f"agnews-lora {sweep}".encode()).digest()[:8], "big", signed=True)


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
) -> SweepStudy:
    """The sweep's newest study, or a new one.

    Raises:
        StudyError: the study in storage was made with another fingerprint (the message says what changed), or is not
            the sweep's.
        StorageError: the storage cannot be read or written.
    """
    with answering():
        name = None if new else newest_study(storage, sweep)
        if name is None:
            name = free_name(storage, sweep)
            attributes = {SWEEP: sweep, IDENTITY: uuid4().hex, FINGERPRINT: fingerprint}
            make_study(storage, name, attributes, fingerprint.get("objective", "accuracy"))
        study = SweepStudy(name, storage, sampler, pruner)
        _require_same(study, fingerprint)
        if BOUND not in study.user_attrs:  # of an earlier release
            study.set_user_attr(BOUND, [name, storage.get_n_trials(study._study_id)])
            study = SweepStudy(name, storage, sampler, pruner)
    return study


def make_study(storage: BaseStorage, name: str, attributes: dict[str, Any], objective: Objective) -> None:
    """Make a study that maximises a score. It has its name once it has its attributes: one without, which a kill left,
    could not be told from another project's.
    """
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE], f"{name} {uuid4().hex}")
    study = optuna.load_study(study_name=storage.get_study_name_from_id(study_id), storage=storage)
    name_objective(study, objective)
    for key, value in {**attributes, BOUND: [name, 0]}.items():
        study.set_user_attr(key, value)
    database: Any = getattr(storage, "_backend", storage)  # Optuna keeps a cache before it
    studies = table("studies", column("study_id"), column("study_name"))
    with database.engine.begin() as connection:
        connection.execute(update(studies).where(studies.c.study_id == study_id).values(study_name=name))


def target(study: optuna.Study, asked: int | None, planned: int) -> int:
    """How many trials are to have ended: as many as `--trials` asks for, now or before.

    planned: by the sweep's file, which counts where `--trials` asked for less before.
    """
    return asked or max(planned, study.user_attrs.get(TARGET, 0))


def work_folder(study: SweepStudy, folder: Path) -> Path:
    """Where the trials of a study keep their checkpoints and logs: below the sweep's folder, by the study's name.

    Where another study had that name first (in another storage, or before it was deleted), by its identity as well:
    their trials have the same names.

    Raises:
        StorageError: the folder cannot be written.
    """
    own = folder / study.study_name
    try:
        if not (own / "study").exists() and not study.num_unmarked:
            shutil.rmtree(own, ignore_errors=True)
        elif (own / "study").exists() and (own / "study").read_text(encoding="ascii") != study.identity:
            own = folder / f"{study.study_name}-{study.identity[:8]}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "study").write_text(study.identity, encoding="ascii")
    except OSError as error:
        raise StorageError(f"Cannot write the work folder {own}: {error.strerror}. Fix its permissions.") from error
    return own


def name_objective(study: optuna.Study, objective: Objective) -> None:
    """Store which score the study's values are: it is the metric's name in Optuna."""
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        study.set_metric_names([objective])


def objective_of(study: optuna.Study) -> Objective:
    """The score that a study's values are: accuracy, unless it was named."""
    return "macro_f1" if study.metric_names == ["macro_f1"] else "accuracy"


def show(study: optuna.Study, note: str, winner: str | None = None) -> None:
    """Show a note, and the winner among the study's attributes, in optuna-dashboard.

    Args:
        note: Markdown of at most 2,045 characters. Where the dashboard's user has put another one, with another first
            line, in its place, that one stays.
    """
    storage: BaseStorage = study._storage
    text, version = "dashboard:note_str:0", "dashboard:note_ver"  # as the dashboard's `save_note` writes them
    shown = storage.get_study_system_attrs(study._study_id)
    title = note.partition("\n")[0]
    if text not in shown or (shown[text] != note and shown[text].partition("\n")[0] == title):
        storage.set_study_system_attr(study._study_id, text, note)
        storage.set_study_system_attr(study._study_id, version, int(shown.get(version, 0)) + 1)
    if winner is not None:
        study.set_user_attr(WINNER, winner)


def require_compatible(study: SweepStudy, space: Space, shape: ModelShape, budget: int) -> None:
    """Check that no trial that was added by hand keeps Optuna from storing the parameters of the sweep's trials.

    Raises:
        StudyError: one does.
    """
    asked = search_space.distributions(space, shape, budget)
    for trial in study.added():
        for name in asked.keys() & trial.distributions.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], asked[name])
            except ValueError as error:
                raise StudyError(
                    f"Cannot resume study {study.study_name}: trial {trial.number}, added by hand, has {name} as "
                    f"{trial.distributions[name]}, but the space has {asked[name]}, and a study stores one kind of a "
                    f"parameter. Start another study: `agnews-lora sweep {study.user_attrs[SWEEP]} --new`."
                ) from error


def enqueue_baseline(study: optuna.Study, baseline: TrialSpec, space: Space, shape: ModelShape, budget: int) -> None:
    """Enqueue the experiment's own configuration as the first trial, once in a study's life.

    Where it lies inside the space, the sampler learns from it. Where it lies outside (a learning rate that is not
    searched, say), it has no parameters, and only its result counts.
    """
    if any(trial.user_attrs.get(BASELINE) for trial in study.get_trials(deepcopy=False)):
        return
    inside = not search_space.outside(baseline, space, shape, budget)
    _enqueue(study, search_space.parameters_of(baseline, space, shape, budget) if inside else {}, {BASELINE: True})


def enqueue_known(
    study: optuna.Study, known: Mapping[TrialSpec, str], space: Space, shape: ModelShape, budget: int
) -> None:
    """Enqueue configurations of the space, each with its source, unless a trial has begun: a resumed study goes on."""
    trials = study.get_trials(deepcopy=False)
    if any(trial.state is not TrialState.WAITING or SPEC in trial.user_attrs for trial in trials):
        return
    num_enqueued = sum(SOURCE in trial.user_attrs for trial in trials)  # before a kill
    for spec, source in list(known.items())[num_enqueued:]:
        _enqueue(study, search_space.parameters_of(spec, space, shape, budget), {SOURCE: source})


def enqueue_named(study: optuna.Study, name: str, spec: TrialSpec, seed: int, **attributes: Any) -> None:
    """Enqueue a trial whose configuration and seed are given, not asked from a space."""
    _enqueue(study, {}, {NAME: name, SPEC: spec.as_dict(), SEED: seed, **attributes})


def enqueue_on_top(study: SweepStudy, parameters: dict[str, Any]) -> int:
    """Enqueue a trial on top of the sweep's own, beside a driver that may run; its number."""
    mark = uuid4().hex
    study.enqueue_trial(parameters, user_attrs={ENQUEUED: mark})
    trials = study.get_trials(deepcopy=False)
    return next(trial.number for trial in trials if trial.user_attrs.get(ENQUEUED) == mark)


def _enqueue(study: optuna.Study, parameters: dict[str, Any], attributes: dict[str, Any]) -> None:
    if isinstance(study, SweepStudy):
        attributes[IDENTITY] = study.mark(study._storage.get_n_trials(study._study_id))
    study.enqueue_trial(parameters, user_attrs=attributes)


def given(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters that a trial was enqueued with, and those that it has been asked for."""
    fixed = trial.system_attrs.get("fixed_params")  # Optuna's own key
    return trial.params | (fixed if isinstance(fixed, dict) else {})


def enqueued_specs(
    study: optuna.Study, space: Space, shape: ModelShape, budget: int
) -> Iterator[tuple[int, TrialSpec]]:
    """(number, configuration) of each trial that a person enqueued, completed by the smallest values.

    One with a value that no trial can have has no configuration; it fails when its turn comes.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        if trial.user_attrs.get(SPEC) or trial.user_attrs.get(BASELINE):  # requeued, or not asked from the space
            continue
        fixed = given(trial)
        if not search_space.faults(fixed, space, shape, budget):
            with suppress(ValueError):
                yield trial.number, search_space.completed(fixed, space, shape, budget)


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


def free_name(storage: BaseStorage, stem: str) -> str:
    """The first of `embedded`, `embedded-2`, … that no study in the storage has."""
    taken = {study.study_name for study in storage.get_all_studies()}
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
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
