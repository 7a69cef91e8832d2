"""What a training recipe adds: good configurations of a table, trained again under it with the table's seeds.

    AG_NEWS_DIR=… python -m benchmarks.recipes train ag_news smoothing
    python -m benchmarks.recipes report

The first trains what `recipe-NAME-DATA.jsonl` lacks, in the folder `--work`; the second compares all that lies there
with the tables, training by training, and writes `results/recipes-DATE.md`.
"""

import argparse
import datetime
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.config.experiment import Experiment
from agnews_lora.tracking.provenance import provenance
from benchmarks import RESULTS
from benchmarks.pruning import interval
from benchmarks.result_files import commit_of, write
from benchmarks.search_table import SEEDS, _Run, configuration, embedded, fill, read_table

BEST: Final = {"ag_news": 4, "newswire": 8}  # configurations, by each of the two runs
AVERAGED: Final = 0.25  # share of the steps, the last ones


class _AveragingRun(_Run):
    """A run whose trials end with the mean of the weights that they had after each of the last steps. One slot."""

    def _read(self) -> None:
        step = self.unread
        super()._read()
        if step is None or 0 not in self.running:
            return
        trial, weights = self.running[0], self.model.slots.weights
        first = int((1 - AVERAGED) * trial.total_steps) + 1
        if trial.progress.step == first:
            self.total = torch.zeros_like(weights)
        if trial.progress.step >= first:
            self.total += weights
        if trial.ended:
            weights.copy_(self.total / (trial.total_steps - first + 1))

    total: torch.Tensor


@dataclass(frozen=True)
class Recipe:
    """A change of the table's trainings. training: settings, beside the table's. alpha: a factor."""

    title: str
    training: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1.0
    smoothing: float = 0.0
    run_class: type[_Run] = _Run

    def spec(self, number: int, shape: ModelShape) -> TrialSpec:
        given = configuration(number, shape)
        return replace(given, alpha=self.alpha * given.alpha)

    def experiment(self, data: str) -> Experiment:
        given = embedded(data)
        return given.model_copy(update={"training": given.training.model_copy(update=self.training)})


def longer(epochs: int) -> Recipe:
    return Recipe(f"{epochs} epoch{'s' * (epochs > 1)}", {"epochs": epochs})


RECIPES: Final = {
    "smoothing": Recipe("label smoothing 0.1", smoothing=0.1),
    "alpha-2": Recipe("alpha × 2", alpha=2.0),
    "epochs-1": longer(1),
    "epochs-2": longer(2),
    "epochs-3": longer(3),
    "average": Recipe(f"mean of the weights over the last {AVERAGED:.0%} of the steps", run_class=_AveragingRun),
}


def chosen(data: str) -> list[tuple[int, int]]:
    """(number of the configuration, number of its run): the best by one run, to be trained again as the other.

    A configuration that looks best by a run was lucky there; its other run has no such part, and the difference of a
    recipe from it none either.
    """
    table, pairs = read_table(RESULTS / f"search-table-{data}.jsonl").paired(), []
    for run in range(SEEDS):
        others = [each for each in table.trainings if each.run != run]
        best = sorted(others, key=lambda each: (-each.test_accuracy, each.number))[: BEST[data]]
        pairs += [(each.number, run) for each in best]
    return pairs


def train(data: str, name: str, run: int | None, work: Path) -> None:
    """Train configurations of a table under a recipe."""
    recipe = RECIPES[name]
    wanted = [pair for pair in chosen(data) if run is None or pair[1] == run]
    smoothed = partial(F.cross_entropy, label_smoothing=recipe.smoothing)
    path = work / f"recipe-{name}-{data}.jsonl"
    with patch.object(F, "cross_entropy", smoothed) if recipe.smoothing else nullcontext():
        fill(path, recipe.experiment(data), wanted, recipe.spec, 1, recipe.run_class)


def lines_of(data: str, work: Path) -> list[str]:
    """A line of a Markdown table for each recipe that was trained."""
    table = {(each.number, each.run): each for each in read_table(RESULTS / f"search-table-{data}.jsonl").trainings}
    lines = []
    for name, recipe in RECIPES.items():
        path = work / f"recipe-{name}-{data}.jsonl"
        if not path.exists():
            continue
        found = read_table(path).trainings
        gaps = [each.test_accuracy - table[each.number, each.run].test_accuracy for each in found]
        shown = [f"#{each.number} {each.test_accuracy:.2%}" for each in found]
        cells = [recipe.title, str(len(gaps)), interval(np.array(gaps)), f"{100 * np.median(gaps):+.2f}"]
        lines.append(f"| {' | '.join([*cells, ', '.join(shown)])} |")
    return lines


def report(work: Path) -> None:
    """Compare what was trained with the tables, and write the result file."""
    tags = provenance()
    sections = [
        f"""\
## {data}

| recipe | trainings | difference, mean ± 95 % | median | test accuracies |
| --- | ---: | ---: | ---: | --- |
{chr(10).join(lines_of(data, work))}
"""
        for data in BEST
    ]
    text = f"""\
# Training recipes, {tags["device"]}, {datetime.date.today()}

`python -m benchmarks.recipes train DATA RECIPE`, then `report`. Commit {commit_of(tags)},
torch {tags["version.torch"]}.

The best configurations of a table by one of their two runs are trained under a recipe with the seed of the other run.
Differences of the test accuracy from that run of the table, in points, with the 95 % interval of their mean (t). A
training that diverged counts as 0 %.

{chr(10).join(sections)}"""
    write("recipes", text)


def main() -> None:
    """Train under a recipe, or report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the trainings lie")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help=train.__doc__)
    training.add_argument("data", choices=BEST)
    training.add_argument("recipe", choices=RECIPES)
    training.add_argument("--run", type=int, choices=range(SEEDS), help="only this run of each")
    commands.add_parser("report", help=report.__doc__)
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.work)
    else:
        train(arguments.data, arguments.recipe, arguments.run, arguments.work)


if __name__ == "__main__":
    main()
