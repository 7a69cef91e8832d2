"""The command: measures peers in turn, each in a process of its own, and writes the table."""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.throughput.results import Environment, Measurement, Peer, Run, Task, file_name, page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# Defaults of the command: at most some 6 minutes on two cores, 8 on a CUDA machine.
DEFAULTS = {
    "cpu": {"batch_size": 16, "slots": (1, 4), "steps": 8, "eval_rows": 64},
    "cuda": {"batch_size": 32, "slots": (1, 4, 8, 16, 32), "steps": 100, "eval_rows": 1_000},
}
EVAL_BATCH_SIZE = 64  # the experiments' own


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _python("benchmarks.throughput.setup", folder, *([options.model] if options.model else []))
        environment = Environment(**json.loads(Path(folder, "environment.json").read_text(encoding="utf-8")))
        for name, value in DEFAULTS[environment.device_type].items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        run = _measure(options, environment, Path(folder))
    text = page(run)
    options.out.mkdir(parents=True, exist_ok=True)
    result = options.out / file_name(run)
    beside = result.with_suffix(".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(result)
    print(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description="How fast many trials train.")
    model = "roberta-base, minilm, or a folder with a config.json (default: roberta-base on CUDA, minilm on a CPU)"
    parser.add_argument("--model", help=model)
    parser.add_argument("--batch-size", type=_count, help="rows of a trial's training batch")
    parser.add_argument("--slots", type=_counts, help="trials at once, one row of the table each: 1,4,8")
    parser.add_argument("--steps", type=_steps, help="training steps of a trial")
    parser.add_argument("--eval-rows", type=_count, help="validation rows of a trial")
    parser.add_argument("--rounds", type=_count, default=3, help="times that each peer is measured (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.model not in (None, "roberta-base", "minilm") and not Path(options.model, "config.json").is_file():
        parser.error(f"--model must be roberta-base, minilm or a folder with a config.json, but is {options.model}")
    return options


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {number}")
    return number


def _steps(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 (the first ones are not measured), but is {number}")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _measure(options: argparse.Namespace, environment: Environment, folder: Path) -> Run:
    # The Trainer first, since ratios are to its row: in bf16 on CUDA; on a CPU in fp32, its default, then in bf16.
    formats = (environment.bf16,) if environment.device_type == "cuda" else (False, True)
    trainers = [Peer("trainer", bf16=bf16) for bf16 in formats]
    peers = (*trainers, *(Peer("multilora", number) for number in options.slots))
    warmup_steps = max(1, options.steps // 4)
    rounds = []
    for number in range(1, options.rounds + 1):
        measurements = []
        for peer in peers:
            task = Task(
                peer=peer,
                environment=environment,
                folder=str(folder),
                batch_size=options.batch_size,
                eval_batch_size=EVAL_BATCH_SIZE,
                steps=options.steps,
                warmup_steps=warmup_steps,
                eval_rows=options.eval_rows,
                started=time.time(),
            )
            measurements.append(_measure_one(task, folder))
            speed = f"{measurements[-1].samples_per_second:,.1f} samples/s"
            print(f"round {number} of {options.rounds}: {peer}: {speed}", file=sys.stderr, flush=True)
        rounds.append(tuple(measurements))
    return Run(
        command=_command(options, environment),
        commit=_commit(),
        date=datetime.date.today(),
        environment=environment,
        batch_size=options.batch_size,
        steps=options.steps,
        warmup_steps=warmup_steps,
        eval_rows=options.eval_rows,
        peers=peers,
        rounds=tuple(rounds),
    )


def _measure_one(task: Task, folder: Path) -> Measurement:
    asked, answer = folder / "task.json", folder / "answer.json"
    asked.write_text(json.dumps(asdict(task)), encoding="utf-8")
    _python("benchmarks.throughput.peers", str(asked), str(answer))
    return Measurement(**json.loads(answer.read_text(encoding="utf-8")))


def _python(module: str, *arguments: str) -> None:
    """Run a module in a process of its own.

    This process imports neither torch nor transformers: a child's peak memory is at least its parent's at the start.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{module} failed:\n{result.stdout}{result.stderr}")


def _command(options: argparse.Namespace, environment: Environment) -> str:
    """Write the command with every value, defaults included."""
    return (
        f"python -m benchmarks.throughput --model {environment.model} --batch-size {options.batch_size} "
        f"--slots {','.join(map(str, options.slots))} --steps {options.steps} --eval-rows {options.eval_rows} "
        f"--rounds {options.rounds}"
    )


def _commit() -> str:
    """Say `Commit 0123456789ab (dirty), `, or nothing outside of a git checkout."""
    git = ["git", "-C", str(ROOT)]
    own = ["agnews_lora", "benchmarks/throughput"]
    try:
        commit, changes = (
            subprocess.run([*git, *command], check=True, capture_output=True, text=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *own])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"Commit {commit[:12]}{' (dirty)' if changes else ''}, "


if __name__ == "__main__":
    main()
