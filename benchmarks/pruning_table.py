"""Configurations of the shipped sweep, each trained once without pruning: what `benchmarks/pruning.py` replays."""

import csv
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import optuna

from agnews_lora.adapters.budget import max_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.commands.prepare import Prepared, prepare
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.search import space as search_space
from agnews_lora.search.sampler import derived_seed
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "pruning-table.csv"
SWEEP = "embedded"
SEED = 2026  # of the table's configurations


@dataclass(frozen=True)
class Row:
    """One configuration, trained once without pruning.

    number: 0 is the sweep's baseline. accuracies: {step: accuracy}; the last on the whole validation split, the others
    on the fixed subset of it. Those that a trial did not reach, since it diverged, are missing. loss: the final one.
    """

    number: int
    spec: TrialSpec
    accuracies: dict[int, float]
    loss: float | None


@dataclass(frozen=True)
class Table:
    """The trained rows, and which of them stands for a configuration.

    The baseline stands for itself. For any other it is the row of the same preset (of any, where the table has none)
    with the least Euclidean distance over four numbers that each run from 0 to 1 across the space: logarithm of the
    learning rate, logarithm of alpha / rank, rank as a share of the largest that fits, dropout.
    """

    rows: Sequence[Row]
    sweep: Sweep
    shape: ModelShape

    @property
    def total_steps(self) -> int:
        return max(self.rows[0].accuracies)

    @property
    def best(self) -> float:
        """The highest final accuracy of all rows."""
        return max(row.accuracies.get(self.total_steps, 0.0) for row in self.rows)

    def nearest(self, spec: TrialSpec) -> Row:
        baseline, *drawn = self.rows
        if spec == baseline.spec:
            return baseline
        alike = [row for row in drawn if row.spec.targets == spec.targets] or drawn
        place = self._place(spec)
        return min(alike, key=lambda row: math.dist(place, self._place(row.spec)))

    def _place(self, spec: TrialSpec) -> tuple[float, ...]:
        space = self.sweep.space
        rates, ratios, dropout = space.learning_rate, space.alpha_ratio, space.dropout
        highest = max_rank(spec.targets, spec.head, self.shape, self.sweep.budget)
        return (
            math.log(spec.learning_rate / rates.low) / math.log(rates.high / rates.low),
            math.log(spec.alpha / spec.rank / min(ratios)) / math.log(max(ratios) / min(ratios)),
            (spec.rank - 1) / max(1, highest - 1),
            (spec.dropout - dropout.low) / (dropout.high - dropout.low),
        )


def read_table(path: Path) -> list[Row]:
    """The rows of a table file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Row:
    spec = TrialSpec(
        cells["targets"],
        int(cells["rank"]),
        float(cells["alpha"]),
        float(cells["dropout"]),
        float(cells["learning_rate"]),
        cells["head"],
    )
    steps = {int(name.removeprefix("step_")): value for name, value in cells.items() if name.startswith("step_")}
    accuracies = {step: float(value) for step, value in steps.items() if value}
    return Row(int(cells["number"]), spec, accuracies, float(cells["loss"]) if cells["loss"] else None)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """All rows, written beside and put in place at once."""
    steps = sorted({step for row in rows for step in row.accuracies})
    beside = path.with_suffix(".partial")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["number", *asdict(rows[0].spec), *(f"step_{step}" for step in steps), "loss"])
        for row in rows:
            accuracies = [f"{row.accuracies[step]:.6f}" if step in row.accuracies else "" for step in steps]
            loss = "" if row.loss is None else f"{row.loss:.6f}"
            writer.writerow([row.number, *row.spec.as_dict().values(), *accuracies, loss])
    beside.replace(path)


def draw(sweep: Sweep, shape: ModelShape, number: int) -> TrialSpec:
    """The table's configuration of a number: the baseline, then random draws from the sweep's space."""
    if number == 0:
        return sweep.experiment.spec
    sampler = optuna.samplers.RandomSampler(seed=derived_seed(SEED, number))
    trial = optuna.create_study(sampler=sampler).ask()
    return search_space.suggest(trial, sweep.space, shape, sweep.budget)


@dataclass
class Filling:
    """The engine's source and observer while the table is filled: nothing is pruned, every end is written down."""

    sweep: Sweep
    shape: ModelShape
    folder: Path
    num_rows: int
    rows: list[Row]
    _plans: dict[str, TrialPlan] = field(default_factory=dict, init=False)
    _accuracies: dict[str, dict[int, float]] = field(default_factory=dict, init=False)

    def next(self) -> TrialPlan | None:
        number = len(self.rows)
        if number >= self.num_rows:
            return None
        name = str(number)
        seed = self.sweep.experiment.seed if number == 0 else derived_seed(self.sweep.seed, number)
        self._plans[name] = TrialPlan(name, draw(self.sweep, self.shape, number), seed, self.folder / name)
        self._accuracies[name] = {}
        return self._plans[name]

    def logged(self, points: Sequence[TrainPoint]) -> None:
        """Not part of the table."""

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        for point in points:
            self._accuracies[point.trial][point.step] = point.accuracy
        return [Verdict.CONTINUE for _ in points]

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        """A trial that was stopped is trained anew."""

    def finished(self, result: TrialResult) -> None:
        assert result.final is not None, "nothing is pruned here"
        self._keep(result.trial, result.final.loss)

    def failed(self, trial: str, error: Exception) -> None:
        print(f"{trial}: {error}")
        self._keep(trial, None)

    def _keep(self, trial: str, loss: float | None) -> None:
        plan = self._plans[trial]
        self.rows.append(Row(int(trial), plan.spec, self._accuracies[trial], loss))
        write_table(TABLE, self.rows)
        shutil.rmtree(plan.folder)
        print(f"{trial} of {self.num_rows}: {plan.spec}: {self._accuracies[trial]}", flush=True)

    def stop_requested(self) -> bool:
        return False


def fill_table(num_rows: int) -> None:
    """Train what the table lacks of its first `num_rows` configurations, one after another, at the sweep's settings."""
    from agnews_lora.training.multilora.engine import MultiLoraEngine

    with shipped_sweep() as (sweep, prepared):
        engine = MultiLoraEngine(prepared.base, prepared.corpus, prepared.experiment.settings, slots=1)
        filling = Filling(sweep, prepared.base.shape, Path.cwd(), num_rows, read_table(TABLE))
        engine.run(filling, filling)


@contextmanager
def shipped_sweep() -> Iterator[tuple[Sweep, Prepared]]:
    """The sweep and its data, in an empty working directory."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for shipped in ("experiments", "sweeps"):
            shutil.copytree(ROOT / shipped, Path(folder, shipped))
        sweep = load_sweep(SWEEP)
        yield sweep, prepare(sweep.experiment)
