"""The measured values, passed between processes as JSON, and the result file made from them."""

import datetime
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

NUM_SPECS = 4  # different configurations that every peer trains in the same proportions

COLUMNS = (
    "peer",
    "samples/s",
    "least to most",
    "ratio",
    "real tokens/s",
    "share of bf16 rate",
    "peak memory",
    "s a trial",
    "start-up s",
)
ROUND_COLUMNS = (
    "round",
    "peer",
    "rows",
    "real tokens",
    "training s",
    "product before, TFLOP/s",
    "product after, TFLOP/s",
    "trials",
    "wall s",
    "peak bytes",
    "start-up s",
)


@dataclass(frozen=True)
class Peer:
    """A way to train. slots: trials at once (1 for the Trainer). bf16: asked of the Trainer; the engine chooses."""

    kind: Literal["trainer", "multilora"]
    slots: int = 1
    bf16: bool = False

    def __str__(self) -> str:
        if self.kind == "trainer":
            return f"Trainer + PEFT, {'bf16' if self.bf16 else 'fp32'}"
        return f"multilora, K = {self.slots}"

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
    started: float


@dataclass(frozen=True)
class Measurement:
    """A process's measurement of one peer.

    rows, tokens: trained after the warm-up steps, over all trials; tokens without padding. train_seconds: time of
    those steps, without evaluations. product_before, product_after: bf16 matrix products in FLOP/s. wall_seconds: of
    all trials, from building the first to the export of the last. start_up_seconds: from the start of the process to
    the first measured trial.
    """

    rows: int
    tokens: int
    train_seconds: float
    product_before: float
    product_after: float
    num_trials: int
    wall_seconds: float
    peak_memory_bytes: int
    start_up_seconds: float

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


@dataclass(frozen=True)
class Run:
    """All measurements of one command.

    command: with every value, to run it again. commit: its start of a line. rounds: a measurement of each peer.
    """

    command: str
    commit: str
    date: datetime.date
    environment: Environment
    batch_size: int
    steps: int
    warmup_steps: int
    eval_rows: int
    peers: tuple[Peer, ...]
    rounds: tuple[tuple[Measurement, ...], ...]


def file_name(run: Run) -> str:
    """Name the result file by model, hardware and date."""
    device = "-".join(run.environment.device.lower().replace(",", "").replace("(r)", "").split())
    return f"throughput-{run.environment.model}-{device}-{run.date}.md"


def page(run: Run) -> str:
    """Write the result file's text."""
    of = run.environment
    memory = "of the device" if of.device_type == "cuda" else "of the process"
    return f"""# `benchmarks.throughput`: {of.model}, {of.device}, {run.date}

Command: `{run.command}`

{run.commit}{os.cpu_count()} cores, Python {of.python}, torch {of.torch}, transformers \
{of.transformers}, peft {of.peft}. multilora computes in {"bf16" if of.bf16 else "fp32"}.

Random weights of the shape of {of.model}, random token ids, lengths of newswire. A trial: \
{run.steps * run.batch_size:,} training rows in {run.steps} steps of {run.batch_size}, {run.eval_rows:,} validation \
rows, one export. Each peer trains the same mixture of trials, the Trainer one after another, in a process of its own, \
peers in turn; medians over the rounds (number: {len(run.rounds)}).

{_table(COLUMNS, [_figures(run, number) for number in range(len(run.peers))])}

- samples/s, real tokens/s: over all trials, training alone; padding is not counted, nor are the first steps of each \
trial (number: {run.warmup_steps}).
- ratio: of samples/s to the first row's, round by round.
- share of bf16 rate: 4·P·real tokens / time, P = {of.matrix_parameters:,}, over the rate of a bf16 matrix product, \
measured in the same process before and after the trials.
- peak memory: {memory}.
- s a trial: wall time of all trials, from building the first to the export of the last, over their number.
- start-up s: from the start of the process to the first trial that is measured; imports, reading the base, and short \
trials for what is compiled once.

## Rounds

{_table(ROUND_COLUMNS, _measured(run))}
"""


def _figures(run: Run, number: int) -> list[str]:
    """Fill the table's row of a peer."""
    own = [measured[number] for measured in run.rounds]
    ratios = [measured[number].samples_per_second / measured[0].samples_per_second for measured in run.rounds]

    def median(figure: Callable[[Measurement], float]) -> float:
        return statistics.median(map(figure, own))

    speeds = [measured.samples_per_second for measured in own]
    return [
        str(run.peers[number]),
        f"{statistics.median(speeds):,.1f}",
        f"{min(speeds):,.1f} to {max(speeds):,.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{median(lambda measured: measured.tokens / measured.train_seconds):,.0f}",
        f"{median(lambda measured: measured.share_of_rate(run.environment.matrix_parameters)):.2%}",
        f"{median(lambda measured: measured.peak_memory_bytes) / 1e9:.2f} GB",
        f"{median(lambda measured: measured.wall_seconds / measured.num_trials):.2f}",
        f"{median(lambda measured: measured.start_up_seconds):.1f}",
    ]


def _measured(run: Run) -> list[list[str]]:
    return [
        [
            str(number),
            str(peer),
            str(measured.rows),
            str(measured.tokens),
            f"{measured.train_seconds:.4f}",
            f"{measured.product_before / 1e12:.5f}",
            f"{measured.product_after / 1e12:.5f}",
            str(measured.num_trials),
            f"{measured.wall_seconds:.3f}",
            str(measured.peak_memory_bytes),
            f"{measured.start_up_seconds:.1f}",
        ]
        for number, measurements in enumerate(run.rounds, start=1)
        for peer, measured in zip(run.peers, measurements, strict=True)
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table: the peers' column left-aligned, the others right-aligned."""
    rule = ["---" if column == "peer" else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
