"""How fast a served version answers on this machine, with the adapter on its base and merged: `make bench`.

Sweeps once over a small project on the embedded base, serves what was registered by `agnews-lora serve` in two
processes, one of them `--merged`, and asks both in turn, over HTTP and in this process. What else the machine does
falls on both alike: the ratio of requests that follow each other is the result, the times are this machine's.
"""

import datetime
import http.client
import json
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

import agnews_lora
from agnews_lora.adapters.base_models import resolve
from agnews_lora.data import newswire
from agnews_lora.paths import STORES
from agnews_lora.serving.model_package import Package
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client
from benchmarks import ROOT
from benchmarks.result_files import commit_of, slug, write
from tests.project import command, environment, write_project

SEED = 13
# Few adapted matrices and all of them: the adapter's cost is one of matrices, hardly one of ranks.
ADAPTERS: dict[str, dict[str, object]] = {
    "qk, rank 4": {"adapter.targets": "qk", "adapter.rank": 4},
    "all-linear, rank 2": {"adapter.targets": "all-linear", "adapter.rank": 2},
}
WAYS = {"adapter on its base": False, "merged": True}
ROUNDS = {1: 200, 8: 24, 32: 8, 128: 4}  # {texts of a request: requests to each}

Ask = Callable[[list[str]], object]


@dataclass(frozen=True)
class Served:
    """A server that answers. seconds: from its start to then. difference: what its own check found."""

    ask: Ask
    seconds: float
    difference: float


@dataclass(frozen=True)
class Measured:
    """By way, then by the texts of a request: seconds of each request, over HTTP and in this process."""

    http: Mapping[str, Mapping[int, Sequence[float]]]
    within: Mapping[str, Mapping[int, Sequence[float]]]
    starts: Mapping[str, float]
    differences: Mapping[str, float]


def measure(adapter: Mapping[str, object], folder: Path) -> Measured:
    """Train and register an adapter in an empty folder, and measure it both ways."""
    from agnews_lora.serving.predict import Classifier  # imports torch, and must find the environment that `main` sets

    sweep = {"trials": 1, "budget": 100_000}
    write_project(folder, experiment={"training.max_length": 80, **adapter}, sweep=sweep)
    subprocess.run(command("sweep", "small"), cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    texts = newswire.generate(1_000, "test", SEED).texts
    os.chdir(folder)
    registry = Registry(open_client(STORES), "small")
    chosen = registry.version(1)
    package, base = Package.verified(registry, chosen), resolve(chosen.tags["base"])
    with ExitStack() as running:
        servers = {way: running.enter_context(serving(folder, merged)) for way, merged in WAYS.items()}
        over_http = in_turn({way: server.ask for way, server in servers.items()}, texts)
    here = {way: Classifier(package.adapter, package.tokenizer, base, merged) for way, merged in WAYS.items()}
    within = in_turn({way: classifier.predict for way, classifier in here.items()}, texts)
    return Measured(
        over_http,
        within,
        {way: server.seconds for way, server in servers.items()},
        {way: server.difference for way, server in servers.items()},
    )


@contextmanager
def serving(folder: Path, merged: bool) -> Iterator[Served]:
    """A server of version 1, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command("serve", "small", "--version", "1", "--port", str(port), *(["--merged"] if merged else []))
    began, said = time.monotonic(), ""
    with subprocess.Popen(words, cwd=folder, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            while "Serving" not in said:
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{' '.join(words[2:])} ended with status {process.wait()}")
                said += line
            seconds, found = time.monotonic() - began, re.search(r"largest difference ([^)]+)\)", said)
            assert found is not None
            connection = http.client.HTTPConnection("127.0.0.1", port)
            yield Served(lambda texts: _post(connection, texts), seconds, float(found[1]))
            connection.close()
        finally:
            process.terminate()


def _environment() -> dict[str, str]:
    return environment() | {"PYTHONPATH": str(ROOT)}


def _post(connection: http.client.HTTPConnection, texts: list[str]) -> None:
    body = json.dumps({"inputs": texts})
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    predictions = json.loads(answer.read())["predictions"]
    assert answer.status == 200 and len(predictions) == len(texts)


def in_turn(ways: Mapping[str, Ask], texts: Sequence[str]) -> dict[str, dict[int, list[float]]]:
    """Seconds of each request, by way and by number of texts. The ways take turns, and turns at being first."""
    seconds: dict[str, dict[int, list[float]]] = {way: {size: [] for size in ROUNDS} for way in ways}
    for ask in ways.values():
        for size in ROUNDS:
            ask(list(texts[:size]))  # warms up
    for size, rounds in ROUNDS.items():
        for index in range(rounds):
            start = index * size % (len(texts) - size)
            for way, ask in list(ways.items())[:: 1 - index % 2 * 2]:
                began = time.perf_counter()
                ask(list(texts[start : start + size]))
                seconds[way][size].append(time.perf_counter() - began)
    return seconds


def table(measured: Measured) -> str:
    """The Markdown table of one adapter: a column a way, and their ratio."""
    rows: list[tuple[str, list[float], float, str]] = []
    for place, found in (("over HTTP", measured.http), ("in process", measured.within)):
        for percentile in (50, 95, 99):
            values = [1000 * float(np.percentile(found[way][1], percentile)) for way in WAYS]
            rows.append((f"one text {place}, ms, p{percentile}", values, values[1] / values[0], ".1f"))
        for size in ROUNDS:
            apart, merged = (np.asarray(found[way][size]) for way in WAYS)
            rates = [size / float(np.median(seconds)) for seconds in (apart, merged)]
            paired = float(np.median(apart / merged))  # of requests that followed each other
            rows.append((f"texts a second {place}, {size} a request", rates, paired, ",.0f"))
    starts = [measured.starts[way] for way in WAYS]
    rows.append(("seconds from the start to the first answer", starts, starts[1] / starts[0], ".1f"))
    lines = [f"| | {' | '.join(WAYS)} | merged / not |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {what} | {a:{form}} | {b:{form}} | {ratio:.2f} |" for what, (a, b), ratio, form in rows]
    differences = " | ".join(f"{measured.differences[way]:.0e}" for way in WAYS)
    return "\n".join([*lines, f"| largest difference from the logits at registration | {differences} | |"])


def report(measured: Mapping[str, Measured], loads: tuple[float, float], tags: Mapping[str, str]) -> str:
    """The result file. loads: the machine's average before and after. tags: the provenance of a run."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "fastapi", "uvicorn"))
    busy = " Other programs were running: read the ratios, not the times." if loads[0] > 0.5 else ""
    parts = [f"## {adapter}\n\n{table(each)}" for adapter, each in measured.items()]
    return f"""\
# `python -m benchmarks.serving`: what a served version costs, MiniLM, {tags["device"]}, {datetime.date.today()}

Commit {commit_of(tags)}, {os.cpu_count()} cores, Python \
{platform.python_version()}, {versions}.
The load average was {loads[0]:.1f} at the start and {loads[1]:.1f} at the end.{busy}

Both ways answer the same requests in turn, one client that waits for each answer, fp32, texts of `newswire` (test,
seed {SEED}) cut at 80 tokens. Requests to each: {", ".join(f"{rounds} of {size}" for size, rounds in ROUNDS.items())} \
texts. Rates are those
of the median request, and their ratio is the median over pairs of requests that followed each other. In process
is `Classifier.predict`; over HTTP adds the client and the server.

{chr(10).join(f"{part}{chr(10)}" for part in parts).rstrip()}
"""


def main() -> None:
    """Measure every adapter and write the result file."""
    agnews_lora.set_environment()
    before, measured = os.getloadavg()[0], {}
    for name, adapter in ADAPTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                measured[name] = measure(adapter, Path(folder))
            finally:
                os.chdir(ROOT)
        print(f"{name}\n\n{table(measured[name])}\n", flush=True)
    from agnews_lora.tracking.provenance import provenance

    tags = provenance()
    text = report(measured, (before, os.getloadavg()[0]), tags)
    write(f"serving-minilm-{slug(tags['device'])}", text)


if __name__ == "__main__":
    main()
