"""The command: measures peers in turn, each in a process of its own, and writes the table.

On a CPU the peers take turns step by step, so that what slows the machine down for a while slows all of them down.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.throughput.results import Environment, Load, Peer, Run, Task, file_name, page
from benchmarks.throughput.turns import Process, take_turns

# Defaults of the command: at most some 6 minutes on two cores, 8 on a CUDA machine.
DEFAULTS = {
    "cpu": {"batch_size": 16, "slots": (1, 2, 4), "steps": 8, "eval_rows": 64, "compiled": False},
    "cuda": {"batch_size": 32, "slots": (1, 4, 8, 16, 32), "steps": 100, "eval_rows": 1_000, "compiled": True},
}
EVAL_BATCH_SIZE = 64  # the experiments' own


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setup = Process("benchmarks.throughput.setup", "write_random", options.model, Path(folder))
        setup.next_turn()
        environment = setup.found
        if not isinstance(environment, Environment):
            sys.exit(f"Cannot write a model: {environment}")
        for name, value in DEFAULTS[environment.device_type].items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        print(_measure(options, environment, Path(folder)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description="How fast many trials train.")
    model = "roberta-base, minilm, or a folder with a config.json (default: roberta-base on CUDA, minilm on a CPU)"
    parser.add_argument("--model", help=model)
    parser.add_argument("--batch-size", type=_count, help="rows of a trial's training batch")
    parser.add_argument("--slots", type=_counts, help="trials at once, one row of the table each: 1,4,8")
    parser.add_argument("--steps", type=_steps, help="training steps of a trial")
    parser.add_argument("--eval-rows", type=_count, help="validation rows of a trial")
    compiled = "also measure Trainer + PEFT with torch.compile (default: on CUDA)"
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help=compiled)
    earlier = "also measure the engine of another checkout of this project, one trial at a time"
    parser.add_argument("--earlier", type=Path, metavar="DIR", help=earlier)
    parser.add_argument("--rounds", type=_count, default=3, help="times that each peer is measured (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.model not in (None, "roberta-base", "minilm") and not Path(options.model, "config.json").is_file():
        parser.error(f"--model must be roberta-base, minilm or a folder with a config.json, but is {options.model}")
    if options.earlier and not Path(options.earlier, "agnews_lora").is_dir():
        parser.error(f"--earlier must be a checkout of this project, but is {options.earlier}")
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


def _measure(options: argparse.Namespace, environment: Environment, folder: Path) -> str:
    """Measure all peers, and write the result file after each round or peer; its text."""
    # The Trainer first, since ratios are to its row: in bf16 on CUDA; on a CPU in fp32, its default, then in bf16.
    cuda = environment.device_type == "cuda"
    peers = [Peer("trainer", bf16=bf16) for bf16 in ((environment.bf16,) if cuda else (False, True))]
    peers += [Peer("compiled", bf16=environment.bf16)] if options.compiled else []
    if options.earlier:
        checkout = str(options.earlier.resolve())
        peers += [Peer("multilora", checkout=checkout, commit=commit(options.earlier) or checkout)]
    peers += [Peer("multilora", number) for number in options.slots]
    run = Run(
        command=_command(options, environment),
        commit=commit(),
        date=datetime.date.today(),
        environment=environment,
        batch_size=options.batch_size,
        steps=options.steps,
        warmup_steps=max(1, options.steps // 4),
        eval_rows=options.eval_rows,
        measured={peer: [] for peer in peers},
        load=Load(),
    )
    for number in range(1, options.rounds + 1):
        # A GPU's memory and its queue are one peer's at a time.
        for group in [[peer] for peer in peers] if cuda else [peers]:
            run.load.start()
            for peer, found in zip(group, take_turns([_task(run, peer, folder) for peer in group]), strict=True):
                run.measured[peer].append(found)
                said = f"failed: {found}" if isinstance(found, str) else f"{found.samples_per_second:,.1f} samples/s"
                print(f"round {number} of {options.rounds}: {peer}: {said}", file=sys.stderr, flush=True)
            run.load.stop()
            text = _write(run, options.out)
    return text


def _task(run: Run, peer: Peer, folder: Path) -> Task:
    return Task(
        peer=peer,
        environment=run.environment,
        folder=str(folder),
        batch_size=run.batch_size,
        eval_batch_size=EVAL_BATCH_SIZE,
        steps=run.steps,
        warmup_steps=run.warmup_steps,
        eval_rows=run.eval_rows,
    )


def _write(run: Run, folder: Path) -> str:
    """Write the result file with all that has been measured so far; its text."""
    text = page(run)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / file_name(run)
    beside = result.with_suffix(".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(result)
    return text


def _command(options: argparse.Namespace, environment: Environment) -> str:
    """Write the command with every value, defaults included."""
    return (
        f"python -m benchmarks.throughput --model {environment.model} --batch-size {options.batch_size} "
        f"--slots {','.join(map(str, options.slots))} --steps {options.steps} --eval-rows {options.eval_rows} "
        f"--{'' if options.compiled else 'no-'}compiled {'--earlier DIR ' if options.earlier else ''}"
        f"--rounds {options.rounds}"
    )


def commit(checkout: Path = ROOT) -> str:
    """Name the commit of a checkout, `0123456789ab (dirty)`, or give nothing outside of git."""
    git = ["git", "-C", str(checkout)]
    own = ["agnews_lora", "benchmarks/throughput"]
    try:
        commit, changes = (
            subprocess.run([*git, *command], check=True, capture_output=True, text=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *own])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit[:12]}{' (dirty)' if changes else ''}"


if __name__ == "__main__":
    main()
