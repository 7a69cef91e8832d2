"""What whole sweeps find on real rows: winners trained again with fresh seeds, beside the baseline and random search.

    AG_NEWS_DIR=… python -m benchmarks.search_live sweep 1
    python -m benchmarks.search_live fresh
    python -m benchmarks.search_live report

The first runs `agnews-lora sweep` with a seed in the folder `--work`, on the rows and settings of the table `ag_news`.
The second trains the baseline and the winners of all sweeps there with seeds that no search has used; the third writes
`results/search-live-EPOCHS-epochs-DATE.md`. The first two go on where they were stopped. `sweep 1 --epochs 3`
trains longer than the table does; a folder holds sweeps of one number of epochs.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.experiment import load_experiment
from agnews_lora.search.results import SweepResult
from benchmarks import RESULTS
from benchmarks.recipes import longer
from benchmarks.result_files import commit_of, write
from benchmarks.search_table import BASELINE, BUDGET, SEEDS, Table, fill, read_table

NAME: Final = "real"
DATA: Final = "ag_news"
LOW, HIGH = 5e-4, 1e-2  # learning rates
SWEEP: Final = {
    "experiment": NAME,
    "budget": BUDGET,
    "space": {"learning_rate": {"low": LOW, "high": HIGH}},
    "trials": 14,
    "slots": 2,
}
FRESH: Final = range(SEEDS, SEEDS + 2)  # numbers of runs that no table has
NUM_RANDOM: Final = 1_000


def sweep(seed: int, epochs: int, work: Path) -> None:
    """Run the sweep with a seed."""
    folder = work / f"seed-{seed}"
    for kind, document in (
        ("experiments", longer(epochs).experiment(DATA).model_dump(mode="json", exclude_unset=True)),
        ("sweeps", SWEEP | {"seed": seed}),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        with (folder / kind / f"{NAME}.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(document, file)
    subprocess.run([sys.executable, "-m", "agnews_lora", "sweep", NAME], cwd=folder, check=True)


def results(work: Path) -> dict[int, SweepResult]:
    """{seed: result} of the sweeps that have finished."""
    paths = sorted(work.glob(f"seed-*/mlruns/results/{NAME}.json"))
    seeds = [int(path.parents[2].name.removeprefix("seed-")) for path in paths]
    return {seed: SweepResult.from_json(path.read_text("utf-8")) for seed, path in zip(seeds, paths, strict=True)}


def winner(result: SweepResult) -> TrialSpec:
    assert result.winner is not None
    assert result.winner.spec is not None
    return result.winner.spec


def fresh(work: Path) -> None:
    """Train the baseline, number 0, and the winners, by the seeds of their sweeps, with fresh seeds."""
    specs = {0: BASELINE, **{seed: winner(result) for seed, result in results(work).items()}}

    def spec(number: int, shape: ModelShape) -> TrialSpec:
        return specs[number]

    wanted = [(number, run) for run in FRESH for number in specs]
    experiment = load_experiment(next(work.glob(f"seed-*/experiments/{NAME}.yaml")))
    fill(work / "fresh.jsonl", experiment, wanted, spec)


def num_steps(result: SweepResult) -> int:
    """All its training steps, those of its confirmation counted in."""
    repeats = [row for each in result.confirmed for row in each.repeats]
    return sum(row.steps for row in [*result.trials, *repeats])


def random_search(table: Table, num_trials: int) -> NDArray[np.float64]:
    """Draw `num_trials` configurations from the table, with one run each: test accuracies of the best ones' other runs.

    Drawn are configurations within the sweep's learning rates; the baseline is the first of each search.
    """
    runs = {(each.number, each.run): each for each in table.paired().trainings}
    inside = [number for number, run in runs if run == 0 and number and runs[number, 0].spec.learning_rate >= LOW]
    generator, found = np.random.default_rng(0), []
    for _ in range(NUM_RANDOM):
        numbers = [0, *map(int, generator.choice(inside, num_trials - 1, replace=False))]
        drawn = [runs[number, int(generator.integers(SEEDS))] for number in numbers]
        best = max(drawn, key=lambda each: (each.validation_accuracy, -each.number))
        found.append(runs[best.number, 1 - best.run].test_accuracy)
    return np.array(found)


def best_of(table: Table) -> tuple[TrialSpec, float, float]:
    """The table's best: by the mean test accuracy itself, as no search could choose; and by the other run of the best.

    The first is lucky, and the second is not.
    """
    runs = {(each.number, each.run): each for each in table.paired().trainings}
    means = table.paired().test_accuracies
    best = max(means, key=lambda number: means[number])
    others = []
    for run in range(SEEDS):
        top = max((each for each in runs.values() if each.run == run), key=lambda each: each.test_accuracy)
        others.append(runs[top.number, 1 - run].test_accuracy)
    return runs[best, 0].spec, means[best], float(np.mean(others))


def accuracies(found: Sequence[float]) -> str:
    return f"{', '.join(f'{each:.2%}' for each in found)}: {np.mean(found):.2%}"


def report(work: Path) -> None:
    """Write the result file."""
    found, table = results(work), read_table(RESULTS / f"search-table-{DATA}.jsonl")
    tags = next(iter(found.values())).facts.provenance  # of the sweeps, not of this report
    trained, runs = read_table(work / "fresh.jsonl"), dict[int, list[float]]()
    epochs = trained.about["training"]["epochs"]
    for each in trained.trainings:
        runs.setdefault(each.number, []).append(each.test_accuracy)
    lines = []
    for seed, result in found.items():
        pruned, whole = sum(row.state == "PRUNED" for row in result.trials), result.facts.total_steps
        shown = [winner(result), pruned, f"{num_steps(result) / whole:.1f}", accuracies(runs[seed])]
        lines.append(f"| seed {seed} | {' | '.join(map(str, shown))} |")
    spent = round(float(np.mean([num_steps(result) for result in found.values()])) / table.total_steps)
    drawn, (best, worth, unlucky) = random_search(table, spent), best_of(table)
    winners = np.mean([np.mean(runs[seed]) for seed in found])
    text = f"""\
# Sweeps on real rows, {tags["device"]}, {datetime.date.today()}

`python -m benchmarks.search_live sweep SEED --epochs {epochs}` for each seed, `fresh`, `report`. Sweeps of commit
{commit_of(tags)}, torch {tags["version.torch"]}.

MiniLM on AG News rows, as the table `search-table-{DATA}.jsonl`, whose trainings have two epochs; {SWEEP["trials"]}
trials, pruner and confirmation by default, learning rates from {LOW:g} to {HIGH:g}. Winner and baseline are trained
again with {len(FRESH)} seeds that no search has used, and scored on {len(table.trainings[0].test):,} test rows.
Trainings: all steps of the sweep, its confirmation counted in, in whole trainings.

| sweep | winner | pruned | trainings | test accuracy with fresh seeds: mean |
| --- | --- | ---: | ---: | ---: |
{chr(10).join(lines)}

| what | test accuracy |
| --- | ---: |
| winners, mean | {winners:.2%} |
| baseline ({BASELINE}), with the fresh seeds | {accuracies(runs[0])} |
| random search with as many steps, {spent} of the table's trainings: mean of {NUM_RANDOM:,} | {drawn.mean():.2%} |
| best of the table's {len(table.trainings) // SEEDS} by that figure itself ({best}) | {worth:.2%} |
| best of the table by one run, its other run | {unlucky:.2%} |
"""
    write(f"search-live-{epochs}-epochs", text)


def main() -> None:
    """Sweep, train with fresh seeds, or report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_live", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "search-live"), help="for all of it")
    commands = parser.add_subparsers(dest="command", required=True)
    sweeping = commands.add_parser("sweep", help=sweep.__doc__)
    sweeping.add_argument("seed", type=int)
    sweeping.add_argument("--epochs", type=int, default=2, help="of every training")
    commands.add_parser("fresh", help=fresh.__doc__)
    commands.add_parser("report", help=report.__doc__)
    arguments = parser.parse_args()
    match arguments.command:
        case "sweep":
            sweep(arguments.seed, arguments.epochs, arguments.work)
        case "fresh":
            fresh(arguments.work)
        case _:
            report(arguments.work)


if __name__ == "__main__":
    main()
