"""The result file: figures that follow from what was measured, and what was measured beside them."""

import datetime
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.throughput.measurement import Measurement, Peer, Setup

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
class Run:
    """All that one command measured. command: how it is given again. rounds: one measurement a peer, in their order."""

    command: str
    commit: str
    date: datetime.date
    setup: Setup
    batch_size: int
    steps: int
    warmup_steps: int
    eval_rows: int
    peers: tuple[Peer, ...]
    rounds: tuple[tuple[Measurement, ...], ...]


def samples_per_second(measured: Measurement) -> float:
    """Training rows a second, over all trials."""
    return measured.rows / measured.train_seconds


def tokens_per_second(measured: Measurement) -> float:
    """Real tokens a second, over all trials."""
    return measured.tokens / measured.train_seconds


def share_of_rate(measured: Measurement, matrix_parameters: int) -> float:
    """4·P·real tokens / time, over the measured bf16 product.

    A frozen matrix costs a token 2·P floating-point operations forward and 2·P backward: it has no weight gradient.
    """
    product = (measured.product_before + measured.product_after) / 2
    return 4 * matrix_parameters * tokens_per_second(measured) / product


def seconds_per_trial(measured: Measurement) -> float:
    """Of wall time: building, training, evaluating and exporting, shared by the trials that train at once."""
    return measured.wall_seconds / measured.num_trials


def file_name(run: Run) -> str:
    """By model, hardware and date."""
    device = "-".join(run.setup.device.lower().replace(",", "").replace("(r)", "").split())
    return f"throughput-{run.setup.model}-{device}-{run.date}.md"


def page(run: Run) -> str:
    """The result file's text."""
    setup = run.setup
    lines = [
        f"# `benchmarks.throughput`: {setup.model}, {setup.device}, {run.date}",
        "",
        f"Command: `{run.command}`",
        "",
        f"{run.commit}{os.cpu_count()} cores, Python {setup.python}, torch {setup.torch}, transformers "
        f"{setup.transformers}, peft {setup.peft}. multilora computes in {'bf16' if setup.bf16 else 'fp32'}.",
        "",
        f"Random weights of the shape of {setup.model}, random token ids, lengths of newswire. A trial: "
        f"{run.steps * run.batch_size:,} training rows in {run.steps} steps of {run.batch_size}, {run.eval_rows:,} "
        "validation rows, one export. Each peer trains the same mixture of trials, the Trainer one after another, in a "
        f"process of its own, peers in turn; medians over the rounds (number: {len(run.rounds)}).",
        "",
        _table(COLUMNS, [_figures(run, number) for number in range(len(run.peers))]),
        "",
        *_legend(run),
        "",
        "## Rounds",
        "",
        _table(ROUND_COLUMNS, _measured(run)),
    ]
    return "\n".join(lines) + "\n"


def _legend(run: Run) -> list[str]:
    """What the columns mean."""
    memory = "of the device" if run.setup.device_type == "cuda" else "of the process"
    return [
        "- samples/s, real tokens/s: over all trials, training alone; padding is not counted, nor are the first steps "
        f"of each trial (number: {run.warmup_steps}).",
        "- ratio: of samples/s to the first row's, round by round.",
        f"- share of bf16 rate: 4·P·real tokens / time, P = {run.setup.matrix_parameters:,}, over the rate of a bf16 "
        "matrix product, measured in the same process before and after the trials.",
        f"- peak memory: {memory}.",
        "- s a trial: wall time of all trials, from building the first to the export of the last, over their number.",
        "- start-up s: from the start of the process to the first trial that is measured; imports, reading the base, "
        "and short trials for what is compiled once.",
    ]


def _figures(run: Run, number: int) -> list[str]:
    """The table's row of a peer."""
    own = [measured[number] for measured in run.rounds]
    ratios = [samples_per_second(measured[number]) / samples_per_second(measured[0]) for measured in run.rounds]

    def median(figure: Callable[[Measurement], float]) -> float:
        return statistics.median(map(figure, own))

    speeds = [samples_per_second(measured) for measured in own]
    share = median(lambda measured: share_of_rate(measured, run.setup.matrix_parameters))
    return [
        str(run.peers[number]),
        f"{statistics.median(speeds):,.1f}",
        f"{min(speeds):,.1f} to {max(speeds):,.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{median(tokens_per_second):,.0f}",
        f"{share:.2%}",
        f"{median(lambda measured: measured.peak_memory_bytes) / 1e9:.2f} GB",
        f"{median(seconds_per_trial):.2f}",
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
    """A Markdown table; the columns with a peer's name stand left, the others right."""
    rule = ["---" if column == "peer" else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))
