"""A registered version as a folder that stands alone: PEFT's files, the tokenizer and a model card."""

import shutil
from pathlib import Path
from typing import Final

from agnews_lora.adapters.adapter_files import read_record, recount
from agnews_lora.errors import StorageError
from agnews_lora.serving.card import model_card
from agnews_lora.serving.predict import verified_package
from agnews_lora.tracking.registry import Registry, Version

CARD: Final = "README.md"


def export(registry: Registry, version: Version, to: Path) -> Path:
    """Write a version to the folder `to`, which is new or empty, whole or not at all; its absolute path.

    No file in it holds a path of this machine: the base is named by its id on the hub and its revision.

    Raises:
        StorageError: something is in the folder already, or it cannot be written.
        RegistryError: the version's files are no longer those that were registered.
        AdapterError: they do not recount.
    """
    package = verified_package(registry, version)
    recount(package.adapter)
    target = to.absolute()
    beside = target.with_name(f"{target.name}.partial")
    try:
        _require_empty(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(package.adapter, beside)
        shutil.copytree(package.tokenizer, beside, dirs_exist_ok=True)
        record = read_record(package.adapter)
        card = model_card(version, record, registry.run_params(version))
        (beside / CARD).write_text(card, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(
            f"{target} must be writable, but is not ({error.strerror}); export to another folder"
        ) from error
    return target


def _require_empty(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise StorageError(f"an export needs a new or an empty folder, but {target} holds something; name another one")
