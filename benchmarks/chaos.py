"""Whether anything is lost or done twice when the embedded sweep is killed (-9) again and again: `make chaos`.

Three parts, in folders of their own and with less data than the shipped sweep, so that a kill comes every few seconds
of training: two workers; one trial at a time, compared with a sweep that was left alone; several trials at once, each
compared with itself trained alone. Writes what was killed when, and what was found, to `results/`. Where something does
not hold it says so, writes nothing, and ends with exit code 1.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from ruamel.yaml import YAML
from transformers.utils.logging import set_verbosity_error

from agnews_lora.cli import ENVIRONMENT
from agnews_lora.tracking.provenance import provenance
from benchmarks.chaos_blows import Blow, draw
from benchmarks.chaos_harness import Chaos
from benchmarks.chaos_judgement import Judgement, Stores, judge, told
from benchmarks.chaos_sameness import FIRST_LOSSES, SAME, SAME_ALONE, differences, gaps_alone, largest_gap

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
SWEEP: Final = "embedded"
SEED: Final = 13
TRIALS: Final = 12
# What differs from the shipped files.
EXPERIMENT: Final[dict[str, dict[str, Any]]] = {
    "data": {"rows": 2_000, "train_rows": 960, "test_rows": 200},
    "training": {"max_length": 48, "eval_every": 4, "eval_rows": 64, "log_every": 2},
}
ONE_BY_ONE: Final = {"training": {"precision": "fp32"}}
AT_ONCE: Final = {"training": {"precision": "fp32", "log_every": 1}}


@dataclass
class Part:
    """One killed sweep, and what was found."""

    title: str
    chaos: Chaos
    stores: Stores
    judgement: Judgement
    seconds: float = 0.0


def main() -> int:
    """Run all parts, print and write what was found; the exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_verbosity_error()  # transformers reports each base that it loads
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="an empty folder for the sweeps, which are then kept")
    options = parser.parse_args()
    began = time.monotonic()
    with nullcontext(options.work) if options.work else TemporaryDirectory() as work:
        parts = [part(Path(work)) for part in (two_workers, one_by_one, at_once)]
    faults = [fault for part in parts for fault in part.judgement.faults]
    text = report(parts, time.monotonic() - began)
    print(text)
    if faults:
        print("\n".join(["What does not hold:", *faults]), file=sys.stderr)
        return 1
    device = provenance()["device"].lower().replace(",", "").replace("(r)", "")
    name = f"chaos-minilm-{'-'.join(device.split())}-{datetime.date.today()}.md"
    (RESULTS / name).write_text(text, encoding="utf-8")
    return 0


def two_workers(work: Path) -> Part:
    """The sweep with two workers, killed 20 times."""
    project(work / "two-workers", {}, {})
    return killed("Two workers", work / "two-workers", 2, draw(SEED, 20))


def one_by_one(work: Path) -> Part:
    """One trial at a time in fp32, killed and undisturbed."""
    for name in ("killed", "undisturbed"):
        project(work / name, ONE_BY_ONE, {"slots": 1})
    part = killed("One trial at a time, fp32", work / "killed", 1, draw(SEED, 8, ("tree",), TRIALS))
    undisturbed = Chaos(work / "undisturbed", SWEEP, 1)
    code = undisturbed.run([])
    other = Stores.of(work / "undisturbed", SWEEP)
    part.judgement.faults += judge(other, undisturbed, code).faults
    gap = largest_gap(other, part.stores)
    found = f"configurations, ends and steps are the same; all metric points within {gap:.1e} (limit {SAME:.0e})"
    part.judgement.note("against an undisturbed sweep", found, differences(other, part.stores))
    return part


def at_once(work: Path) -> Part:
    """Four trials at once in each of two workers, killed, and every trial alone."""
    project(work / "at-once", AT_ONCE, {"slots": 4})
    part = killed("Two workers with four trials at once each, fp32", work / "at-once", 2, draw(SEED, 6))
    gaps = gaps_alone(part.stores, work / "alone")
    compared = {count for count, _ in gaps.values()}
    largest = max(gap for _, gap in gaps.values())
    part.judgement.note(
        f"first {FIRST_LOSSES} losses against each trial alone",
        f"{len(gaps)} trials, all within {largest:.1e} (limit {SAME_ALONE:.0e})",
        [f"only {min(compared)} losses to compare"] * (min(compared) < FIRST_LOSSES)
        + [f"{trial} differs by {gap:.1e}" for trial, (_, gap) in gaps.items() if gap > SAME_ALONE],
    )
    return part


def project(folder: Path, experiment: dict[str, dict[str, Any]], sweep: dict[str, Any]) -> None:
    """Write the shipped experiment and sweep into a project's folder, with some keys set."""
    yaml = YAML()
    for kind, changes in (
        ("experiments", [EXPERIMENT, experiment]),
        ("sweeps", [{"trials": TRIALS, "confirmation": None}, sweep]),
    ):
        document = yaml.load(ROOT / kind / f"{SWEEP}.yaml")
        for change in changes:
            for key, value in change.items():
                document[key] = {**document[key], **value} if isinstance(value, dict) else value
        (folder / kind).mkdir(parents=True)
        yaml.dump(document, folder / kind / f"{SWEEP}.yaml")


def killed(title: str, folder: Path, workers: int, blows: list[Blow]) -> Part:
    """Run a project's sweep, strike it, and judge what it left."""
    print(f"{title}: {len(blows)} kills ...", flush=True)
    began = time.monotonic()
    chaos = Chaos(folder, SWEEP, workers, SEED)
    code = chaos.run(blows)
    stores = Stores.of(folder, SWEEP)
    return Part(title, chaos, stores, judge(stores, chaos, code), time.monotonic() - began)


def report(parts: list[Part], seconds: float) -> str:
    """The result file."""
    tags = provenance()
    return "\n".join(
        [
            f"# `make chaos`: sweep {SWEEP} killed again and again, {tags['device']}, {datetime.date.today()}",
            "",
            f"`python -m benchmarks.chaos`, {seconds / 60:.0f} min. Commit "
            f"{tags.get('mlflow.source.git.commit', 'unknown')[:12]}"
            f"{' (dirty)' if tags.get('git.dirty') == 'true' else ''}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, torch {version('torch')}, optuna {version('optuna')}, mlflow "
            f"{version('mlflow')}. Seed {SEED}.",
            "",
            f"The shipped sweep of {TRIALS} trials with less data ({differing()}), engine "
            f"{parts[0].stores.sweep.engine}. Every kill is SIGKILL and has new progress behind it, every start is the "
            "same command, and nothing is cleaned up between two. A start that is hit as it begins comes after "
            "SIGTERM, or after one more SIGKILL of the tree, which has no number of its own. `new progress` is the "
            "time to a logged loss, a checkpoint, an evaluation or an end that had not been there.",
            *(line for part in parts for line in section(part)),
            "",
        ]
    )


def differing() -> str:
    """The keys that are set for all parts."""
    return ", ".join(f"{key} {value:,}" for block in EXPERIMENT.values() for key, value in block.items())


def section(part: Part) -> list[str]:
    """A part's tables."""
    rows = [
        f"| {number} | {kill.blow.victim} | {kill.blow.moment} | {kill.reached}{told(part.stores, kill)} | "
        f"{sum(what == 'end' for _, what in kill.marks)} | "
        f"{'' if kill.progress_seconds is None else f'{kill.progress_seconds:.1f} s'} | "
        f"{'' if kill.orphans_seconds is None else f'{kill.orphans_seconds:.1f} s'} |"
        for number, kill in enumerate(part.chaos.kills, 1)
    ]
    return [
        "",
        f"## {part.title}",
        "",
        f"`{' '.join(['agnews-lora', *part.chaos.command[3:]])}`: {len(part.chaos.kills)} kills, "
        f"{len(part.chaos.starts)} starts, {part.seconds / 60:.1f} min.",
        "",
        "| kill | victim | moment | reached | trials ended | new progress | orphans gone |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: |",
        *rows,
        "",
        "| what | found |",
        "| --- | --- |",
        *(f"| {what} | {found} |" for what, found in part.judgement.found.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
