"""What workers on one study cost a trial, and whether they keep what they promise: `python -m benchmarks.workers`.

Worker processes share a study, on SQLite and on PostgreSQL, with an engine that trains nothing, so that what is left is
what the search itself takes: claiming, reporting, pruning, telling, and the journal. Each crew must end exactly as many
trials as were asked for, each trained by one worker, without a word on standard error; the table says where the time
went. Where PostgreSQL is not installed, its columns are left out, and the result file says why.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from agnews_lora.tracking.provenance import provenance
from benchmarks.worker_process import SEED, Job
from benchmarks.workers_crew import Crew
from tests.search.scripted import EVAL_EVERY, LOG_EVERY, TOTAL_STEPS
from tests.servers import Postgres, postgres_missing

RESULTS = Path(__file__).resolve().parent / "results"
TPE_AFTER = 10  # trials, as Optuna's default has it
ENGINE, WAITING = "the engine itself", "waiting for the other workers' last trials"
LIMIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Variant:
    """A crew that is measured. runs: MLflow's, in SQLite; without, the tracker keeps nothing."""

    database: str
    workers: int
    trials: int
    random: bool = False
    runs: bool = False

    @property
    def label(self) -> str:
        sampler = "random" if self.random else "TPE"
        return f"{self.database}, {self.workers} × {sampler}{', with runs' if self.runs else ''}"


@dataclass(frozen=True)
class Measured:
    """wall_seconds: from the first claim to the last worker's end. seconds: of all workers, by what they went to."""

    wall_seconds: float
    seconds: Counter[str]
    shares: list[int]


def variants(trials: int) -> list[Variant]:
    """All that is measured. trials: of a crew of four with TPE; the others are there to compare, with fewer."""
    return [
        *(
            variant
            for database in ("SQLite", "PostgreSQL")
            for variant in (
                Variant(database, 1, trials // 10),
                Variant(database, 4, trials),
                Variant(database, 4, trials // 5, random=True),
            )
        ),
        Variant("SQLite", 1, 60, runs=True),
        Variant("SQLite", 4, 60, runs=True),
    ]


@contextmanager
def database(name: str, folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """URL of an empty database, and the environment that its users need."""
    if name == "SQLite":
        yield f"sqlite:///{folder / 'optuna.db'}", {}
        return
    with Postgres(folder) as server:
        os.environ |= server.environment
        yield server.url, server.environment


def measure(variant: Variant) -> Measured:
    """Run a crew, once. Raises SystemExit where anything does not hold that must."""
    with tempfile.TemporaryDirectory() as name, database(variant.database, Path(name)) as (url, environment):
        folder = Path(name)
        job = Job(
            name="workers",
            storage=url,
            folder=str(folder / "crew"),
            runs=str(folder / "runs") if variant.runs else None,
            startup_trials=variant.trials + 1 if variant.random else TPE_AFTER,
        )
        with Crew(job, variant.workers, variant.trials, environment) as crew:
            crew.begin()
            began = time.monotonic()
            crew.finish(LIMIT_SECONDS)
            wall_seconds = time.monotonic() - began
            if faults := crew.faults():
                raise SystemExit("\n".join([f"{variant.label}:", *faults]))
            seconds: Counter[str] = Counter()
            for number in range(variant.workers):
                seconds.update(json.loads(job.spent(number).read_text(encoding="utf-8")))
            return Measured(wall_seconds, seconds, [len(crew.started(number)) for number in range(variant.workers)])


def table(measured: Mapping[Variant, Measured]) -> str:
    """The Markdown table: a column a variant, milliseconds a trial by what they went to."""
    parts = Counter[str]()
    for each in measured.values():
        parts.update(each.seconds)
    names = [name for name, _ in parts.most_common() if name not in (ENGINE, WAITING)]

    def cells(value: str, what: str) -> str:
        return f"| {what} | {value} |"

    def row(what: str, numbers: list[float]) -> str:
        return cells(" | ".join(f"{number:,.0f}" for number in numbers), what)

    def milliseconds(name: str) -> list[float]:
        return [1000 * each.seconds[name] / variant.trials for variant, each in measured.items()]

    walls = [1000 * each.wall_seconds * variant.workers / variant.trials for variant, each in measured.items()]
    idle = [engine + waiting for engine, waiting in zip(milliseconds(ENGINE), milliseconds(WAITING), strict=True)]
    overhead = [wall - apart for wall, apart in zip(walls, idle, strict=True)]
    return "\n".join(
        [
            cells(" | ".join(variant.label for variant in measured), "ms a trial"),
            f"| --- |{' ---: |' * len(measured)}",
            row("trials", [variant.trials for variant in measured]),
            row("wall time of the crew, s", [each.wall_seconds for each in measured.values()]),
            row("trials a minute", [60 * v.trials / each.wall_seconds for v, each in measured.items()]),
            cells(" | ".join(", ".join(map(str, each.shares)) for each in measured.values()), "trials by worker"),
            row("wall time × workers", walls),
            row(f"of it {ENGINE}: its checkpoints", milliseconds(ENGINE)),
            row(f"of it {WAITING}", milliseconds(WAITING)),
            row("**overhead**: the rest", overhead),
            *(row(f"— {name}", milliseconds(name)) for name in names),
            row("— else", [o - sum(p) for o, *p in zip(overhead, *map(milliseconds, names), strict=True)]),
        ]
    )


def report(measured: Mapping[Variant, Measured], missing: str | None, load: float) -> str:
    """The result file. missing: why PostgreSQL was not measured. load: the machine's average, before."""
    tags = provenance()
    without = f" PostgreSQL was not measured: {missing}." if missing else ""
    dirty = " (dirty)" if tags.get("git.dirty") == "true" else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("optuna", "mlflow", "SQLAlchemy", "psycopg"))
    sampling = [
        (variant, 1000 * each.seconds["claim: sampling"] / variant.trials)
        for variant, each in measured.items()
        if variant.workers == 4 and not variant.runs
    ]
    sampler = ", ".join(f"{milliseconds:.0f} ms ({variant.label})" for variant, milliseconds in sampling)
    return f"""\
# `python -m benchmarks.workers`: many workers on one study, {tags["device"]}, {datetime.date.today()}

Commit {tags.get("mlflow.source.git.commit", "unknown")[:12]}{dirty}, {os.cpu_count()} cores, Python \
{platform.python_version()}, {versions}.
One crew after the other, each on an empty database; the machine's load average was {load:.1f} at the start.{without}

**What held**, in every column: exactly as many trials ended as were asked for, numbered from 0 without a gap; none was
left running or waiting; each was trained by exactly one worker and reported what its script says; no lease and no work
folder was left; every process ended with status 0 and nothing on standard error.

The engine trains nothing: a trial is {TOTAL_STEPS} steps with {TOTAL_STEPS // LOG_EVERY} training points and \
{TOTAL_STEPS // EVAL_EVERY} evaluations with checkpoints,
pruned by the median of peers. So all workers want to claim and report at the same time, which a sweep that trains never
does. Milliseconds a trial, of one worker. SQLite waits for the disk as it does by default; PostgreSQL runs on the same
machine with `fsync` off. Without runs, the tracker keeps nothing. TPE samples from trial {TPE_AFTER} on (seed {SEED}).

{table(measured)}

Sampling alone, most of it while the others wait for their turn: {sampler}.
"""


def main() -> None:
    """Measure every variant and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description="Measure workers on one study.")
    parser.add_argument("--trials", type=int, default=1000, help="of a crew of four")
    trials, missing, load = parser.parse_args().trials, postgres_missing(), os.getloadavg()[0]
    measured = {}
    for variant in variants(trials):
        if variant.database == "SQLite" or missing is None:
            measured[variant] = measure(variant)
            print(f"{variant.label}: {measured[variant].wall_seconds:.0f} s", flush=True)
    text = report(measured, missing, load)
    hardware = "-".join(provenance()["device"].lower().replace(",", "").replace("(r)", "").split())
    (RESULTS / f"workers-{hardware}-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
