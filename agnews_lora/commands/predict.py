"""`agnews-lora predict` and `agnews-lora export`: use the champion."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agnews_lora.config.experiment import Experiment
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.errors import DataError
from agnews_lora.paths import STORES, temporary_files
from agnews_lora.serving.export import export as write_folder
from agnews_lora.serving.export import pipeline
from agnews_lora.serving.model_package import Package
from agnews_lora.serving.predict import Classifier
from agnews_lora.tracking.descriptions import one_line
from agnews_lora.tracking.versions import local_champion

if TYPE_CHECKING:
    from transformers import TextClassificationPipeline

MAX_TEXT_WIDTH = 36  # with the labels of AG News, a line fits into 80 columns
MOST_COLUMNS = 6  # of labels: of more, only the most probable one's probability is shown


@temporary_files()
def run(experiment: Experiment, texts: list[str], file: Path | None, as_json: bool, tracking: str | None) -> int:
    """Print label and probabilities of every text: given, a line each from a file, or from standard input.

    Raises:
        DataError: no text, an empty one, or a file that cannot be read.
        RegistryError: the experiment has no champion yet.
    """
    asked = [*texts, *(_lines(file) if file else [])]
    if not texts and file is None:
        asked = _split(sys.stdin.buffer.read(), "standard input")
    if not asked:
        raise DataError("Cannot predict: no text was given. Name one, or a file with --file.")
    for index, text in enumerate(asked):
        try:  # Python keeps bytes of an argument that the locale's encoding lacks as halves of characters
            asked[index] = os.fsencode(text).decode() if any("\ud800" <= each <= "\udfff" for each in text) else text
        except UnicodeError as error:
            raise DataError(f"Cannot read text {one_line(text)!r}: it is not UTF-8. Convert it.") from error
    classifier = Classifier.load(registered(experiment, tracking))
    predictions = classifier.predict(asked)
    if as_json:
        for text, prediction in zip(asked, predictions, strict=True):
            answer = {"text": text, "label": prediction.label, "probabilities": prediction.probabilities}
            print(json.dumps(answer))  # ASCII: a line each, whatever a reader takes for the end of a line
        return 0
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    view.add_column("label", no_wrap=True)
    shown = classifier.labels if len(classifier.labels) <= MOST_COLUMNS else ()
    for name in shown or ["probability"]:
        view.add_column(Text(name), justify="right", no_wrap=True)
    view.add_column("text", overflow="ellipsis", no_wrap=True, max_width=MAX_TEXT_WIDTH)
    for text, prediction in zip(asked, predictions, strict=True):
        shares = [f"{prediction.probabilities[label]:.1%}" for label in shown or [prediction.label]]
        view.add_row(Text(prediction.label), *shares, Text(one_line(text)))
    Console(highlight=False).print(view)
    return 0


@temporary_files()
def champion(sweep: Sweep | str | Path, *, tracking: str | None = None) -> "TextClassificationPipeline":
    """Load a sweep's champion as a text classification pipeline of transformers.

    Args:
        sweep: what `load_sweep` gave, or the name or path of the file.
        tracking: URL of the run store; the project's own where None.

    Raises:
        RegistryError: the sweep has no champion yet, or its files changed.
        AgnewsLoraError: anything else that the user can fix.
    """
    return pipeline(registered(load_sweep(sweep).experiment, tracking))


@temporary_files()
def export(experiment: Experiment, to: Path, merged: bool, tracking: str | None, as_json: bool) -> int:
    """Write the experiment's champion to a folder that stands alone. merged: as a whole model.

    Raises:
        RegistryError: there is no champion yet, or its files changed.
        StorageError: the folder holds something, or cannot be written.
    """
    from agnews_lora.tracking.registry import Registry
    from agnews_lora.tracking.store import open_client, reaching

    client = open_client(tracking or STORES, read=True)
    registry = Registry(client, experiment.name)
    with reaching(client):
        version = registry.champion()
        written = write_folder(registry, version, to, merged)
    if as_json:
        print(json.dumps({"model": version.model, "version": version.number, "folder": str(written)}))
        return 0
    content = "a whole model" if merged else "PEFT's files"
    Console(highlight=False, markup=False).print(
        f"{version} is in {to}: {content}, the tokenizer and a model card (README.md)", soft_wrap=True
    )
    return 0


def registered(experiment: Experiment, tracking: str | None, version: int | None = None) -> Package:
    """Download a version, or the champion, whose files are still those that were registered."""
    if tracking is None and version is None and (found := local_champion(STORES, experiment.name)):
        return Package.verified(found, found.version)
    from agnews_lora.tracking.registry import Registry
    from agnews_lora.tracking.store import open_client, reaching

    client = open_client(tracking or STORES, read=True)
    with reaching(client):
        registry = Registry(client, experiment.name)
        return Package.verified(registry, registry.champion() if version is None else registry.version(version))


def _lines(file: Path) -> list[str]:
    try:
        return _split(file.read_bytes(), str(file))
    except OSError as error:
        raise DataError(f"Cannot read texts from {file}: {error.strerror}. Name a text file.") from error


def _split(content: bytes, place: str) -> list[str]:
    """The lines that hold more than white space. Only LF and CR LF end one: a text may hold U+2028 or a form feed."""
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"Cannot read texts from {place}: byte {error.start} is not UTF-8. Convert it.") from error
    return [line.removesuffix("\r") for line in lines if line.strip()]
