"""`data`: what an experiment's rows are like, before anything trains on them."""

import json
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from agnews_lora.adapters.base_models import resolve
from agnews_lora.config.experiment import Experiment
from agnews_lora.data import sources
from agnews_lora.data.profile import profile, profile_sentence, profile_table
from agnews_lora.data.tokens import tokenise
from agnews_lora.errors import BaseModelError, DataError, NetworkError
from agnews_lora.paths import TOKENS

MAX_CLASSES: Final = 30  # that are shown


def run(experiment: Experiment, as_json: bool) -> int:
    """Print rows a class, lengths, duplicates and shared rows of an experiment's splits.

    Raises:
        AgnewsLoraError: the rows cannot be read.
    """
    settings, max_length = experiment.data_settings, experiment.settings.max_length
    splits = sources.load(settings, experiment.seed)
    tables, warnings = {}, []
    try:
        base = resolve(experiment.base, num_labels=len(splits.labels))
        tables = {name: tokenise(rows, base.folder, max_length, TOKENS) for name, rows in splits.rows.items()}
    except (BaseModelError, NetworkError) as error:
        warnings.append(f"Lengths are not known: {error}")
    try:
        sources.require_apart(settings, splits)
    except DataError as error:
        warnings.append(f"sweep and train refuse this data: {error}")
    found = dict(profile(splits.rows, splits.labels, tables, max_length))
    found["warnings"] = [*warnings, *found["warnings"]]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(experiment.name, found)
    return 0


def _show(name: str, found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    view.add_column(name)
    for split in found["rows"]:
        view.add_column(split, justify="right")
    for row in profile_table(found, MAX_CLASSES):
        view.add_row(*row)
    console.print(view)
    console.print(profile_sentence(found))
    for warning in found["warnings"]:
        console.print(f"warning: {warning}")
