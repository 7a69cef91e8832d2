"""The study of a sweep: what makes it up, opened by `sweep` or joined by `worker`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna

from agnews_lora.adapters.budget import feasible_ranks, require_within_budget
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.errors import BudgetError
from agnews_lora.paths import STORES
from agnews_lora.search import space as search_space
from agnews_lora.search.claims import set_quota
from agnews_lora.search.pruner import PeerMedianPruner
from agnews_lora.search.queue import enqueue_baseline, waiting_specs
from agnews_lora.search.sampler import TrialSeededTPE
from agnews_lora.search.study import join_study, open_storage, open_study, study_names


def opened(sweep: Sweep, stage: Stage, storage: str | None, trials: int, new: bool) -> optuna.Study:
    """The sweep's study, made or resumed, with its baseline in the queue and its quota set.

    storage: URL, or None for the project's own.

    Raises:
        StudyError: it was made with another fingerprint. StorageError: it cannot be read or written.
    """
    rdb = open_storage(storage or STORES)
    study = open_study(rdb, sweep.name, fingerprint(sweep, stage), _sampler(sweep, stage), _pruner(sweep), new)
    enqueue_baseline(study, sweep.experiment.spec, sweep.space, stage.base.shape, sweep.budget)
    set_quota(study, trials)
    return study


def joined(sweep: Sweep, stage: Stage, storage: str | None) -> optuna.Study:
    """The sweep's newest study, which some `sweep` has opened.

    Raises:
        StudyError: there is none, or with another fingerprint. StorageError: the storage cannot be read or written.
    """
    rdb = open_storage(storage or STORES, create=False)
    return join_study(rdb, sweep.name, fingerprint(sweep, stage), _sampler(sweep, stage), _pruner(sweep))


def _sampler(sweep: Sweep, stage: Stage) -> TrialSeededTPE:
    shared = search_space.shared(sweep.space, stage.base.shape, sweep.budget)
    return TrialSeededTPE(sweep.seed, sweep.startup_trials, shared)


def _pruner(sweep: Sweep) -> PeerMedianPruner:
    return PeerMedianPruner(sweep.pruner.startup_trials, sweep.pruner.warmup_steps)


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


def require_feasible(sweep: Sweep, shape: ModelShape, storage: str | None, new: bool) -> None:
    """Count the baseline and every enqueued trial, before any data is read.

    Raises:
        BudgetError: one of them breaks the budget, or no preset fits it.
    """
    feasible_ranks(list(sweep.space.targets), list(sweep.space.heads), shape, sweep.budget)
    with _blamed(f"experiment {sweep.experiment.name}, the baseline of {sweep.name}"):
        require_within_budget(sweep.experiment.spec, shape, sweep.budget)
    where: Path | str = storage or STORES
    if new or (isinstance(where, Path) and not (where / "optuna.db").exists()):
        return
    rdb = open_storage(where)
    for study_name in study_names(rdb, sweep.name)[-1:]:
        study = optuna.load_study(study_name=study_name, storage=rdb)
        for number, spec in waiting_specs(study, sweep.space, shape, sweep.budget):
            with _blamed(f"trial {number}, enqueued in study {study_name} (`--new` starts another without it)"):
                require_within_budget(spec, shape, sweep.budget)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"{what}: {error}") from error
