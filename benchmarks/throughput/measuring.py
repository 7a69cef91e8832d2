"""One peer measured in a process of its own: `python -m benchmarks.throughput.measuring TASK ANSWER` (JSON files)."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from agnews_lora.training.device import peak_memory_bytes, training_device
from benchmarks.throughput.lab import build_lab, plans, smaller
from benchmarks.throughput.measurement import MIXTURE_SIZE, Measurement, Peer, Setup, Task
from benchmarks.throughput.peers import Span, now, trials_of


def covered_seconds(spans: Iterable[Span]) -> float:
    """Time in which at least one trial was training."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        total += max(0.0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return total


def product_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 matrix product [m, k] x [k, n], median of repeats: 4096 cubed on CUDA, 1024 x 1536² on a CPU."""
    m, k, n, products = (4096, 4096, 4096, 20) if device.type == "cuda" else (1024, 1536, 1536, 1)
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    seconds = []
    for _ in range(30):
        began = now(device)
        for _ in range(products):
            torch.matmul(left, right)
        seconds.append((now(device) - began) / products)
    return 2 * m * k * n / float(np.median(seconds[10:]))  # the first ones raise the clock


def measure(task: Task, work: Path) -> Measurement:
    """Train short trials, then those that are measured, below the folder `work`."""
    device = training_device()
    lab, peer = build_lab(task, device), task.peer
    trials_of(peer, smaller(lab, 2)).train(plans(work / "short", min(peer.slots, MIXTURE_SIZE)))
    gc.collect()
    trials = trials_of(peer, lab)
    start_up_seconds = time.time() - task.started
    before = product_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    spans = trials.train(plans(work / "measured", peer.num_trials))
    ended = now(device)
    peak = peak_memory_bytes(device)
    return Measurement(
        rows=sum(span.rows for span in spans),
        tokens=sum(span.tokens for span in spans),
        train_seconds=covered_seconds(spans),
        product_before=before,
        product_after=product_rate(device),
        num_trials=len(spans),
        wall_seconds=ended - began,
        peak_memory_bytes=peak,
        start_up_seconds=start_up_seconds,
    )


def main(task_file: Path, answer_file: Path) -> None:
    """Read a `Task`, write its `Measurement`."""
    fields = json.loads(task_file.read_text(encoding="utf-8"))
    task = Task(**fields | {"peer": Peer(**fields["peer"]), "setup": Setup(**fields["setup"])})
    with tempfile.TemporaryDirectory(dir=task_file.parent) as work:
        measurement = measure(task, Path(work))
    answer_file.write_text(json.dumps(asdict(measurement)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
