"""`agnews-lora doctor`: what this machine has, and what it can reach."""

import json
import platform
import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

import agnews_lora
from agnews_lora import hub
from agnews_lora.adapters.base_models import resolve
from agnews_lora.config import experiment as experiments
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.data import sources
from agnews_lora.errors import AgnewsLoraError, NetworkError
from agnews_lora.paths import STORES, TOKENS

LIBRARIES = ("torch", "transformers", "peft", "datasets", "evaluate", "optuna", "mlflow", "pandas")


def run(as_json: bool) -> int:
    """Print device, versions, stores, and whether hub, base models and data can be reached."""
    found = _found()
    if as_json:
        print(json.dumps(found))
        return 0
    view = Table(show_header=False, box=None, padding=(0, 2))
    for what, value in found.items():
        view.add_row(what, value)
    Console(highlight=False, markup=False).print(view)
    return 0


def _found() -> dict[str, str]:
    from agnews_lora.training.device import device_name, has_bf16, training_device

    device = training_device()
    libraries = [f"{library} {version(library)}" for library in LIBRARIES]
    lines = [f"agnews-lora {agnews_lora.__version__}, Python {platform.python_version()}"]
    lines += [", ".join(some) for some in (libraries[:4], libraries[4:])]
    stores = {f"store {store}": _store(store) for store in (STORES / "mlflow.db", STORES / "optuna.db")}
    return {
        "device": f"{device_name(device)}, trains in {'bf16' if has_bf16(device) else 'fp32'}",
        "versions": "\n".join(lines),
        **stores,
        f"cache {TOKENS}": "there" if TOKENS.is_dir() else "made when needed",
        "hub": "can be reached" if hub.reachable() else "cannot be reached",
        **{f"experiment {path.stem}": _reach(path) for path in sorted(experiments.FOLDER.glob("*.yaml"))},
    }


def _store(path: Path) -> str:
    if not path.exists():
        return "made by the first sweep"
    try:
        with closing(sqlite3.connect(path, timeout=2)) as connection:
            connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        return f"cannot be written: {error}"
    return f"writable, {path.stat().st_size / 1e6:.1f} MB"


def _reach(path: Path) -> str:
    """Whether an experiment's base and data can be had, or the first line of why not."""
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
            answers.append(f"{what}: can be had")
        except NetworkError:
            answers.append(f"{what}: needs the hub")
        except AgnewsLoraError as error:
            answers.append(f"{what}: {error}")
    return "\n".join(answers)
