"""Kills sweeps again and again, and judges what they left: `make chaos`.

Three parts, in folders of their own and with little data, so that a kill comes every few seconds of training: two
workers on this machine; workers on a Ray cluster whose nodes join late and are lost; one worker, compared to the bit
with a sweep that was left alone and trained in its own process. Writes what was killed when, and what was found, to
`results/`. Where something does not hold it says so, writes nothing, and ends with exit code 1.
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
from typing import Final

from transformers.utils.logging import set_verbosity_error

import agnews_lora
from agnews_lora.tracking.provenance import provenance
from benchmarks.chaos.judgement import Judgement, Stores, judge
from benchmarks.chaos.killing import Chaos, Kill, draw
from benchmarks.chaos.nodes import Nodes
from benchmarks.result_files import commit_of, slug, write
from tests.project import write_project

SEED: Final = 13
EXPERIMENT: Final = {
    "data.rows": 2_000,
    "data.train_rows": 960,
    "training.eval_every": 4,
    "training.eval_rows": 64,
    "training.log_every": 2,
    "training.precision": "fp32",
}
SWEEP: Final = {"trials": 12, "space.learning_rate": {"low": 5e-4, "high": 1e-2}}


@dataclass
class Part:
    """One killed sweep, and what was found."""

    title: str
    chaos: Chaos
    stores: Stores
    judgement: Judgement
    seconds: float


def main() -> int:
    """Run all parts, print and write what was found; return the exit code."""
    agnews_lora.set_environment()
    set_verbosity_error()  # transformers reports each base that it loads
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="an empty folder for the sweeps, which are then kept")
    options = parser.parse_args()
    began, load = time.monotonic(), os.getloadavg()[0]
    with nullcontext(options.work) if options.work else TemporaryDirectory() as work:
        parts = [part(Path(work)) for part in (two_workers, cluster, one_worker)]
    faults = [fault for part in parts for fault in part.judgement.faults]
    text = report(parts, time.monotonic() - began, load)
    if faults:
        print("\n".join([text, "What does not hold:", *faults]), file=sys.stderr)
        return 1
    write(f"chaos-minilm-{slug(provenance()['device'])}", text)
    return 0


def two_workers(work: Path) -> Part:
    """Two workers on this machine."""
    chaos = Chaos(write_project(work / "two-workers", EXPERIMENT, SWEEP), "small", "--workers", "2", seed=SEED)
    return killed("Two workers on this machine", chaos, draw(SEED, 9, ("tree", "driver", "worker")))


def cluster(work: Path) -> Part:
    """Two nodes of a cluster, both of which join after the sweep has started."""
    kills = draw(SEED + 1, 4, ("node", "worker", "driver"))
    kills += [Kill("suspended worker", "training", 0.5), Kill("Ctrl-C", "training", 0.5)]
    with Nodes(work / "nodes") as nodes:
        folder = write_project(work / "cluster", EXPERIMENT, SWEEP)
        chaos = Chaos(folder, "small", "--address", nodes.address, nodes=nodes, seed=SEED)
        return killed("Two nodes of a Ray cluster", chaos, kills)


def one_worker(work: Path) -> Part:
    """One trial at a time in fp32: with one worker and killed, and undisturbed without a worker."""
    folders = [write_project(work / name, EXPERIMENT, SWEEP | {"slots": 1}) for name in ("one-worker", "undisturbed")]
    chaos = Chaos(folders[0], "small", "--workers", "1", seed=SEED)
    part = killed("One worker, one trial at a time, fp32", chaos, draw(SEED + 2, 5, ("tree", "driver", "worker")))
    undisturbed = Chaos(folders[1], "small")
    code = undisturbed.run([])
    other = Stores.of(folders[1], "small")
    part.judgement.faults += judge(other, undisturbed, code).faults
    found = "configurations, ends and all metric points are equal to the bit"
    part.judgement.note("against an undisturbed sweep without a worker", found, differences(other, part.stores))
    return part


def differences(undisturbed: Stores, killed: Stores) -> list[str]:
    """A line for each thing that is not equal to the bit."""
    first, second = undisturbed.comparable(), killed.comparable()
    return [
        f"{what} is {first.get(what)} undisturbed, {second.get(what)} killed"
        for what in first.keys() | second.keys()
        if first.get(what) != second.get(what)
    ]


def killed(title: str, chaos: Chaos, kills: list[Kill]) -> Part:
    """Run a sweep, make the kills, and judge what it left."""
    print(f"{title}: {len(kills)} kills ...", flush=True)
    began = time.monotonic()
    code = chaos.run(kills)
    stores = Stores.of(chaos.folder, "small")
    return Part(title, chaos, stores, judge(stores, chaos, code), time.monotonic() - began)


def report(parts: list[Part], seconds: float, load: float) -> str:
    """The result file."""
    tags = provenance()
    settings = ", ".join(f"{key} {value}" for key, value in (EXPERIMENT | SWEEP).items())
    return "\n".join(
        [
            f"# `make chaos`: a sweep killed {sum(len(part.chaos.kills) for part in parts)} times, "
            f"{tags['device']}, {datetime.date.today()}",
            "",
            f"`python -m benchmarks.chaos`, {seconds / 60:.0f} min. Commit {commit_of(tags)}, "
            f"{os.cpu_count()} cores with a load of {load:.1f} at the start, Python {platform.python_version()}, torch "
            f"{version('torch')}, optuna {version('optuna')}, mlflow {version('mlflow')}, ray {version('ray')}. "
            f"Seed {SEED}.",
            "",
            f"MiniLM on the generated news corpus ({settings}), engine {parts[0].stores.sweep.engine}. A kill is "
            "SIGKILL, but for those named otherwise, and has new progress behind it. Every start is the same command, "
            "and nothing is cleaned up between two. `new progress` is the time to a logged loss, a checkpoint, an "
            "evaluation or an end that had not been there.",
            *(line for part in parts for line in section(part)),
            "",
        ]
    )


def section(part: Part) -> list[str]:
    """A part's tables."""

    def shown(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.1f} s"

    return [
        "",
        f"## {part.title}",
        "",
        f"`agnews-lora {' '.join(part.chaos.command)}`: {len(part.chaos.kills)} kills, "
        f"{len(part.chaos.outputs)} starts, {part.seconds / 60:.1f} min.",
        "",
        "| kill | victim | moment | reached | trials ended | new progress | orphans gone |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: |",
        *(
            f"| {number} | {kill.victim} | {kill.moment} | {kill.reached} | {len(kill.ended)} | "
            f"{shown(kill.progress_seconds)} | {shown(kill.orphans_seconds)} |"
            for number, kill in enumerate(part.chaos.kills, 1)
        ),
        "",
        "| what | found |",
        "| --- | --- |",
        *(f"| {what} | {found} |" for what, found in part.judgement.found.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
