"""`agnews-lora doctor`: what this machine has, and what it can reach."""

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
from agnews_lora.adapters.bases import resolve
from agnews_lora.commands.places import STORES, TOKENS
from agnews_lora.config import experiment as experiments
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.data import sources
from agnews_lora.errors import AgnewsLoraError, NetworkError

LIBRARIES = ("torch", "transformers", "peft", "datasets", "evaluate", "optuna", "mlflow", "pandas")


def run() -> int:
    """Print device, versions, stores, and whether hub, base models and data can be reached."""
    from agnews_lora.training.device import device_name, has_bf16, training_device

    device = training_device()
    view = Table(show_header=False, box=None, padding=(0, 2))
    view.add_row("device", f"{device_name(device)}, trains in {'bf16' if has_bf16(device) else 'fp32'}")
    view.add_row("versions", f"agnews-lora {agnews_lora.__version__}, Python {platform.python_version()}")
    for some in (LIBRARIES[:4], LIBRARIES[4:]):
        view.add_row("", ", ".join(f"{library} {version(library)}" for library in some))
    for store in (STORES / "mlflow.db", STORES / "optuna.db"):
        view.add_row(f"store {store}", _store(store))
    view.add_row(f"cache {TOKENS}", "there" if TOKENS.is_dir() else "made when needed")
    view.add_row("hub", "can be reached" if hub.reachable() else "cannot be reached")
    for path in sorted(experiments.FOLDER.glob("*.yaml")):
        view.add_row(f"experiment {path.stem}", _reach(path))
    Console(highlight=False, markup=False).print(view)
    return 0


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
