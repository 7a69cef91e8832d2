"""Which sampler finds the best configuration: studies on a surrogate of a table of trained configurations.

`python -m benchmarks.sampling` fits a Gaussian process to each table of `benchmarks.search_table`, and lets each
sampler search it from the same baseline. A study is scored by what the configuration that it chose is worth: the
surrogate's mean, not the noisy figure that it was chosen by. It writes what it measured to `results/`.
"""

import argparse
import datetime
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Final

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.search import space as search_space
from agnews_lora.search.prior import known_good
from agnews_lora.search.study import enqueue_baseline, enqueue_known
from agnews_lora.tracking.provenance import provenance
from benchmarks import RESULTS
from benchmarks.pruning import interval
from benchmarks.result_files import commit_of, write
from benchmarks.search_replay import SPACE, shipped_sampler
from benchmarks.search_table import (
    ALPHA_RATIOS,
    BASELINE,
    BUDGET,
    DROPOUT,
    LEARNING_RATES,
    PRESETS,
    Table,
    read_table,
)

Floats = NDArray[np.float64]

SHAPE: Final[ModelShape] = shape_of("embedded:minilm")
TRIALS: Final = (14, 30, 48)
BELOW: Final = 0.05  # accuracy this far below the best is as good as any lower one


@dataclass(frozen=True)
class Contestant:
    """A sampler, made of (seed, start-up trials). prior: known configurations come first."""

    sampler: Callable[[int, int], BaseSampler]
    prior: bool = False


ours = partial(shipped_sampler, SHAPE)


def gaussian(seed: int, startup: int) -> GPSampler:
    return GPSampler(seed=seed, n_startup_trials=startup, independent_sampler=ours(seed, startup))


SHIPPED: Final = "TPE, Sobol start, prior (shipped)"
CONTESTANTS: Final = {
    "random": Contestant(lambda seed, _: RandomSampler(seed)),
    "TPE, univariate, 10 random": Contestant(lambda seed, _: TPESampler(seed=seed, multivariate=False)),
    "TPE, 10 random (Optuna's default)": Contestant(lambda seed, _: TPESampler(seed=seed)),
    "TPE, a third random": Contestant(lambda seed, startup: TPESampler(seed=seed, n_startup_trials=startup)),
    "TPE, Sobol start": Contestant(ours),
    SHIPPED: Contestant(ours, prior=True),
    "GP, a third random": Contestant(lambda seed, startup: GPSampler(seed=seed, n_startup_trials=startup)),
    "GP, Sobol start, prior": Contestant(gaussian, prior=True),
}


class Process:
    """A Gaussian process over configurations: what the accuracy of one is on average over seeds.

    Args:
        accuracies: of each configuration, [mean over its seeds, variance of that mean].

    left_out: root mean square of the errors at configurations that are left out of the fit, one by one: of all, and of
    the better half.
    """

    def __init__(self, accuracies: dict[TrialSpec, tuple[float, float]]) -> None:
        means, variances = np.array(list(accuracies.values())).T
        self._mean, self._scale = means.mean(), means.std()
        features, targets, noise = (
            np.stack([*map(_features, accuracies)]),
            self._scaled(means),
            variances / self._scale**2,
        )
        kernel = ConstantKernel(1.0, (0.1, 100)) * Matern(np.ones(features.shape[1]), (0.3, 10), nu=2.5)
        self._process = GaussianProcessRegressor(kernel, alpha=noise, n_restarts_optimizer=4, random_state=0)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # what does not matter is smooth
            self._process.fit(features, targets)
        # Rasmussen & Williams 2006, equation 5.12, with the kernel that was fitted to all.
        inverse = np.linalg.inv(self._process.kernel_(features) + np.diag(noise))
        squares = (self._scale * (inverse @ targets) / np.diag(inverse)) ** 2
        self.left_out = tuple(math.sqrt(part.mean()) for part in (squares, squares[means >= np.median(means)]))
        self._known: dict[TrialSpec, float] = {}

    def _scaled(self, means: Floats) -> Floats:
        return (means - self._mean) / self._scale

    def __call__(self, spec: TrialSpec) -> float:
        if spec not in self._known:
            self._known[spec] = float(self._process.predict(_features(spec)[None])[0] * self._scale + self._mean)
        return self._known[spec]


def _features(spec: TrialSpec) -> Floats:
    """Each about 1 across the space."""
    rate, (low, high) = np.log(spec.learning_rate), np.log(LEARNING_RATES)
    return np.array(
        [
            (rate - low) / (high - low),
            np.log(spec.alpha / spec.rank) / np.log(ALPHA_RATIOS[-1]),
            spec.rank / max_rank(spec.targets, spec.head, SHAPE, BUDGET),
            np.log(spec.rank) / np.log(8),
            spec.dropout / DROPOUT,
            *(float(spec.targets == preset) for preset in PRESETS),
        ]
    )


class Surrogate:
    """What a study sees of a configuration, and what it is worth.

    validation, test: accuracies. seed_noise: standard deviation of the validation accuracy between seeds.
    """

    def __init__(self, table: Table) -> None:
        runs: dict[TrialSpec, list[tuple[float, float]]] = {}
        for training in table.trainings:
            runs.setdefault(training.spec, []).append((training.validation_accuracy, training.test_accuracy))
        best = np.max([np.mean(each, axis=0) for each in runs.values()], axis=0)
        clipped = {spec: np.maximum(each, best - BELOW) for spec, each in runs.items()}
        pairs = [
            np.diff(each, axis=0)[0] for each in clipped.values() if len(each) == 2 and (each > best - BELOW).all()
        ]
        variances = np.mean(np.square(pairs), axis=0) / 2
        self.specs, self.seed_noise = list(runs), math.sqrt(variances[0])
        self.validation, self.test = (
            Process({spec: (each[:, of].mean(), variances[of] / len(each)) for spec, each in clipped.items()})
            for of in (0, 1)
        )

    def best(self, num_draws: int = 4_096) -> tuple[TrialSpec, float]:
        """The best of many configurations of the space and of those of the table, with its accuracy."""
        study = optuna.create_study(sampler=ours(0, num_draws))
        drawn = [search_space.suggest(study.ask(), SPACE, SHAPE, BUDGET) for _ in range(num_draws)]
        found = max([*drawn, *self.specs], key=self.test)
        return found, self.test(found)


def search(surrogate: Surrogate, contestant: Contestant, num_trials: int, seed: int) -> float:
    """What the configuration is worth that a study chose by single noisy figures; equal seeds have equal noise."""
    startup = max(1, num_trials // 3)
    study = optuna.create_study(direction="maximize", sampler=contestant.sampler(seed, startup))
    enqueue_baseline(study, BASELINE, SPACE, SHAPE, BUDGET)
    if contestant.prior:
        known = known_good(SPACE, SHAPE, BUDGET, BASELINE, startup - 1)
        enqueue_known(study, known, SPACE, SHAPE, BUDGET)
    noise = np.random.default_rng(seed).normal(0.0, surrogate.seed_noise, num_trials)
    asked: list[TrialSpec] = []
    for number in range(num_trials):
        trial = study.ask()
        asked.append(search_space.suggest(trial, SPACE, SHAPE, BUDGET))
        study.tell(trial, surrogate.validation(asked[-1]) + noise[number])
    return surrogate.test(asked[study.best_trial.number])


def measure(surrogate: Surrogate, num_studies: int, best: float) -> list[str]:
    """The lines of a Markdown table: each sampler's accuracy below the best, and against the shipped one."""
    lines: list[str] = []
    shipped: dict[int, Floats] = {}
    for name, contestant in sorted(CONTESTANTS.items(), key=lambda item: item[0] != SHIPPED):
        cells = []
        for trials in TRIALS:
            found = np.array([search(surrogate, contestant, trials, seed) for seed in range(num_studies)])
            shipped.setdefault(trials, found)
            against = "" if name == SHIPPED else f" ({interval(found - shipped[trials])})"
            cells.append(f"{interval(found - best).lstrip('+')}{against}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def report(data: str, num_studies: int) -> str:
    """The section of one table."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the Gaussian processes' matrices are small: more threads only wait for each other
    table = read_table(RESULTS / f"search-table-{data}.jsonl")
    surrogate = Surrogate(table)
    best, worth = surrogate.best()
    missed = " and ".join(
        f"{100 * every:.2f} ({split}; {100 * half:.2f} in the better half)"
        for split, (every, half) in {
            "validation": surrogate.validation.left_out,
            "test": surrogate.test.left_out,
        }.items()
    )
    known = {BASELINE: "the baseline", **known_good(SPACE, SHAPE, BUDGET, BASELINE, 9)}
    lines = measure(surrogate, num_studies, worth)
    return f"""\
## {data}

{len(surrogate.specs)} configurations, {len(table.trainings)} trainings. Each configuration is left out of the fit once;
its accuracy is then missed by, in points, {missed}.
Between seeds, the validation accuracy varies by {100 * surrogate.seed_noise:.2f} points (standard deviation).
Best of the surrogate: {best}, with {worth:.2%}.

| sampler | {" | ".join(f"{trials} trials" for trials in TRIALS)} |
| --- |{" ---: |" * len(TRIALS)}
{chr(10).join(lines)}

| first trials with the prior | source | test accuracy by the surrogate |
| --- | --- | ---: |
{chr(10).join(f"| {spec} | {source} | {surrogate.test(spec):.2%} |" for spec, source in known.items())}
"""


def main() -> None:
    """Compare the samplers on each table and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=main.__doc__)
    parser.add_argument("tables", nargs="*", help="their names; all that there are by default")
    parser.add_argument("--studies", type=int, default=100)
    arguments = parser.parse_args()
    stored = [path.stem.removeprefix("search-table-") for path in sorted(RESULTS.glob("search-table-*.jsonl"))]
    section = partial(report, num_studies=arguments.studies)
    with ProcessPoolExecutor() as pool:
        sections = list(pool.map(section, arguments.tables or stored))
    tags = provenance()
    text = f"""\
# Samplers, {datetime.date.today()}

`python -m benchmarks.sampling`. Commit {commit_of(tags)}, optuna {version("optuna")},
{os.cpu_count()} cores.

Each study searches a surrogate of a table of trained configurations: two Gaussian processes (Matérn 5/2), one fitted
to the mean validation accuracies, one to the mean test accuracies, over log learning rate, log alpha ratio, log rank,
rank as a share of the largest, dropout and preset. What is more than {100 * BELOW:.0f} points below the best counts as
that. A trial ends with the validation accuracy and the noise of a seed; a study chooses the best of these figures, and
is scored by the test accuracy there. All begin with the baseline; a third of the trials are start-up trials, or 10 by
Optuna's default.

Cells: points from the best test accuracy of the surrogate, mean over {arguments.studies} studies with its 95 %
interval; in brackets the difference from the shipped sampler, paired by seed.

{chr(10).join(sections)}"""
    write("sampling", text)


if __name__ == "__main__":
    main()
