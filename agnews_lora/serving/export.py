"""A registered version as a folder that stands alone: PEFT's files, the tokenizer and a model card."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from agnews_lora.adapters.adapter_files import AdapterRecord, read_record, recount
from agnews_lora.errors import StorageError
from agnews_lora.serving.model_package import Package, recorded_score
from agnews_lora.tracking.descriptions import code, text
from agnews_lora.tracking.registry import Registry, Version
from agnews_lora.training.interface import TrainSettings

CARD: Final = "README.md"
# The run's params that a card shows: none of them can hold a path.
_SETTINGS: Final = ("seed", *(field.name for field in fields(TrainSettings)))
_AG_NEWS_LICENCE: Final = (
    "AG News is provided by its authors for research and other non-commercial activities; use an adapter trained on it "
    "accordingly."
)
_NEWSWIRE_LICENCE: Final = "The rows are made by the project itself (`newswire`); they carry no licence of others."


def export(registry: Registry, version: Version, to: Path) -> Path:
    """Write a version to the folder `to`, which is new or empty, whole or not at all; its absolute path.

    No file in it holds a path of this machine: the base is named by its id on the hub and its revision.

    Raises:
        StorageError: something is in the folder already, or it cannot be written.
        RegistryError: the version's files are no longer those that were registered.
        AdapterError: they do not recount.
    """
    package = Package.verified(registry, version)
    recount(package.adapter)
    target = to.absolute()
    beside = target.with_name(f"{target.name}.partial")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise StorageError(f"Cannot export to {target}: it is not empty. Name a new or an empty folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(package.adapter, beside)
        shutil.copytree(package.tokenizer, beside, dirs_exist_ok=True)
        card = _model_card(version, read_record(package.adapter), registry.run_params(version))
        (beside / CARD).write_text(card, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(f"Cannot export to {target}: {error.strerror}. Name another folder.") from error
    return target


def _model_card(version: Version, record: AdapterRecord, params: Mapping[str, str]) -> str:
    """Markdown with the front matter that the hub reads. params: of the run that trained the version."""
    tags, base = version.tags, code(record.hub_id)
    data: dict[str, str] = json.loads(tags["data"])
    settings = {key: params[key] for key in _SETTINGS if key in params}
    training = {**record.spec.as_dict(), **settings, "max_length": record.max_length}
    if _is_published(record):
        base_model, found_at = f"base_model: {json.dumps(record.hub_id)}\n", f" at revision {code(record.revision)}"
    else:
        weights = f"`model.safetensors` has the SHA-256 {code(record.weights_sha256)}"
        base_model, found_at = "", f", a local model whose {weights}"
    validation = f"accuracy {float(tags['validation_accuracy']):.2%} on {int(tags['validation_rows']):,} rows"
    return f"""---
library_name: peft
pipeline_tag: text-classification
language: en
tags: [lora, ag-news]
{base_model}---

# {text(version.model)}, version {version.number}

A LoRA adapter that labels English news items as one of {text(", ".join(record.labels))}.

- Base: {base}{found_at}
- Trainable parameters: {record.trainable_parameters:,}, of a budget of {int(tags["budget"]):,}
- Found by: trial {code(tags["trial"])} of study {code(tags["study"])}

## Results

- Test split, scored once: {recorded_score(version) or "not scored: this version has not been promoted."}
- Validation split: {validation}. It chose this adapter among others, so it is optimistic.
{_confirmed_mean(tags)}
## Load it

{_loading(record)}

## Training

{_table(training)}

## Data

{_table(data)}

{_NEWSWIRE_LICENCE if data["source"] == "newswire" else _AG_NEWS_LICENCE}
"""


def _is_published(record: AdapterRecord) -> bool:
    """Whether the base is named by its id on the hub; a base of one's own is known by the hash of its weights."""
    return not record.revision.startswith("sha256:")


def _confirmed_mean(tags: Mapping[str, str]) -> str:
    """Mean and spread over the seeds that the winner was confirmed with, as a line; empty where it was not."""
    if "confirmation_mean_accuracy" not in tags:
        return ""
    spread = tags.get("confirmation_std_accuracy")
    deviation = f" (standard deviation {100 * float(spread):.2f} points)" if spread else ""
    mean, seeds = float(tags["confirmation_mean_accuracy"]), int(tags["confirmation_seeds"])
    return (
        "- Validation split, the same configuration trained from several seeds: "
        f"mean accuracy {mean:.2%} over {seeds} seeds{deviation}.\n"
    )


def _loading(record: AdapterRecord) -> str:
    """Code that runs in the folder itself, with plain PEFT."""
    revision = f", revision={json.dumps(record.revision)}" if _is_published(record) else ""
    note = "" if _is_published(record) else "  # the directory that holds it"
    return f"""In this folder:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = "."
BASE = {json.dumps(record.hub_id)}{note}
LABELS = {json.dumps(list(record.labels))}

base = AutoModelForSequenceClassification.from_pretrained(BASE{revision}, num_labels=len(LABELS))
model = PeftModel.from_pretrained(base, FOLDER).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)

text = "Oil prices rose to a record as the central bank left its interest rate unchanged."
tokens = tokenizer(text, truncation=True, max_length={record.max_length}, return_tensors="pt")
with torch.inference_mode():
    probabilities = model(**tokens).logits.softmax(dim=-1)[0]
print(LABELS[probabilities.argmax()], probabilities.max().item())
```"""


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {text(key)} | {text(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])
