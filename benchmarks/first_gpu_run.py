"""The first minutes on a GPU: `python -m benchmarks.first_gpu_run`, at most 9 minutes, on a bare CUDA machine too.

Stages run in processes of their own, each with a time limit. What one finds is in the result file at once; a stage that
fails or takes too long says so there, and the next one begins. Most valuable first: are the kernels right, how fast are
trials, where does the time go. `--dry` runs all stages on a CPU, with a tiny model.
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from agnews_lora import set_environment
from benchmarks import RESULTS, ROOT
from benchmarks.result_files import slug
from benchmarks.throughput.__main__ import commit

if TYPE_CHECKING:
    import torch

    from agnews_lora.training.multilora.engine import MultiLoraEngine
    from agnews_lora.training.multilora.model import SlotBatch
    from benchmarks.throughput.results import Environment

OWN = "benchmarks.first_gpu_run"
TOTAL = 530  # s
LAST_WORDS = 1_500  # characters of a failed stage's output
BATCH_SIZE = 32


class Stage(NamedTuple):
    """A name, the most seconds it may take, and the module that it runs, with arguments; `{out}` is filled in."""

    name: str
    seconds: float
    command: tuple[str, ...]


def stages(dry: bool) -> list[Stage]:
    """List all stages."""

    def own(name: str, seconds: float) -> Stage:
        return Stage(name, seconds, (OWN, "--stage", name, *(["--dry"] if dry else [])))

    size = "minilm --batch-size 2 --steps 2 --eval-rows 2" if dry else "roberta-base --steps 40 --eval-rows 200"
    throughput = ("benchmarks.throughput", *f"--model {size} --rounds 1 --out {{out}}".split())
    tests = ("pytest", "-p", "no:cacheprovider", "--disable-warnings", "-m", "gpu", "tests/training")
    all_stages = [
        own("machine", 40),
        own("parity", 60),
        own("profile", 60),
        own("graphs", 50),
        Stage("throughput", 180, (*throughput, "--no-compiled", "--slots", "2" if dry else "32,1")),
        Stage("tests", 80, (*tests, *(["--collect-only"] if dry else []))),
        own("layer", 60),
        Stage("compiled peer", 90, (*throughput, "--slots", "1", "--no-compiled" if dry else "--compiled")),
    ]
    return [stage._replace(seconds=5 * stage.seconds) for stage in all_stages] if dry else all_stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages and write the result file, or run one stage and print what it finds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu_run", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU, with a tiny model: nothing is measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone, and print what it finds")
    options = parser.parse_args(arguments)
    if options.stage is None:
        subject, total = ("dry", 5 * TOTAL) if options.dry else ("roberta-base", TOTAL)
        print(run(stages(options.dry), options.out, subject, total))
    else:
        set_environment()
        with tempfile.TemporaryDirectory() as folder:
            STAGES[options.stage](options.dry, Path(folder))


def run(stages: Sequence[Stage], out: Path, subject: str, total: float) -> Path:
    """Run stages one after another; the file to which each has written while it ran."""
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today()
    file = out / f"first-gpu-run-{subject}-{date}.md"
    of_commit = f"Commit {found}, " if (found := commit()) else ""
    head = f"# `benchmarks.first_gpu_run`: {subject}, {date}\n\n{of_commit}stages in processes of their own.\n"
    file.write_text(head, encoding="utf-8")
    end = time.monotonic() + total
    for stage in stages:
        with file.open("a", encoding="utf-8") as page:
            page.write(f"\n## {stage.name}\n\n")
            page.write("" if stage.command[0] == OWN else "```text\n")
            page.flush()
            how = _run(stage, page, out, end - time.monotonic())
            page.write("" if stage.command[0] == OWN else "```\n")
            page.write(f"\n{how}\n")
        print(f"{stage.name}: {how.splitlines()[0]}", file=sys.stderr, flush=True)
        if device := re.search(r"^- device: (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            file = file.rename(out / f"first-gpu-run-{subject}-{slug(device[1])}-{date}.md")
    return file


def _run(stage: Stage, page: IO[str], out: Path, left: float) -> str:
    """Run a stage, whose output goes to the page; how it ended."""
    if left < min(10, stage.seconds):
        return "**Left out: no time was left.**"
    command = [sys.executable, "-m", *(part.format(out=out) for part in stage.command)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=page, stderr=log, start_new_session=True)
        try:
            code: int | None = process.wait(min(stage.seconds, left))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
        seconds = time.monotonic() - began
        if code == 0:
            return f"Done in {seconds:.1f} s."
        log.seek(0)
        how = "Stopped at its time limit" if code is None else f"Failed with exit code {code}"
        return f"**{how} after {seconds:.1f} s.**\n\n```text\n{log.read().strip()[-LAST_WORDS:]}\n```"


# What the stages share -----------------------------------------------------------------------------------------------


def say(name: str, value: object) -> None:
    """Print a line of what was found, at once."""
    print(f"- {name}: {f'{value:.4g}' if isinstance(value, float) else value}", flush=True)


@cache
def base_of(folder: Path, layers: int, dry: bool) -> "tuple[Environment, Path]":
    """Write a model of the shape of `roberta-base` with fewer layers, or a tiny one."""
    from benchmarks.throughput.setup import configuration, write_random

    config: Any = configuration("roberta-base")
    config.num_hidden_layers = min(layers, 3) if dry else layers
    if dry:
        config.update({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 300})
    config.save_pretrained(str(folder / f"config-{layers}"))
    base = folder / f"base-{layers}"
    return write_random(str(folder / f"config-{layers}"), base), base


def engine_of(folder: Path, slots: int, dry: bool, layers: int = 12, precision: Any = "auto") -> "MultiLoraEngine":
    """Make an engine with a trial of unlike specifications, not fresh ones, in each slot."""
    from dataclasses import replace

    import torch

    from agnews_lora.adapters.adapter_files import tensor_shapes
    from agnews_lora.training.device import training_device
    from agnews_lora.training.multilora.engine import MultiLoraEngine
    from agnews_lora.training.multilora.slots import SlotState
    from benchmarks.throughput.results import Peer, Task
    from benchmarks.throughput.setup import NUM_SPECS, SPECS, BenchmarkSetup

    environment, base = base_of(folder, layers, dry)
    task = Task(
        Peer("multilora", slots), replace(environment, lengths="roberta"), str(base), BATCH_SIZE, 64, 40, 10, 64
    )
    setup = BenchmarkSetup.of(task, training_device())
    engine = MultiLoraEngine(setup.base, setup.corpus, replace(setup.settings, precision=precision), slots)
    generator = torch.Generator().manual_seed(1)
    for slot in range(slots):
        spec = SPECS[slot % NUM_SPECS]
        shapes = tensor_shapes(spec, setup.base.shape)
        weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        engine.model.slots.place(slot, spec, SlotState.fresh(weights))
    return engine


def batches_of(engine: "MultiLoraEngine", slots: Sequence[int]) -> "Iterator[list[SlotBatch]]":
    """Give the batches of every step, each slot's in its own order."""
    from agnews_lora.training.data_order import batches
    from agnews_lora.training.multilora.model import SlotBatch

    cut = {slot: batches(engine.lengths, BATCH_SIZE, 13 + slot, epoch=0) for slot in slots}
    for number in range(len(cut[slots[0]])):
        yield [SlotBatch(slot, cut[slot][number], 1e-4, number + 1, 13 + slot) for slot in slots]


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Time a call whose device has nothing else to do."""
    import torch

    seconds = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * sorted(seconds[3:])[repeats // 2]


# Stages --------------------------------------------------------------------------------------------------------------


def machine(dry: bool, folder: Path) -> None:
    """Say what there is, and what it can do at most."""
    from importlib.metadata import version

    import torch

    from agnews_lora.training.device import device_name, training_device

    device = training_device()
    if device.type != "cuda" and not dry:
        sys.exit("Cannot measure a GPU: torch finds none. Use --dry to try the stages on a CPU.")
    say("device", device_name(device))
    say("cores, load average", f"{os.cpu_count()}, {os.getloadavg()[0]:.2f}")
    say("Python", sys.version.split()[0])
    for name in ("torch", "transformers", "peft", "numpy"):
        say(name, version(name))
    size = 256 if dry else 8192
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    say("bf16 product, TFLOP/s", 2 * size**3 / median_ms(lambda: x @ x) / 1e9)
    buffer = torch.empty(2**20 if dry else 2**31, dtype=torch.int8, device=device)
    say("copy, TB/s", 2 * buffer.numel() / median_ms(buffer.clone) / 1e9)
    if device.type == "cuda":
        import triton

        say("triton", triton.__version__)
        say("free memory, GB", torch.cuda.mem_get_info()[0] / 1e9)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.draw", "--format=csv,noheader"]
        say("nvidia-smi", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())


def parity(dry: bool, folder: Path) -> None:
    """Compare a pass over four unlike slots, one of them absent, by the kernels and by plain torch, with plain fp32."""
    import torch

    from agnews_lora.training.multilora.kernels.reference import Kernels

    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, precision in (("fp32", "fp32"), ("torch", "auto"), ("kernels", "auto")):
        engine = engine_of(folder, 4, dry, layers=3, precision=precision)
        model, batches = engine.model, next(batches_of(engine, (0, 2, 3)))
        model.threads = None
        if name != "kernels":
            model.choice.kernels = Kernels(model.encoder.layers)
        began = time.perf_counter()
        packed = engine.train.pack([(batch.slot, batch.rows) for batch in batches])
        losses, gradients = model.choice.run(partial(model.gradients, packed, model._dropout_keys(batches)))
        [(_, logits), *_] = model.logits(engine.validation, range(8), [0, 2, 3], 8)
        found[name] = (losses.cpu(), gradients.cpu(), logits.cpu())
        if name == "kernels":
            say("kernels", f"{model.choice.kernels.name} ({model.choice.reason})")
        say(f"{name}, losses", losses.tolist())
        say(f"{name}, first pass, s", time.perf_counter() - began)
    exact = found.pop("fp32")
    for name, values in found.items():
        losses, gradients, logits = (one - other for one, other in zip(values, exact, strict=True))
        say(f"{name}, error of losses", float(losses.abs().max()))
        say(f"{name}, error of gradients", float((gradients.norm(dim=1) / exact[1].norm(dim=1)).max()))
        say(f"{name}, error of logits", float(logits.abs().max() / exact[2].abs().max()))


def _some(engine: "MultiLoraEngine", slots: int, dry: bool) -> "list[list[SlotBatch]]":
    """Give the batches of the first steps, over which steps are timed."""
    return list(batches_of(engine, range(slots)))[: 2 if dry else 12]


def _step(engine: "MultiLoraEngine", batches: "Iterator[list[SlotBatch]]") -> "torch.Tensor":
    return engine.model.step(engine.train, next(batches), 0.01, 1.0)


def profile(dry: bool, folder: Path) -> None:
    """Say where a step's time and memory go: time of host and device, waits, kernels launched and the longest."""
    import torch

    for slots in (2,) if dry else (32, 8, 1):
        engine = engine_of(folder, slots, dry)
        model, some = engine.model, _some(engine, slots, dry)
        batches = cycle(some)
        step = partial(_step, engine, batches)
        for _ in 2 * some:  # launched, then captured where that is done
            step().tolist()
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        print(f"\nK = {slots}, {model.choice.kernels.name} ({model.choice.reason}), {model.graphs}\n", flush=True)
        began = time.perf_counter()
        values = [step() for _ in some]
        launched = time.perf_counter()
        values[-1].tolist()
        computed = time.perf_counter()
        say("samples/s", len(some) * slots * BATCH_SIZE / (computed - began))
        say("a step, ms", 1e3 * (computed - began) / len(some))
        say("of it the host, ms", 1e3 * (launched - began) / len(some))
        if dry:
            continue
        say("peak memory, GB", torch.cuda.max_memory_allocated() / 1e9)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            say("waits in a step", "none")
        except RuntimeError as error:
            say("waits in a step", f"**{error}**: {traceback.format_exc(limit=-3).splitlines()[-4:-1]}")
        torch.cuda.set_sync_debug_mode("default")
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            step().tolist()
        total: dict[str, tuple[int, float]] = {}
        for event in profiled.events() or []:
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, micros = total.get(event.name[:80], (0, 0.0))
                total[event.name[:80]] = (count + 1, micros + event.device_time)
        busy = sum(micros for _, micros in total.values())
        say("launches", sum(count for count, _ in total.values()))
        say("device at work, ms", busy / 1e3)
        print("\n| kernel | launches | ms |\n| --- | ---: | ---: |")
        for name, (count, micros) in sorted(total.items(), key=lambda each: -each[1][1])[:25]:
            print(f"| `{name.replace('|', '/')}` | {count} | {micros / 1e3:.3f} |", flush=True)
        del engine, model, step
        torch.cuda.empty_cache()


def graphs(dry: bool, folder: Path) -> None:
    """Time steps launched one by one, and replayed, also where there are more tokens than those of replayed steps."""
    import torch

    from agnews_lora.training.multilora import model as model_module

    model_module.MOST_TOKENS = 2**30
    print("| K | steps | ms a step | samples/s | graphs | peak memory, GB | difference of losses |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for slots in (2,) if dry else (1, 8, 32):
        launched: torch.Tensor | None = None
        for replays in (False, True):
            engine = engine_of(folder, slots, dry)
            own = engine.model.graphs
            own.reason = own.reason if replays else "not wanted"
            if not dry:
                torch.cuda.reset_peak_memory_stats()
            some = _some(engine, slots, dry)
            for _ in range(3):  # launched, captured, replayed
                began = time.perf_counter()
                losses = torch.stack([_step(engine, iter([each]))[0] for each in some]).cpu()
                seconds = time.perf_counter() - began
            found = seconds / len(some) * 1e3, len(some) * slots * BATCH_SIZE / seconds
            memory = 0.0 if dry else torch.cuda.max_memory_allocated() / 1e9
            difference = 0.0 if launched is None else float((losses - launched).abs().max())
            numbers = f"{found[0]:.3f} | {found[1]:.0f} | {len(own.captured)} | {memory:.1f} | {difference:.2g}"
            print(f"| {slots} | {'launched' if own.reason else 'replayed'} | {numbers} |", flush=True)
            launched = losses
        say(f"K = {slots}", own)


def layer(dry: bool, folder: Path) -> None:
    """Time a layer between first and last, forward and backward, by the kernels and by plain torch: three less two."""
    from agnews_lora.training.multilora.kernels.reference import Kernels
    from benchmarks.throughput.setup import matrix_parameters

    print("| K | computed by | tokens | ms a layer | TFLOP/s of frozen products |\n| ---: | --- | ---: | ---: | ---: |")
    for slots in (2,) if dry else (32, 8, 1):
        times: dict[str, float] = {}
        for layers in (2, 3):
            engine = engine_of(folder, slots, dry, layers)
            model, batches = engine.model, next(batches_of(engine, range(slots)))
            model.threads = None
            packed = engine.train.pack([(batch.slot, batch.rows) for batch in batches])
            call = partial(model.gradients, packed, model._dropout_keys(batches))
            for kernels in {each.name: each for each in (Kernels(model.encoder.layers), model.choice.kernels)}.values():
                model.choice.kernels = kernels
                times[kernels.name] = median_ms(call, 5 if dry else 20) - times.get(kernels.name, 0.0)
        work = 4e-9 * matrix_parameters(engine.base.shape) / 3 * len(packed.ids)
        for name, ms in times.items():
            print(f"| {slots} | {name} | {len(packed.ids)} | {ms:.3f} | {work / ms:.1f} |", flush=True)


STAGES: dict[str, Callable[[bool, Path], None]] = {
    "machine": machine,
    "parity": parity,
    "profile": profile,
    "graphs": graphs,
    "layer": layer,
}

if __name__ == "__main__":
    main()
