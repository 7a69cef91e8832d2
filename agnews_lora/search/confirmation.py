"""The confirmation round: the best trials trained again over more seeds, and the winner chosen by mean.

The best of many trials owes a part of its accuracy to luck: it was chosen for it. Its mean over fresh seeds owes it
less. The round is a study of its own beside the sweep's, `<study>/confirmation`, so that neither sampler nor pruner
learns from it. Its trials (`t0007-s2`: trial 7 with its second seed) are enqueued, claimed, resumed and recorded like
any other, are never pruned, and their leases are the sweep's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Final

import optuna
from optuna.pruners import NopPruner

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.search.claims import set_quota
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.standings import Standing, best_first, best_of, name_of, standings
from agnews_lora.search.study import CONFIRMS, NAME, SEED, SPEC

_SUFFIX: Final = "/confirmation"  # no sweep's study has a slash in its name


@dataclass(frozen=True)
class Repeats:
    """Implements the runner's `Quest`: each trial repeats the configuration that it was enqueued with, by its seed."""

    shape: ModelShape
    budget: int
    total_steps: int

    def configuration(self, trial: optuna.Trial) -> TrialSpec:
        return TrialSpec(**trial.user_attrs[SPEC])

    def seed_of(self, trial: optuna.Trial) -> int:
        return int(trial.user_attrs[SEED])

    def facts_of(self, trial: optuna.Trial) -> dict[str, Any]:
        return {"confirms": trial.user_attrs[CONFIRMS]}


@dataclass(frozen=True)
class Confirmed:
    """A trial of the sweep and its repetitions that have ended.

    mean_accuracy, std_accuracy (of a sample, n - 1): shares of the validation split, over the runs that were completed,
    the sweep's own among them. drop: how far the mean lies below the sweep's own figure.
    """

    own: Standing
    repeats: tuple[Standing, ...]

    @property
    def runs(self) -> list[Standing]:
        """What was completed, the sweep's own first."""
        return [self.own, *(row for row in self.repeats if row.state == "COMPLETE")]

    @property
    def num_failed(self) -> int:
        return len(self.repeats) + 1 - len(self.runs)

    @property
    def accuracies(self) -> list[float]:
        return [row.accuracy for row in self.runs if row.accuracy is not None]

    @property
    def mean_accuracy(self) -> float:
        return fmean(self.accuracies)

    @property
    def std_accuracy(self) -> float | None:
        """None where only one run was completed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def drop(self) -> float:
        return self.accuracies[0] - self.mean_accuracy


def num_missing(study: optuna.Study, num_trials: int, num_seeds: int) -> int:
    """Repetitions of the best that have not ended. num_trials, num_seeds: as in `open_round`."""
    repeated = find_round(study)
    trials = repeated.get_trials(deepcopy=False) if repeated else []
    ended = {name_of(trial) for trial in trials if trial.state.is_finished()}
    wanted = {_name(row, number) for row, number in _wanted(study, num_trials, num_seeds)}
    return len(wanted - ended)


def open_round(study: optuna.Study, num_trials: int, num_seeds: int, seed: int) -> optuna.Study | None:
    """The round of a study whose trials have all ended, with what is missing enqueued; None where none was completed.

    num_trials: how many of the best are repeated. num_seeds: runs a trial, the sweep's own among them. seed: the
    sweep's. To be called while `leases.queue` is held: then nobody else enqueues.
    """
    wanted = _wanted(study, num_trials, num_seeds)
    if not wanted:
        return None
    repeated = optuna.create_study(
        storage=study._storage,
        study_name=f"{study.study_name}{_SUFFIX}",
        pruner=NopPruner(),
        direction="maximize",
        load_if_exists=True,
    )
    known = {name_of(trial) for trial in repeated.get_trials(deepcopy=False)}
    for row, number in wanted:
        if (name := _name(row, number)) not in known:
            assert row.spec is not None, "a completed trial has a configuration"
            own_seed = derived_seed(seed, row.number, f"s{number}")
            attributes = {NAME: name, CONFIRMS: row.trial, SPEC: row.spec.as_dict(), SEED: own_seed}
            repeated.enqueue_trial({}, user_attrs=attributes)
            known.add(name)
    set_quota(repeated, len(known))
    return repeated


def find_round(study: optuna.Study) -> optuna.Study | None:
    """The round of a study, where one was opened."""
    try:
        return optuna.load_study(study_name=f"{study.study_name}{_SUFFIX}", storage=study._storage, pruner=NopPruner())
    except KeyError:
        return None


def confirmed(study: optuna.Study) -> list[Confirmed]:
    """The trials that have repetitions, the best first: by mean accuracy, then by lower mean loss, then the earlier.

    One with a repetition that failed comes after those without: the mean of what is left may hide a bad seed.
    """
    repeated = find_round(study)
    if repeated is None:
        return []
    own = {row.trial: row for row in standings(study)}
    repeats: dict[str, list[Standing]] = {}
    for trial, row in zip(repeated.get_trials(deepcopy=False), standings(repeated), strict=True):
        if trial.state.is_finished():
            repeats.setdefault(trial.user_attrs[CONFIRMS], []).append(row)
    rows = [Confirmed(own[name], tuple(repeats[name])) for name in repeats]
    return sorted(rows, key=lambda row: (row.num_failed, -row.mean_accuracy, _mean_loss(row.runs), row.own.number))


def winner_of(rows: list[Standing], rounds: list[Confirmed]) -> Standing | None:
    """The trial whose adapter is the study's result. rounds: as `confirmed` gives them; none without a confirmation."""
    return rounds[0].own if rounds else best_of(rows)


def _wanted(study: optuna.Study, num_trials: int, num_seeds: int) -> list[tuple[Standing, int]]:
    """(trial of the sweep, number of its seed) of every repetition, all trials' second seeds first."""
    best = best_first(standings(study))[:num_trials]
    return [(row, number) for number in range(2, num_seeds + 1) for row in best]


def _mean_loss(rows: Sequence[Standing]) -> float:
    losses = [row.loss for row in rows if row.loss is not None]
    mean = fmean(losses) if losses else math.inf
    return math.inf if math.isnan(mean) else mean


def _name(row: Standing, number: int) -> str:
    return f"{row.trial}-s{number}"
