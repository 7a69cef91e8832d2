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
    data: dict[str, str] = json.loads(version.tags["data"])
    sections = {
        f"{text(version.model)}, version {version.number}": _introduction(version, record),
        "Results": _results(version),
        "Load it": _loading(record),
        "Training": _table(_configuration(record, params)),
        "Data": "\n\n".join([_table(data), _NEWSWIRE_LICENCE if data["source"] == "newswire" else _AG_NEWS_LICENCE]),
    }
    title, *rest = sections
    parts = [_front_matter(record), f"# {title}\n\n{sections[title]}"]
    parts += [f"## {heading}\n\n{sections[heading]}" for heading in rest]
    return "\n\n".join(parts) + "\n"


def _is_published(record: AdapterRecord) -> bool:
    """Whether the base is named by its id on the hub; a base of one's own is known by the hash of its weights."""
    return not record.revision.startswith("sha256:")


def _front_matter(record: AdapterRecord) -> str:
    lines = ["---", "library_name: peft", "pipeline_tag: text-classification", "language: en", "tags: [lora, ag-news]"]
    if _is_published(record):
        lines.append(f"base_model: {json.dumps(record.hub_id)}")
    return "\n".join([*lines, "---"])


def _introduction(version: Version, record: AdapterRecord) -> str:
    base = code(record.hub_id)
    revision = f"{base} at revision {code(record.revision)}"
    own = f"{base}, a local model whose `model.safetensors` has the SHA-256 {code(record.weights_sha256)}"
    budget = int(version.tags["budget"])
    return (
        f"A LoRA adapter that labels English news items as one of {text(', '.join(record.labels))}.\n\n"
        f"- Base: {revision if _is_published(record) else own}\n"
        f"- Trainable parameters: {record.trainable_parameters:,}, of a budget of {budget:,}\n"
        f"- Found by: trial {code(version.tags['trial'])} of study {code(version.tags['study'])}"
    )


def _results(version: Version) -> str:
    validation = (
        f"- Validation split: accuracy {float(version.tags['validation_accuracy']):.2%} on "
        f"{int(version.tags['validation_rows']):,} rows. It chose this adapter among others, so it is optimistic."
    )
    test = recorded_score(version) or "not scored: this version has not been promoted."
    lines = [f"- Test split, scored once: {test}", validation]
    if mean := _confirmed_mean(version):
        lines.append(f"- Validation split, the same configuration trained from several seeds: {mean}.")
    return "\n".join(lines)


def _confirmed_mean(version: Version) -> str | None:
    """Mean and spread over the seeds that the winner was confirmed with, in words; None where it was not."""
    tags = version.tags
    if "confirmation_mean_accuracy" not in tags:
        return None
    spread = tags.get("confirmation_std_accuracy")
    deviation = f" (standard deviation {100 * float(spread):.2f} points)" if spread else ""
    mean, seeds = float(tags["confirmation_mean_accuracy"]), int(tags["confirmation_seeds"])
    return f"mean accuracy {mean:.2%} over {seeds} seeds{deviation}"


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


def _configuration(record: AdapterRecord, params: Mapping[str, str]) -> dict[str, str]:
    spec = {key: str(value) for key, value in record.spec.as_dict().items()}
    settings = {key: params[key] for key in _SETTINGS if key in params}
    return spec | settings | {"max_length": str(record.max_length)}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {text(key)} | {text(value)} |" for key, value in rows.items())])
