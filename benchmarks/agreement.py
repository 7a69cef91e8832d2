"""Whether both engines find the same: `python -m benchmarks.agreement --ag-news DIR --work DIR`.

Eight fixed configurations, from poor to good, are trained on real AG News rows by the reference engine and by the
multi-LoRA engine, four slots at once: the same rows, settings and seeds. Their accuracies on the validation split are
compared. The multi-LoRA engine trains each once more with another seed: the spread that a difference is to be seen
against. What is trained is kept in the work folder, so that a run that was stopped goes on where it was.
"""

import argparse
import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

import agnews_lora
from agnews_lora.adapters.base_models import EMBEDDED, resolve
from agnews_lora.adapters.budget import require_within_budget
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.newswire import LABELS
from benchmarks.agreement_trials import (
    BUDGET,
    MULTILORA,
    OTHER,
    SEEDS,
    SETTINGS,
    SLOTS,
    TRAIN_ROWS,
    TRAINER,
    TRIALS,
    Course,
    Kept,
    build_engine,
    prepare_corpus,
)
from benchmarks.result_files import commit_of, slug, write

Right = npt.NDArray[np.bool_]


def two_sample_standard_error(first: float, second: float, num_rows: int) -> float:
    """Of the difference of two accuracies over `num_rows` rows each, as of independent samples (binomial)."""
    return math.sqrt((first * (1 - first) + second * (1 - second)) / num_rows)


def paired_standard_error(first: Right, second: Right) -> float:
    """Of the difference of two accuracies over the same rows, from the rows that only one of them has right.

    sqrt(n01 + n10 - (n01 - n10)^2 / n) / n: the standard error of the mean of the rows' differences (Fleiss, Levin,
    Paik 2003, section 13.1).
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    num_rows = len(first)
    return math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / num_rows) / num_rows


@dataclass(frozen=True)
class Pair:
    """Two trainings of one configuration.

    first, second: accuracies that the engines reported at the last step. first_right, second_right: [rows] what the
    exported adapters have right, loaded by plain PEFT, in fp32.
    """

    first: float
    second: float
    first_right: Right
    second_right: Right

    @property
    def difference(self) -> float:
        """Of the reported accuracies, second - first."""
        return self.second - self.first

    @property
    def standard_error(self) -> float:
        """Of `difference`, as of two samples."""
        return two_sample_standard_error(self.first, self.second, len(self.first_right))

    @property
    def agrees(self) -> bool:
        """Whether `difference` lies within two standard errors."""
        return abs(self.difference) <= 2 * self.standard_error

    @property
    def paired_difference(self) -> float:
        """Of the exported adapters' accuracies, second - first."""
        return float(self.second_right.mean() - self.first_right.mean())

    @property
    def paired_error(self) -> float:
        """Of `paired_difference`, from the same rows."""
        return paired_standard_error(self.first_right, self.second_right)

    @property
    def agrees_paired(self) -> bool:
        """Whether `paired_difference` lies within two standard errors."""
        return abs(self.paired_difference) <= 2 * self.paired_error


@dataclass(frozen=True)
class Comparison:
    """One configuration: both engines with one seed (trainer first), and multilora with two."""

    spec: TrialSpec
    engines: Pair
    seeds: Pair


def compare(kept: Kept, labels: npt.NDArray[np.int64]) -> list[Comparison]:
    """Every configuration. labels: [rows] of the validation split."""

    def pair(trial: str, first: str, second: str) -> Pair:
        trained = [kept.trials(engine)[trial] for engine in (first, second)]
        rights = [np.asarray(each["predicted"]) == labels for each in trained]
        return Pair(trained[0]["accuracy"], trained[1]["accuracy"], rights[0], rights[1])

    return [
        Comparison(spec, pair(trial, TRAINER, MULTILORA), pair(trial, MULTILORA, OTHER))
        for trial, spec in TRIALS.items()
    ]


def table(rows: Sequence[Comparison]) -> list[str]:
    """The Markdown table: one line a configuration."""
    heads = ["configuration", "trainer", "multilora", "difference", "2 SE", "within"]
    heads += ["paired difference", "2 SE", "within", "multilora, another seed"]
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- | ---: |"]
    for row in rows:
        pair = row.engines
        cells = (
            str(row.spec),
            f"{pair.first:.2%}",
            f"{pair.second:.2%}",
            f"{pair.difference * 100:+.2f}",
            f"{2 * pair.standard_error * 100:.2f}",
            "yes" if pair.agrees else "**no**",
            f"{pair.paired_difference * 100:+.2f}",
            f"{2 * pair.paired_error * 100:.2f}",
            "yes" if pair.agrees_paired else "**no**",
            f"{row.seeds.second:.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def over_all(rows: Sequence[Comparison]) -> list[str]:
    """The Markdown table of what holds over all configurations: between the engines, and between two seeds."""
    kinds = [[row.engines for row in rows], [row.seeds for row in rows]]
    differences = [np.asarray([pair.difference for pair in pairs]) for pairs in kinds]
    taus = [kendalltau([pair.first for pair in pairs], [pair.second for pair in pairs]).statistic for pairs in kinds]
    figures = {
        "within two standard errors": [f"{sum(p.agrees for p in pairs)} of {len(rows)}" for pairs in kinds],
        "within two, paired": [f"{sum(p.agrees_paired for p in pairs)} of {len(rows)}" for pairs in kinds],
        "Kendall's tau of the two rankings": [f"{tau:.3f}" for tau in taus],
        "difference, root mean square": [f"{np.sqrt(np.mean(each**2)) * 100:.2f}" for each in differences],
        "difference, mean": [f"{each.mean() * 100:+.2f}" for each in differences],
    }
    lines = [
        "| over all | multilora − trainer, same seed | multilora, another seed − multilora |",
        "| --- | ---: | ---: |",
    ]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in figures.items()]


def report(rows: Sequence[Comparison], tags: dict[str, str], commits: dict[str, str], bf16: bool) -> str:
    """The result file. tags: provenance. commits: {engine: what trained its trials}."""
    lines = [
        f"# Both engines on real AG News: MiniLM, {tags['device']}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.agreement --ag-news DIR --work DIR`. {os.cpu_count()} cores, Python "
        f"{tags['version.python']}, torch {tags['version.torch']}, transformers {tags['version.transformers']}, peft "
        f"{tags['version.peft']}. Commits: {'; '.join(f'{engine} {commit}' for engine, commit in commits.items())}.",
        "",
        f"{TRAIN_ROWS:,} training rows, {SETTINGS.epochs} epoch, batch {SETTINGS.batch_size}, at most "
        f"{SETTINGS.max_length} tokens, {'bf16' if bf16 else 'fp32'} (precision auto), accuracy on "
        f"{len(rows[0].engines.first_right):,} validation rows. Multilora has {SLOTS} slots: unlike trials share the "
        "base.",
        "",
        "Rows, their order, initial weights and schedule are the same in both; dropout masks and rounding differ. "
        "Differences are in points. `difference` is that of the accuracies that the engines reported, and its standard "
        "error the binomial one of two samples. `paired difference` is that of the exported adapters, loaded by plain "
        "PEFT in fp32, and its standard error comes from the rows that only one of the two has right. The last column "
        "is the yardstick: other initial weights, another order of rows.",
        "",
        *table(rows),
        "",
        *over_all(rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not trained yet, compare, print the report and write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ag-news", type=Path, required=True, help="folder with AG News' train.csv and test.csv")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is trained")
    arguments = parser.parse_args()
    agnews_lora.set_environment()  # before torch and transformers are imported
    base = resolve(EMBEDDED, num_labels=len(LABELS))
    for spec in TRIALS.values():
        require_within_budget(spec, base.shape, BUDGET)
    corpus = prepare_corpus(arguments.ag_news, base, arguments.work / "tokens")

    from agnews_lora.tracking.provenance import provenance
    from agnews_lora.training.device import computes_in_bf16, training_device

    tags = provenance()
    conditions = {
        "settings": asdict(SETTINGS),
        "trials": {trial: spec.as_dict() for trial, spec in TRIALS.items()},
        "seeds": SEEDS,
        "data": corpus.digest,
        "machine": [tags["device"], tags["version.torch"]],
    }
    kept = Kept(arguments.work, conditions, commit_of(tags))
    for engine in SEEDS:
        course = Course(engine, kept, base, corpus, arguments.work / engine.replace(" ", "-"))
        if course.left:
            build_engine(engine, base, corpus).run(course, course)
    if failed := [f"{trial} ({engine})" for engine in SEEDS for trial in kept.missing(engine)]:
        raise SystemExit(f"every trial must end, but these failed: {', '.join(failed)}")
    bf16 = computes_in_bf16(training_device(), SETTINGS.precision)
    commits = {engine: kept.commits(engine) for engine in SEEDS}
    text = report(compare(kept, corpus.validation.labels), tags, commits, bf16)
    write(f"agreement-minilm-{slug(tags['device'])}", text)


if __name__ == "__main__":
    main()
