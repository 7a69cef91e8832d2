"""The race of the best trials over seeds: who goes on, how sure a difference is, and who wins.

The accuracy of the best of many trials is partly luck: the trial was chosen for it. Its mean over further seeds is less
so. Runs are spent where they decide, by sequential halving (Karnin, Koren, Somekh, "Almost Optimal Exploration in
Multi-Armed Bandits", ICML 2013). Everything follows from the runs that have ended, in whatever order they did.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Final

import numpy as np
import optuna

from agnews_lora.search import study as study_keys
from agnews_lora.search.trials import TrialSummary, best_first
from agnews_lora.training.interface import SCORES, Objective
from agnews_lora.training.metrics import accuracy_interval

SURE: Final = 0.95  # probability from which on one configuration counts as better than another


@dataclass(frozen=True)
class Confirmed:
    """A trial of the search, with its repetitions over other seeds that have ended."""

    own: TrialSummary
    repeats: tuple[TrialSummary, ...]

    @property
    def runs(self) -> list[TrialSummary]:
        """The runs that were completed, the search's own first."""
        return [self.own, *(row for row in self.repeats if row.state == "COMPLETE")]

    @property
    def fresh_runs(self) -> list[TrialSummary]:
        """The runs whose scores did not choose the trial: without its own, where there are others.

        The baseline's own run was not chosen.
        """
        return self.runs if self.own.baseline else self.runs[1:] or self.runs

    @property
    def num_failed(self) -> int:
        return len(self.repeats) + 1 - len(self.runs)

    def has(self, number: int) -> bool:
        """Whether its run with the seed of a number has ended; the search's own is number 1."""
        return any(row.trial == repetition(self.own, number) for row in self.repeats)

    def up_to(self, number: int) -> "Confirmed":
        """The same without the runs with later seeds."""
        names = {repetition(self.own, each) for each in range(2, number + 1)}
        return replace(self, repeats=tuple(row for row in self.repeats if row.trial in names))

    def scores(self, name: Objective) -> list[float]:
        """Of the completed runs, the search's own first."""
        return [score for row in self.runs if (score := row.score(name)) is not None]

    def mean(self, name: Objective) -> float | None:
        """Over the completed runs, the search's own included."""
        return fmean(scores) if (scores := self.scores(name)) else None

    def std(self, name: Objective) -> float | None:
        """Of a sample (n - 1); None with a single run."""
        return stdev(scores) if len(scores := self.scores(name)) > 1 else None

    def drop(self, name: Objective) -> float | None:
        """How far the mean lies below the search's own score."""
        return scores[0] - fmean(scores) if (scores := self.scores(name)) else None

    def interval(self, num_rows: int) -> tuple[float, float] | None:
        """The 95 % interval of the mean accuracy, which counts the validation rows as well as the seeds."""
        mean, spread = self.mean("accuracy"), self.std("accuracy") or 0.0
        return None if mean is None else accuracy_interval(mean, num_rows, spread**2 / len(self.runs))

    def as_dict(self, objective: Objective, num_rows: int) -> dict[str, float | int | None]:
        """Give its numbers. drop: of the objective. num_rows: of the validation split."""
        found: dict[str, float | int | None] = {"seeds": len(self.runs), "failed": self.num_failed}
        for name in SCORES:
            found |= {f"mean_{name}": self.mean(name), f"std_{name}": self.std(name)}
        low, high = self.interval(num_rows) or (None, None)
        return found | {"low_accuracy": low, "high_accuracy": high, "drop": self.drop(objective)}


def repetition(own: TrialSummary, number: int) -> str:
    """The name of a trial's run with the seed of a number, from 2 on."""
    return f"{own.trial}-s{number}"


def repeated(trials: Sequence[TrialSummary], rounds: optuna.Study | None, objective: Objective) -> dict[str, Confirmed]:
    """Every completed trial with its repetitions, the best of the search first.

    rounds: the study of the repetitions.
    """
    repeats: dict[str, list[TrialSummary]] = {}
    for trial in rounds.get_trials(deepcopy=False) if rounds else ():
        if trial.state.is_finished():
            found = TrialSummary.from_trial(trial, objective)
            repeats.setdefault(trial.user_attrs[study_keys.CONFIRMS], []).append(found)
    return {
        row.trial: Confirmed(row, tuple(repeats.get(row.trial, ())))
        for row in best_first(trials, objective)
        if row.spec
    }


# A difference ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Of the scores of one configuration and of another. probability: that the one is better on fresh seeds."""

    standard_error: float
    probability: float


def difference(one: Confirmed, other: Confirmed, among: Sequence[Confirmed], objective: Objective) -> Difference | None:
    """Compare two configurations by the runs that did not choose them.

    Validation rows and seeds are both samples. The difference d of the mean scores of n_a and n_b runs has

        Var(d) = Var_rows(p_a - p_b) / rows + s² (1 / n_a + 1 / n_b),

    where p is a row's share of runs that answer it correctly, and s² the variance of the score between seeds, pooled
    over all configurations with two runs or more. d² / Var(d) is min F' of Clark ("The Language-as-Fixed-Effect
    Fallacy", J. Verbal Learning and Verbal Behavior 12, 1973), with Satterthwaite's degrees of freedom ν. Student's t,
    since s² comes from few runs: P = T_ν(d / √Var(d)). It errs towards caution: chance that belongs to one row in one
    run is part of both terms. By macro-F1, d is its difference, and the rows' part of the variance the accuracy's.

    Args:
        among: the configurations that s² is pooled over; with all their runs, since a lucky one only makes it larger.

    Returns:
        None where s² or the answers to single rows are not known.
    """
    from scipy.special import stdtr  # here: whoever reads a result back needs none of it

    scores = [each.scores(objective) for each in among]
    freedom = sum(len(own) - 1 for own in scores if own)
    fresh = one.fresh_runs, other.fresh_runs
    answers = [[row.right for row in rows if row.right is not None] for rows in fresh]
    if not freedom or [*map(len, answers)] != [*map(len, fresh)] or len(answers[0][0]) < 2:
        return None
    gaps = np.mean(answers[0], axis=0) - np.mean(answers[1], axis=0)
    by_rows = float(np.var(gaps, ddof=1)) / len(gaps)
    pooled = sum((score - fmean(own)) ** 2 for own in scores for score in own) / freedom
    by_seeds = pooled * sum(1 / len(rows) for rows in fresh)
    means = [fmean(row.score(objective) or 0.0 for row in rows) for rows in fresh]
    gap, variance = means[0] - means[1], by_rows + by_seeds
    if not variance:
        return Difference(0.0, 0.5 + 0.5 * float(np.sign(gap)))
    degrees = variance**2 / (by_rows**2 / (len(gaps) - 1) + by_seeds**2 / freedom)
    return Difference(math.sqrt(variance), float(stdtr(degrees, gap / math.sqrt(variance))))


# The race ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """How far a race is.

    finalists: candidates that are still in it. eliminated: the others, the last to go first. wanted: the repetitions
    that it has asked for up to now, in order: (trial, number of the seed). It is over once all of them have ended.
    """

    finalists: tuple[Confirmed, ...]
    eliminated: tuple[Confirmed, ...]
    wanted: tuple[tuple[TrialSummary, int], ...]


def race(candidates: Sequence[Confirmed], num_seeds: int, objective: Objective) -> Race:
    """Race candidates by sequential halving over seeds.

    In round n = 2, 3, … each candidate is trained with its n-th seed. Then the better half by mean goes on, two at
    least, until all have `num_seeds` runs, or the best is better than each of the others with probability `SURE`.
    """
    finalists, eliminated, wanted = list(candidates), list[Confirmed](), list[tuple[TrialSummary, int]]()
    for number in range(2, num_seeds + 1):
        wanted += [(each.own, number) for each in finalists]
        if number == num_seeds or not all(each.has(number) for each in finalists):
            break
        among = [each.up_to(number) for each in candidates]
        finalists.sort(key=lambda each: _rank(each.up_to(number), objective))
        num_kept = max(2, math.ceil(len(finalists) / 2))
        eliminated[:0], finalists = finalists[num_kept:], finalists[:num_kept]
        now = [each.up_to(number) for each in finalists]
        found = [difference(now[0], other, among, objective) for other in now[1:]]
        if found and all(each is not None and each.probability >= SURE for each in found):
            break
    return Race(tuple(finalists), tuple(eliminated), tuple(wanted))


def _rank(row: Confirmed, objective: Objective) -> tuple[int, float, float, int]:
    """By mean score over all runs, then by lower mean loss, then the earlier trial.

    One with a repetition that failed comes after those without: the mean of what is left may hide a bad seed. The
    search's own run counts, though it was chosen for its score: that is so of all candidates, and in 4,000 simulated
    searches (14 to 48 trials, 3 to 8 candidates, 3 to 5 seeds) the mean with it chose better than the mean without it,
    by 0.003 to 0.013 points.
    """
    losses = [run.loss for run in row.runs]
    loss = math.inf if None in losses else fmean(each for each in losses if each is not None)
    return row.num_failed, -(row.mean(objective) or 0.0), loss, row.own.number


# The choice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """How the winner was chosen among the confirmed trials, and how sure the choice is.

    best_mean: the trial with the best mean. indistinguishable: it, and those whose mean lies within one standard error
    of it. The probabilities are those that the winner is better on fresh seeds (`difference`); None where that is not
    known, or there is no other.
    """

    best_mean: str
    indistinguishable: tuple[str, ...]
    probability_better_than_baseline: float | None
    probability_better_than_runner_up: float | None


def choose(
    found: Mapping[str, Confirmed], objective: Objective, settings: Mapping[str, Any] | None
) -> tuple[tuple[Confirmed, ...], Selection | None]:
    """Choose the winner of a race, and rank all trials that were repeated, the winner first.

    By `prefer: smallest`, it is the finalist with the fewest trainable parameters among those whose mean lies within
    one standard error of the best (Breiman et al., "Classification and Regression Trees", 1984). Finalists only: those
    that were eliminated have fewer runs, so that more of them would pass; in the simulation of `_rank`, the choice
    among them all cost twice as much accuracy.

    Args:
        found: every completed trial, as `repeated` gives them.
        settings: `trials`, `seeds` and `prefer` of the sweep's confirmation; None without one.
    """
    if settings is None:
        return (), None
    raced = race(list(found.values())[: settings["trials"]], settings["seeds"], objective)
    finalists = sorted((each for each in raced.finalists if each.repeats), key=lambda each: _rank(each, objective))
    ranked = finalists + [each for each in raced.eliminated if each.repeats]
    others = [each for each in found.values() if each.repeats and each not in ranked]  # of a shorter search's race
    ranked += sorted(others, key=lambda each: _rank(each, objective))
    if not ranked:
        return (), None

    def compare(one: Confirmed, other: Confirmed) -> Difference | None:
        return difference(one, other, ranked, objective)

    def is_near(each: Confirmed) -> bool:
        apart = compare(best, each)
        if apart is None or each.num_failed > best.num_failed:
            return False
        return (best.mean(objective) or 0.0) - (each.mean(objective) or 0.0) <= apart.standard_error

    best = ranked[0]
    near = [best, *(each for each in finalists if each != best and is_near(each))]
    winner = best
    if settings.get("prefer") == "smallest":
        winner = min(near, key=lambda each: each.own.trainable_parameters or math.inf)
    ranked.sort(key=lambda each: each != winner)  # stable
    baseline = next((each for each in found.values() if each.own.baseline and each != winner), None)
    probabilities = [
        apart.probability if other and (apart := compare(winner, other)) else None
        for other in (baseline, ranked[1] if len(ranked) > 1 else None)
    ]
    return tuple(ranked), Selection(best.own.trial, tuple(each.own.trial for each in near), *probabilities)
