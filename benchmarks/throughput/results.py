"""The measured values, passed between processes, and the result file made from them."""

import datetime
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

from benchmarks.result_files import slug

BUSY = 0.05  # share of the cores
NUM_SPECS = 4  # different configurations that every peer trains in the same proportions

COLUMNS = (
    "peer",
    "samples/s",
    "least to most",
    "ratio",
    "CPU ms a sample",
    "CPU ratio",
    "real tokens/s",
    "share of bf16 rate",
    "peak memory",
    "s a trial",
    "start-up s",
    "computed by",
)
ROUND_COLUMNS = (
    "round",
    "peer",
    "rows",
    "real tokens",
    "training s",
    "CPU s",
    "product before, TFLOP/s",
    "product after, TFLOP/s",
    "trials",
    "wall s",
    "peak bytes",
    "start-up s",
)


@dataclass(frozen=True)
class Peer:
    """A way to train. slots: trials at once (1 for the Trainer). bf16: asked of the Trainer; the engine chooses.

    kind: `compiled` is the Trainer with its encoder layers compiled. checkout: of the engine, where it is another one.
    commit: of that checkout.
    """

    kind: Literal["trainer", "compiled", "multilora"]
    slots: int = 1
    bf16: bool = False
    checkout: str = ""
    commit: str = ""

    def __str__(self) -> str:
        if self.kind == "multilora":
            return f"multilora{f' at {self.commit}' if self.checkout else ''}, K = {self.slots}"
        return f"Trainer + PEFT, {'bf16' if self.bf16 else 'fp32'}{', compiled' if self.kind == 'compiled' else ''}"

    @property
    def num_trials(self) -> int:
        """Trials of a round: all specifications equally often, and full slots throughout."""
        return lcm(self.slots, NUM_SPECS)


@dataclass(frozen=True)
class Environment:
    """The machine and the model.

    matrix_parameters: of the encoder layers' matrices. lengths: column of the histogram of row lengths.
    """

    model: str
    matrix_parameters: int
    lengths: str
    device_type: str
    device: str
    bf16: bool
    python: str
    torch: str
    transformers: str
    peft: str


@dataclass(frozen=True)
class Task:
    """One peer in one round.

    folder: holds the model's files. steps: of a trial. warmup_steps: the first of them, left out of the training time.
    started: Unix time at which the process was started.
    """

    peer: Peer
    environment: Environment
    folder: str
    batch_size: int
    eval_batch_size: int
    steps: int
    warmup_steps: int
    eval_rows: int
    started: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """A process's measurement of one peer.

    rows, tokens: trained after the warm-up steps, over all trials; tokens without padding. train_seconds, cpu_seconds:
    wall and CPU time of those steps, without evaluations and without other peers' turns. computed_by: the layers, and
    what failed to compute them. product_before, product_after: bf16 matrix products in FLOP/s. wall_seconds: of
    all trials, from building the first to the export of the last. start_up_seconds: from the start of the process to
    the first measured trial.
    """

    rows: int
    tokens: int
    train_seconds: float
    cpu_seconds: float
    product_before: float
    product_after: float
    num_trials: int
    wall_seconds: float
    peak_memory_bytes: int
    start_up_seconds: float
    computed_by: str

    @property
    def samples_per_second(self) -> float:
        """Training rows a second, over all trials."""
        return self.rows / self.train_seconds

    def share_of_rate(self, matrix_parameters: int) -> float:
        """Compute 4·P·real tokens / time, over the measured bf16 product.

        A frozen matrix costs a token 2·P floating-point operations forward and 2·P backward: no weight gradient.
        """
        product = (self.product_before + self.product_after) / 2
        return 4 * matrix_parameters * self.tokens / self.train_seconds / product


class Load:
    """What others did to the machine: the load average before, and their share of the cores while peers ran."""

    def __init__(self) -> None:
        self.average = os.getloadavg()[0]
        self.others = self.cores = 0.0  # s of the cores
        self.began = (0.0, 0.0)

    def start(self) -> None:
        """Begin to count, before processes of the peers start."""
        self.began = (time.perf_counter(), _busy_seconds() - sum(os.times()[:4]))

    def stop(self) -> None:
        """Count what has passed, after the peers' processes have ended."""
        seconds, others = time.perf_counter() - self.began[0], _busy_seconds() - sum(os.times()[:4]) - self.began[1]
        cores = seconds * (os.cpu_count() or 1)
        self.cores += cores
        self.others += min(max(0.0, others), cores)  # counted in ticks

    def __str__(self) -> str:
        share = self.others / self.cores if self.cores else 0.0
        found = f"load average {self.average:.2f} before; others used {share:.1%} of the cores while it ran."
        if share > BUSY:
            return f"**A busy machine: {found}** Its wall-clock figures prove nothing; CPU time says more."
        return f"A quiet machine: {found}"


def _busy_seconds() -> float:
    """Read the CPU time of all processes since the start of the machine; 0 where Linux does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:  # noqa: PTH123
            user, nice, system, _, _, irq, soft_irq, stolen = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """All measurements of one command.

    command: with every value, to run it again. commit: its start of a line. measured: each peer's rounds so far, with
    the reason where one failed.
    """

    command: str
    commit: str
    date: datetime.date
    environment: Environment
    batch_size: int
    steps: int
    warmup_steps: int
    eval_rows: int
    measured: dict[Peer, list[Measurement | str]]
    load: Load


def file_name(run: Run) -> str:
    """Name the result file by model, hardware and date."""
    return f"throughput-{run.environment.model}-{slug(run.environment.device)}-{run.date}.md"


def page(run: Run) -> str:
    """Write the result file's text."""
    of = run.environment
    memory = "of the device" if of.device_type == "cuda" else "of the process"
    return f"""# `benchmarks.throughput`: {of.model}, {of.device}, {run.date}

Command: `{run.command}`

{f"Commit {run.commit}, " if run.commit else ""}{os.cpu_count()} cores, Python {of.python}, torch {of.torch}, \
transformers {of.transformers}, peft {of.peft}. multilora computes in {"bf16" if of.bf16 else "fp32"}. {run.load}

Random weights of the shape of {of.model}, random token ids, lengths of newswire. A trial: \
{run.steps * run.batch_size:,} training rows in {run.steps} steps of {run.batch_size}, {run.eval_rows:,} validation \
rows, one export. Each peer trains the same mixture of trials, the Trainer one after another, in a process of its own, \
{"one peer after another" if of.device_type == "cuda" else "the peers in turn, step by step"}; medians over the rounds \
(number: {max(map(len, run.measured.values()))}).

{_table(COLUMNS, [_figures(run, peer) for peer in run.measured])}

- samples/s, real tokens/s: over all trials, training alone; padding is not counted, nor are the first steps of each \
trial (number: {run.warmup_steps}).
- ratio, CPU ratio: to the first row, round by round, by samples/s and by CPU time of the process, whose threads sleep \
while they wait (`OMP_WAIT_POLICY=passive`).
- share of bf16 rate: 4·P·real tokens / time, P = {of.matrix_parameters:,}, over the rate of a bf16 matrix product, \
measured in the same process before and after the trials.
- peak memory: {memory}.
- s a trial: wall time of all trials, from building the first to the export of the last, over their number.
- computed by: the encoder's layers; what failed stands there, and where a peer failed altogether, the reason.
- start-up s: from the start of the process to the first trial that is measured; imports, reading the base, and short \
trials for what is compiled once.

## Rounds

{_table(ROUND_COLUMNS, _measured(run))}
"""


def _figures(run: Run, peer: Peer) -> list[str]:
    """Fill the table's row of a peer: without figures, if every round of it failed."""
    first = next(iter(run.measured.values()))
    pairs = [(own, base) for own, base in zip(run.measured[peer], first, strict=False) if isinstance(own, Measurement)]
    if not pairs:
        failed = run.measured[peer][-1] if run.measured[peer] else "not measured yet"
        return [str(peer), *["–"] * (len(COLUMNS) - 2), f"**{failed}**"]
    own = [measured for measured, _ in pairs]
    both = [(measured, base) for measured, base in pairs if isinstance(base, Measurement)]

    def median(figure: Callable[[Measurement], float]) -> float:
        return statistics.median(map(figure, own))

    def ratio(figure: Callable[[Measurement], float]) -> str:
        return f"{statistics.median(figure(one) / figure(base) for one, base in both):.2f}" if both else "–"

    speeds = [measured.samples_per_second for measured in own]
    return [
        str(peer),
        f"{statistics.median(speeds):,.1f}",
        f"{min(speeds):,.1f} to {max(speeds):,.1f}",
        ratio(lambda measured: measured.samples_per_second),
        f"{median(lambda measured: 1e3 * measured.cpu_seconds / measured.rows):.2f}",
        ratio(lambda measured: measured.rows / measured.cpu_seconds),
        f"{median(lambda measured: measured.tokens / measured.train_seconds):,.0f}",
        f"{median(lambda measured: measured.share_of_rate(run.environment.matrix_parameters)):.2%}",
        f"{median(lambda measured: measured.peak_memory_bytes) / 1e9:.2f} GB",
        f"{median(lambda measured: measured.wall_seconds / measured.num_trials):.2f}",
        f"{median(lambda measured: measured.start_up_seconds):.1f}",
        "; ".join(sorted({measured.computed_by for measured in own})),
    ]


def _measured(run: Run) -> list[list[str]]:
    return [
        [
            str(number),
            str(peer),
            str(measured.rows),
            str(measured.tokens),
            f"{measured.train_seconds:.6f}",
            f"{measured.cpu_seconds:.6f}",
            f"{measured.product_before / 1e12:.5f}",
            f"{measured.product_after / 1e12:.5f}",
            str(measured.num_trials),
            f"{measured.wall_seconds:.3f}",
            str(measured.peak_memory_bytes),
            f"{measured.start_up_seconds:.1f}",
        ]
        if isinstance(measured, Measurement)
        else [str(number), str(peer), *["–"] * (len(ROUND_COLUMNS) - 2)]
        for peer, rounds in run.measured.items()
        for number, measured in enumerate(rounds, start=1)
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table: texts left-aligned, figures right-aligned."""
    rule = ["---" if column in ("peer", "computed by") else "---:" for column in columns]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *escaped))
