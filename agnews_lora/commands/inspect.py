"""`agnews-lora budget`, `doctor` and `ui`: what fits a budget, what this machine has, and the runs in a browser.

`budget` counts from shapes alone, so that nothing heavy is imported at the top of this module.
"""

import json
import os
import platform
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

import agnews_lora
from agnews_lora import hub
from agnews_lora.adapters.base_models import resolve, shape_of
from agnews_lora.adapters.budget import feasible_ranks, head_parameters, max_rank, parameters_per_rank
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.config import experiment as experiments
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.errors import AgnewsLoraError, BudgetError, NetworkError
from agnews_lora.paths import RUNS_DATABASE, STORES, STUDIES_DATABASE, TOKENS, WORK

LIBRARIES: Final = ("torch", "transformers", "peft", "datasets", "evaluate", "optuna", "mlflow", "pandas")
FAULTY: Final = ("cannot be written", "not valid", "Cannot ")  # in an answer


def budget(sweep: Sweep, as_json: bool) -> int:
    """Print the largest rank of every preset and head that a sweep searches."""
    shape = shape_of(sweep.experiment.base, len(sources.label_names(sweep.experiment.data_settings)))
    rows = budget_table(sweep, shape)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    console = Console(highlight=False, markup=False)
    console.print(f"{sweep.name}: {sweep.experiment.base}, budget {sweep.budget:,} trainable parameters, of which")
    for head in sweep.space.heads:
        console.print(f"  head {head} takes {head_parameters(head, shape):,}; the rest is the adapter's")
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("preset", "head", "a rank step", "largest rank", "trainable there", "of the budget"):
        view.add_column(heading, justify="left" if heading in ("preset", "head") else "right", no_wrap=True)
    for row in rows:
        count, fits = row["trainable_parameters"], row["max_rank"]
        view.add_row(
            str(row["preset"]),
            str(row["head"]),
            f"{row['parameters_per_rank']:,}",
            str(fits) if fits else "does not fit",
            f"{count:,}" if fits else "",
            f"{int(count) / sweep.budget:.1%}" if fits else "",
        )
    console.print(view)
    if shape.layout.note:
        console.print(f"{sweep.experiment.base}: {shape.layout.note}", soft_wrap=True)
    try:
        feasible_ranks(sweep.space.presets(shape.family), list(sweep.space.heads), shape, sweep.budget)
    except BudgetError as error:
        console.print(str(error), soft_wrap=True)
    return 0


def budget_table(sweep: Sweep, shape: ModelShape) -> list[dict[str, int | str]]:
    """A row for each preset and head of the sweep's space. trainable_parameters: at the largest rank."""
    rows: list[dict[str, int | str]] = []
    for preset in sweep.space.presets(shape.family):
        for head in sweep.space.heads:
            fits, step = max_rank(preset, head, shape, sweep.budget), parameters_per_rank(preset, shape)
            rows.append(
                {
                    "preset": preset,
                    "head": head,
                    "parameters_per_rank": step,
                    "max_rank": fits,
                    "trainable_parameters": head_parameters(head, shape) + fits * step,
                }
            )
    return rows


def doctor(as_json: bool, quick: bool) -> int:
    """Print device, versions, stores, what can be reached, and the state of the project; 1 where it has faults.

    quick: only versions, and whether stores and folders can be written: no library that takes long is imported.
    """
    machine, project = _written(), []
    if not quick:
        from agnews_lora.commands.project import examine

        machine, project = _device() | machine | _reached(), list(examine())
    faults = [what for what, value in machine.items() if any(word in value for word in FAULTY)]
    faults += [found.what for found in project if found.remedy]
    verdict = "Versions, stores and folders are in order." if quick else "Everything is in order."
    if faults:
        verdict = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: {', '.join(faults)}."
    if as_json:
        shown = [asdict(found) for found in project]
        print(json.dumps({**machine, "project": shown, "faults": len(faults), "verdict": verdict}))
        return 1 if faults else 0
    view = Table(show_header=False, box=None, padding=(0, 2))
    for what, value in machine.items():
        view.add_row(what, value)
    for found in project:
        view.add_row(found.what, "\n".join(filter(None, (found.state, found.remedy))))
    console = Console(highlight=False, markup=False)
    console.print(view)
    console.print(verdict, soft_wrap=True)
    return 1 if faults else 0


def _device() -> dict[str, str]:
    from agnews_lora.training.device import device_name, has_bf16, training_device
    from agnews_lora.training.multilora import kernels

    device = training_device()
    return {
        "device": f"{device_name(device)}, trains in {'bf16' if has_bf16(device) else 'fp32'}",
        "kernels": kernels.described(device),
    }


def _written() -> dict[str, str]:
    """Versions, stores and folders."""
    libraries = [f"{library} {version(library)}" for library in LIBRARIES]
    lines = [f"agnews-lora {agnews_lora.__version__}, Python {platform.python_version()}"]
    lines += [", ".join(some) for some in (libraries[:4], libraries[4:])]
    stores = {
        f"store {name}": _store(name)
        for name in (STORES / RUNS_DATABASE, STORES / "artifacts", STORES / STUDIES_DATABASE)
    }
    return {
        "versions": "\n".join(lines),
        **stores,
        f"folder {WORK}": _folder(WORK),
        f"cache {TOKENS}": _folder(TOKENS),
        "temporary files": _temporary(),
    }


def _reached() -> dict[str, str]:
    """The hub, and what each experiment needs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return {
        "cache of the hub": f"{HF_HUB_CACHE}: {_folder(Path(HF_HUB_CACHE))}",
        "hub": "can be reached" if hub.reachable() else "cannot be reached",
        **{f"experiment {path.stem}": _reach(path) for path in sorted(experiments.FOLDER.glob("*.yaml"))},
    }


def _store(path: Path) -> str:
    if fault := _unwritable(path):
        return fault
    if not path.exists():
        return "made by the first sweep"
    if path.is_dir():
        return "writable"
    try:
        with closing(sqlite3.connect(path, timeout=2)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        return f"cannot be written: {error}"
    return f"writable, {path.stat().st_size / 1e6:.1f} MB"


def _folder(path: Path) -> str:
    return _unwritable(path) or ("writable" if _exists(path) else "made when needed")


def _temporary() -> str:
    if not _unwritable(WORK):
        return f"below {WORK}"
    try:
        return f"in {tempfile.gettempdir()}"
    except OSError as error:
        return f"cannot be written: {error.strerror}. Set TMPDIR."


def _unwritable(path: Path) -> str | None:
    """Why a file or folder, or what it is to be made in, cannot be written."""
    present = [each for each in (path, *path.parents) if _exists(each)]
    needed = present[:2] if _exists(path) and path.is_file() else present[:1]  # SQLite writes beside its file
    refused = next((each for each in needed if not os.access(each, os.W_OK)), None)
    return f"cannot be written: this user may not write {refused.absolute()}" if refused else None


def _exists(path: Path) -> bool:
    """Whether it is there and may be seen: `Path.exists` fails below a folder that may not."""
    return os.path.exists(path)  # noqa: PTH110


def _reach(path: Path) -> str:
    """Whether an experiment's base and data are available, or the first line of why not."""
    try:
        experiment = load_experiment(str(path))
    except AgnewsLoraError as error:
        return f"not valid: {error}"
    asked: dict[str, Callable[[Experiment], object]] = {
        f"base {experiment.base}": lambda known: resolve(known.base),
        f"data {experiment.data_settings.source}": lambda known: sources.check(known.data_settings),
    }
    answers = []
    for what, ask in asked.items():
        try:
            ask(experiment)
            answers.append(f"{what}: available")
        except NetworkError:
            answers.append(f"{what}: needs the hub")
        except AgnewsLoraError as error:
            answers.append(f"{what}: {error}")
    return "\n".join(answers)


def ui(port: int) -> int:
    """Run MLflow's server until Ctrl-C or SIGTERM, and print the addresses of every sweep's pages once it answers.

    Raises:
        StorageError: the run store cannot be opened, or the port is taken.
    """
    from agnews_lora.commands.serve import HOST, bound
    from agnews_lora.tracking.runs import newest_parent
    from agnews_lora.tracking.store import open_client, tracking_uri
    from agnews_lora.tracking.views import address, share_view

    client = open_client(STORES)
    sweeps = [newest_parent(client, experiment.name) for experiment in reversed(client.search_experiments())]
    links = {"Runs": address("experiments")}
    for run in filter(None, sweeps):
        # Written again for studies of older releases, which have no view.
        pages = share_view(client, run, "macro_f1" if run.data.params.get("objective") == "macro_f1" else "accuracy")
        links |= {f"{run.info.run_name}, {page}": link for page, link in pages.items()}
    bound(port).close()  # MLflow would say that it is taken in a traceback
    command = ["mlflow", "server", "--backend-store-uri", tracking_uri(STORES), "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--uvicorn-opts", "--log-level warning --no-access-log"]
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its processes end in tracebacks at Ctrl-C
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONWARNINGS": "ignore",
    }
    print("Starting MLflow's server …", flush=True)
    # A session of its own: Ctrl-C is for this process, which ends the server with its workers.
    server = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while server.poll() is None and not _answers(HOST, port):
            time.sleep(0.1)
        if server.returncode is None:
            for name, link in links.items():
                print(f"{name}: http://{HOST}:{port}/{link}")
            print("Ctrl-C ends it.", flush=True)
        return server.wait()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
