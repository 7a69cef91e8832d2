"""Whether a sweep that was killed is the same as one that was not, and its trials the same as when trained alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from agnews_lora.search.standings import trial_name

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.rows import LABELS
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.study import BASELINE, SPEC
from agnews_lora.tracking.runs import METRICS
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from agnews_lora.training.multilora.engine import MultiLoraEngine
from benchmarks.chaos_judgement import Stores

SAME: Final = 1e-6
SAME_ALONE: Final = 1e-5
FIRST_LOSSES: Final = 20


def differences(undisturbed: Stores, killed: Stores) -> Iterator[str]:
    """What differs between two sweeps of one trial at a time, a line each: configurations, ends, points."""
    if len(undisturbed.trials) != len(killed.trials):
        yield f"{len(undisturbed.trials)} trials, but {len(killed.trials)} killed"
    for first, second in zip(undisturbed.trials, killed.trials, strict=False):
        name = trial_name(first.number)
        if first.user_attrs[SPEC] != second.user_attrs[SPEC]:
            yield f"{name} is {TrialSpec(**first.user_attrs[SPEC])}, but {TrialSpec(**second.user_attrs[SPEC])} killed"
        ends = [
            (trial.state.name, stores.last_step(trial)) for stores, trial in ((undisturbed, first), (killed, second))
        ]
        if ends[0] != ends[1]:
            yield f"{name} ended as {ends[0]}, but as {ends[1]} killed"
    if (gap := largest_gap(undisturbed, killed)) > SAME:
        yield f"metrics differ by up to {gap:.1e}"


def largest_gap(undisturbed: Stores, killed: Stores) -> float:
    """The largest difference between two values of the same trial, metric and step; infinite where one is missing."""
    values = [
        {
            (trial, metric, step): value
            for trial, history in stores.histories.items()
            for metric in METRICS
            for step, value, _ in history.get(metric, [])
        }
        for stores in (undisturbed, killed)
    ]
    if values[0].keys() != values[1].keys():
        return float("inf")
    return max(abs(value - values[1][key]) for key, value in values[0].items())


def gaps_alone(killed: Stores, work: Path) -> dict[str, tuple[int, float]]:
    """{trial: (losses compared, their largest difference)} between a sweep with `log_every: 1` and each trial alone.

    work: a folder for the checkpoints of the trials that are trained for it.
    """
    experiment, stage = killed.sweep.experiment, killed.stage
    plans = []
    for trial in killed.trials:
        baseline = bool(trial.user_attrs.get(BASELINE))
        seed = experiment.seed if baseline else derived_seed(killed.sweep.seed, trial.number)
        name = trial_name(trial.number)
        plans.append(TrialPlan(name, TrialSpec(**trial.user_attrs[SPEC]), seed, work / name))
    alone = _Alone(plans)
    settings = replace(experiment.settings, eval_every=FIRST_LOSSES)  # evaluations change nothing, and take time
    MultiLoraEngine(stage.base, stage.corpus, settings, LABELS, slots=1).run(alone, alone)
    gaps = {}
    for name, losses in alone.losses.items():
        there = {step: value for step, value, _ in killed.histories[name]["train/loss"]}
        compared = [step for step in range(1, FIRST_LOSSES + 1) if step in there]
        gaps[name] = len(compared), max(abs(losses[step] - there[step]) for step in compared)
    return gaps


@dataclass
class _Alone:
    """Gives the trials one after another, and takes down their losses until enough of them are there."""

    plans: list[TrialPlan]
    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    def next(self) -> TrialPlan | None:
        return self.plans.pop(0) if self.plans else None

    def logged(self, points: Sequence[TrainPoint]) -> None:
        for point in points:
            self.losses.setdefault(point.trial, {})[point.step] = point.loss

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        return [Verdict.PRUNE if point.step >= FIRST_LOSSES else Verdict.CONTINUE for point in points]

    def checkpointed(self, trial: str, step: int, path: Path) -> None: ...

    def finished(self, result: TrialResult) -> None: ...

    def failed(self, trial: str, error: Exception) -> None:
        raise error

    def stop_requested(self) -> bool:
        return False
