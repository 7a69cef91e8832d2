"""`agnews-lora export`: the champion as a folder that stands alone."""

import json
from pathlib import Path

from rich.console import Console

from agnews_lora.config.sweep import load_sweep
from agnews_lora.paths import STORES
from agnews_lora.serving.export import export
from agnews_lora.serving.predict import champion
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client, reaching


def run(sweep: str, to: Path, tracking: str | None, as_json: bool) -> int:
    """Write the sweep's champion to a folder.

    Raises:
        RegistryError: there is no champion yet, or its files changed.
        StorageError: the folder holds something, or cannot be written.
    """
    client = open_client(tracking or STORES)
    registry = Registry(client, load_sweep(sweep).experiment.name)
    with reaching(client):
        version = champion(registry)
        written = export(registry, version, to)
    if as_json:
        print(json.dumps({"model": version.model, "version": version.number, "folder": str(written)}))
        return 0
    Console(highlight=False, markup=False).print(
        f"{version} is in {to}: PEFT's files, the tokenizer and a model card (README.md)", soft_wrap=True
    )
    return 0
