"""What the commands cost that a person waits for: CPU seconds (user and system) of each, beside `python -c pass`.

    python -m benchmarks.tools PROJECT SWEEP

PROJECT is a folder whose sweep has ended and has a champion; its stores stay as they are. Each command runs three
times, and the least counts: other processes of a busy machine add to the rest.
"""

import datetime
import os
import resource
import subprocess
import sys
from pathlib import Path

from agnews_lora.tracking.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
NUM_RUNS = 3
# Command: the most CPU seconds that it is to take.
TOOLS = {
    "--help": 0.7,
    "doctor --quick": 0.7,
    "budget SWEEP": 0.7,
    "sweep missing": 1.0,
    "sweep --bad": 1.0,
    "sweep SWEEP": 1.5,
    "predict --sweep SWEEP Oil": 6.0,
}


def cpu_seconds(command: list[str], folder: Path) -> float:
    """The least of some runs."""
    taken = []
    for _ in range(NUM_RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def main() -> None:
    """Measure, print the table and write it to `results/`."""
    folder, sweep = Path(sys.argv[1]), sys.argv[2]
    bare = cpu_seconds([sys.executable, "-c", "pass"], folder)
    device = provenance()["device"]
    lines = [
        f"# CPU seconds of the commands, {device}, {datetime.date.today()}",
        "",
        f"The least of {NUM_RUNS} runs each; {os.cpu_count()} cores, shared with others (load "
        f"{os.getloadavg()[0]:.1f}). `python -c pass`: {bare:.3f} s.",
        "",
        "| command | CPU seconds | at most | times `python -c pass` |",
        "| --- | ---: | ---: | ---: |",
    ]
    for words, most in TOOLS.items():
        arguments = words.replace("SWEEP", sweep).split()
        taken = cpu_seconds([sys.executable, "-m", "agnews_lora", *arguments], folder)
        lines.append(f"| `{words}` | {taken:.2f} | {most:g} | {taken / bare:.0f} |")
    text = "\n".join(lines) + "\n"
    name = "-".join(device.lower().replace(",", "").split())
    (RESULTS / f"tools-{name}-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
