"""What the commands cost that a person waits for: CPU seconds (user and system) of each, beside `python -c pass`.

    python -m benchmarks.tools PROJECT SWEEP

PROJECT is a folder whose sweep has ended and has a champion; its stores stay as they are. Each command runs three
times, and the least counts: other processes of a busy machine add to the rest. A copy of its YAML files, in a folder of
its own, shows what a fault in one costs, and what passes before the first training step of a new study.
"""

import datetime
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil  # type: ignore[import-untyped]

from agnews_lora.tracking.provenance import provenance
from benchmarks.result_files import slug, write

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


def cpu_seconds_before_training(sweep: str, project: Path) -> float:
    """The least of some new studies, each until it has made a training step and scored four rows."""
    taken = []
    for _ in range(NUM_RUNS):
        with TemporaryDirectory() as folder:
            copy_of(project, Path(folder))
            for path in Path(folder, "experiments").glob("*.yaml"):
                text = re.sub(r"eval_every: \d+", "eval_every: 1", path.read_text(encoding="utf-8"))
                path.write_text(re.sub(r"eval_rows: \d+", "eval_rows: 4", text), encoding="utf-8")
            command = [sys.executable, "-m", "agnews_lora", "sweep", sweep]
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                next(line for line in process.stdout if " step 1/" in line)
                times = psutil.Process(process.pid).cpu_times()
                taken.append(times.user + times.system + times.children_user + times.children_system)
                process.kill()
    return min(taken)


def copy_of(project: Path, folder: Path) -> None:
    """Copy the YAML files, without stores and caches."""
    for part in ("experiments", "sweeps"):
        shutil.copytree(project / part, folder / part)


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
    program = [sys.executable, "-m", "agnews_lora"]
    measured = {
        f"`{words}`": (cpu_seconds([*program, *words.replace("SWEEP", sweep).split()], folder), most)
        for words, most in TOOLS.items()
    }
    with TemporaryDirectory() as flawed:
        copy_of(folder, Path(flawed))
        with Path(flawed, "sweeps", f"{sweep}.yaml").open("a", encoding="utf-8") as file:
            file.write("budgets: 1\n")
        measured["`sweep SWEEP`, an unknown key in its file"] = (
            cpu_seconds([*program, "sweep", sweep], Path(flawed)),
            1.0,
        )
    before = cpu_seconds_before_training(sweep, folder)
    measured["`sweep SWEEP`, a new study until its first training step"] = before, 12.0
    for name, (taken, most) in measured.items():
        lines.append(f"| {name} | {taken:.2f} | {most:g} | {taken / bare:.0f} |")
    text = "\n".join(lines) + "\n"
    write(f"tools-{slug(device)}", text)


if __name__ == "__main__":
    main()
