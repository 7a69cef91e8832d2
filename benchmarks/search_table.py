"""Configurations of the space, each trained to its end with two seeds: what replays of a search draw their trials from.

    AG_NEWS_DIR=… python -m benchmarks.search_table ag_news
    python -m benchmarks.search_table newswire

trains what `results/search-table-NAME.jsonl` lacks (a line a training: configuration, training losses, the right rows
of every evaluation). It can be stopped, and goes on with the training that it was at. `read` gives the table.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import qmc

from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.data import sources
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import tokenise
from agnews_lora.search.sampler import derived_seed
from agnews_lora.search.space import rank_of
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict
from agnews_lora.training.metrics import mean_cross_entropy, unpacked
from agnews_lora.training.multilora import engine as multilora
from benchmarks import RESULTS, ROOT

BUDGET = 100_000
BASELINE = TrialSpec("qv", 8, 16.0, 0.1, 1e-3)
PRESETS = ("qk", "qv", "qkv", "qkvo", "ffn", "all-linear")
ALPHA_RATIOS = (1, 2, 4, 8)
LEARNING_RATES = (1e-4, 1e-2)
DROPOUT = 0.2  # at most
CONFIGURATIONS, SEEDS = 49, 2
SEED = 2026


def configuration(number: int, shape: ModelShape) -> TrialSpec:
    """Give a number's configuration: the baseline, then every preset in turn, with the rest by a Sobol sequence."""
    if number == 0:
        return BASELINE
    rank, ratio, dropout, rate = qmc.Sobol(4, seed=SEED).random(64)[number - 1]
    targets = PRESETS[(number - 1) % len(PRESETS)]
    low, high = np.log(LEARNING_RATES)
    chosen = rank_of(float(rank), max_rank(targets, "full", shape, BUDGET))
    return TrialSpec(
        targets,
        chosen,
        float(chosen * ALPHA_RATIOS[int(ratio * len(ALPHA_RATIOS))]),
        round(float(DROPOUT * dropout), 3),
        float(f"{np.exp(low + rate * (high - low)):.3g}"),
    )


def embedded(data: str) -> Experiment:
    """The embedded experiment, with the settings and the rows of a table."""
    path = ROOT / "experiments" / "embedded.yaml"
    given = load_experiment(path).model_dump()
    if data == "newswire":
        given["training"] |= {"epochs": 1, "eval_every": 20}
    else:
        folder = Path(os.environ["AG_NEWS_DIR"])
        given["data"] = {
            "source": "files",
            "train": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "validation": 0.15,
            "text": ["Title", "Description"],
            "label": "Class Index",
            "labels": {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"},
            "clean": "ag_news",
            "allow_overlap": True,
        }
        given["training"] |= {"epochs": 2, "batch_size": 16, "max_length": 128, "eval_every": 133, "eval_rows": 750}
    return Experiment.model_validate(given, context={"path": path})


def corpus_of(experiment: Experiment, base: BaseModel, cache: Path) -> tuple[Corpus, int]:
    """The corpus with the test rows behind the validation rows, so that an end scores both; validation rows."""
    settings = experiment.settings
    data = experiment.data_settings
    corpus = sources.prepare(data, experiment.seed, base.folder, settings.max_length, settings.eval_rows, cache)
    test = sources.load(data, experiment.seed).test
    rows = replace(
        corpus.validation_rows,
        texts=corpus.validation_rows.texts + test.texts,
        labels=corpus.validation_rows.labels + test.labels,
    )
    both = tokenise(rows, base.folder, settings.max_length, cache)
    return replace(corpus, validation=both, validation_rows=rows), len(corpus.validation_rows)


@dataclass
class Filling:
    """The engine's source and observer while a table is filled: nothing is pruned, every end is written down.

    todo: (number of the configuration, number of its run). spec: of a number.
    """

    path: Path
    todo: list[tuple[int, int]]
    spec: Callable[[int], TrialSpec]
    folder: Path
    _right: dict[str, dict[int, str]] = field(default_factory=dict)
    _losses: dict[str, list[float]] = field(default_factory=dict)
    _evaluated: dict[str, list[float]] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)

    def next(self) -> TrialPlan | None:
        if not self.todo:
            return None
        number, run = self.todo.pop(0)
        trial = f"{number}-{run}"
        self._losses[trial], self._evaluated[trial], self._right[trial] = [], [], {}
        self._began[trial] = time.process_time()
        seed = derived_seed(SEED + run, number)
        return TrialPlan(trial, self.spec(number), seed, self.folder / trial)

    def logged(self, points: Sequence[TrainPoint]) -> None:
        for point in points:
            self._losses[point.trial].append(round(point.loss, 4))

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        for point in points:
            self._evaluated[point.trial].append(round(point.loss, 4))
            self._right[point.trial][point.step] = point.right
        return [Verdict.CONTINUE for _ in points]

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        """Keep no checkpoint: a training that was stopped begins anew."""

    def finished(self, result: TrialResult) -> None:
        assert result.final is not None, "nothing is pruned here"
        self._keep(result.trial)
        shutil.rmtree(self.folder / result.trial)

    def failed(self, trial: str, error: Exception) -> None:
        print(f"{trial}: {error}", flush=True)
        self._keep(trial)

    def _keep(self, trial: str) -> None:
        number, run = map(int, trial.split("-"))
        line = {
            "number": number,
            "run": run,
            **self.spec(number).as_dict(),
            "losses": self._losses.pop(trial),
            "eval_losses": self._evaluated.pop(trial),
            "right": self._right.pop(trial),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        seconds = time.process_time() - self._began.pop(trial)
        print(f"{trial}: {self.spec(number)}, {seconds:.0f} CPU-s", flush=True)

    def stop_requested(self) -> bool:
        return False


class _Run(multilora._Run):
    """A run of the engine whose loss at an end leaves the test rows out. num_validation: of the rows before them."""

    num_validation: int

    def _points(self, scores: Any) -> Iterator[tuple[int, EvalPoint]]:
        found = dict(zip(scores.slots, scores.logits, strict=True))
        for slot, point in super()._points(scores):
            rows = slice(self.num_validation if point.final else None)
            yield slot, replace(point, loss=mean_cross_entropy(found[slot][rows], scores.labels[rows]))


@dataclass(frozen=True)
class Training:
    """One training of a configuration, never pruned.

    Args:
        run: the number of its seed, from 0.
        losses: of the training rows, at every `log_every`th step.
        eval_losses: of the rows that each evaluation scored, in its steps' order.
        right: {step: rows answered rightly [rows]}, of the monitor; at the last step of the validation split.
        test: [rows] the same of the test split, after the last step. It is empty, and steps are missing, where the
            training diverged.
    """

    number: int
    run: int
    spec: TrialSpec
    losses: list[float]
    eval_losses: list[float]
    right: dict[int, npt.NDArray[np.bool_]]
    test: npt.NDArray[np.bool_]

    @property
    def test_accuracy(self) -> float:
        """0 where it diverged."""
        return float(self.test.mean()) if self.test.size else 0.0

    @property
    def validation_accuracy(self) -> float:
        """After the last step, on the whole validation split; 0 where it diverged."""
        return float(self.right[max(self.right)].mean()) if self.test.size else 0.0


@dataclass(frozen=True)
class Table:
    """The trainings of a table. monitor: positions in the validation split of the rows that are scored on the way."""

    about: dict[str, Any]
    trainings: list[Training]

    @property
    def monitor(self) -> npt.NDArray[np.int64]:
        return np.array(self.about["monitor"])

    def paired(self) -> "Table":
        """The configurations that were trained with both seeds: a table may not be finished."""
        known = {(each.number, each.run) for each in self.trainings}
        kept = [each for each in self.trainings if {(each.number, run) for run in range(SEEDS)} <= known]
        return replace(self, trainings=kept)

    @property
    def test_accuracies(self) -> dict[int, float]:
        """{number of a configuration: mean over its runs}."""
        found: dict[int, list[float]] = {}
        for each in self.trainings:
            found.setdefault(each.number, []).append(each.test_accuracy)
        return {number: fmean(runs) for number, runs in found.items()}

    @property
    def total_steps(self) -> int:
        return max(step for training in self.trainings for step in training.right)

    @property
    def steps(self) -> list[int]:
        """Of the evaluations, the last one included."""
        return sorted({step for training in self.trainings for step in training.right})


def read_table(path: Path) -> Table:
    """Read the file of a table, finished or not."""
    about, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    _, num_validation, num_test = about["rows"]
    steps = {int(step) for line in lines for step in line["right"]}
    trainings = []
    for line in lines:
        spec = TrialSpec(**{name: line[name] for name in TrialSpec.__dataclass_fields__ if name in line})
        right, test = {}, np.zeros(0, dtype=bool)
        for step, text in line["right"].items():
            right[int(step)] = unpacked(text, len(about["monitor"]))
            if int(step) == max(steps):
                both = unpacked(text, num_validation + num_test)
                right[int(step)], test = both[:num_validation], both[num_validation:]
        losses, eval_losses = line["losses"], line["eval_losses"]
        trainings.append(Training(line["number"], line["run"], spec, losses, eval_losses, right, test))
    return Table(about, sorted(trainings, key=lambda each: (each.number, each.run)))


def fill(
    path: Path,
    experiment: Experiment,
    wanted: Sequence[tuple[int, int]],
    spec: Callable[[int, ModelShape], TrialSpec] = configuration,
    slots: int | None = None,
    run_class: type[_Run] = _Run,
) -> None:
    """Train those of the (numbers of a configuration, numbers of a run) that a file lacks."""
    done = {(each.number, each.run) for each in read_table(path).trainings} if path.exists() else set()
    base = resolve(experiment.base, num_labels=4)
    with tempfile.TemporaryDirectory() as folder:
        corpus, num_validation = corpus_of(experiment, base, Path(folder))
        if not path.exists():
            about = {
                "data": "newswire" if experiment.data_settings.source == "newswire" else "ag_news",
                "base": base.name,
                "budget": BUDGET,
                "training": experiment.training.model_dump(),
                "rows": [len(corpus.train_rows), num_validation, len(corpus.validation_rows) - num_validation],
                "monitor": corpus.monitor,
                "digest": corpus.digest,
            }
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        engine = multilora.MultiLoraEngine(base, corpus, experiment.settings, slots)
        todo = [training for training in wanted if training not in done]
        filling = Filling(path, todo, lambda number: spec(number, base.shape), Path(folder))
        run = run_class(engine, filling, filling)
        run.num_validation = num_validation
        run.until_done()


def main() -> None:
    """Train what a table lacks: all configurations once, then once more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_table", description=main.__doc__)
    parser.add_argument("data", choices=["ag_news", "newswire"])
    parser.add_argument("--run", type=int, choices=range(SEEDS), help="only this run of each, one at a time")
    arguments = parser.parse_args()
    runs = range(SEEDS) if arguments.run is None else [arguments.run]
    wanted = [(number, run) for run in runs for number in range(CONFIGURATIONS)]
    slots = None if arguments.run is None else 1
    fill(RESULTS / f"search-table-{arguments.data}.jsonl", embedded(arguments.data), wanted, slots=slots)


if __name__ == "__main__":
    main()
