"""A registered version as a folder that stands alone: PEFT's files or a whole model, the tokenizer and a model card."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError

from agnews_lora.adapters.adapter_files import AdapterRecord, load_with_peft, read_record, recount
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.data.rows import TextFault, usable_text
from agnews_lora.data.tokens import load_tokenizer
from agnews_lora.errors import DataError, StorageError
from agnews_lora.serving.model_package import Package, recorded_score
from agnews_lora.tracking.descriptions import code, text
from agnews_lora.tracking.versions import Version
from agnews_lora.training.device import training_device
from agnews_lora.training.interface import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TextClassificationPipeline

    from agnews_lora.tracking.registry import Registry

CARD: Final = "README.md"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_INPUTS: Final = ("input_ids", "attention_mask")  # of the model in training
# The run's params that a card shows: none of them can hold a path.
_SETTINGS: Final = ("seed", *(field.name for field in fields(TrainSettings)))
_MOST_LABELS: Final = 20  # named in a card's text
_AG_NEWS: Final = "fancyzhx/ag_news"
_AG_NEWS_LICENCE: Final = (
    "AG News is provided by its authors for research and other non-commercial activities; use a model trained on it "
    "accordingly."
)
_NEWSWIRE_LICENCE: Final = "The rows are made by the project itself (`newswire`); they carry no licence of others."
_CLEANED: Final = (
    "Texts were cleaned before training (entities, tags and backslashes of AG News). `agnews-lora predict` and `serve` "
    "do so too; elsewhere, clean texts of that kind with `agnews_lora.data.cleaning.clean`."
)


def export(registry: "Registry", version: Version, to: Path, merged: bool = False) -> Path:
    """Write a version to the folder `to`, which is new or empty, whole or not at all; its absolute path.

    No file in it holds a path of this machine: the base is named by its id on the hub and its revision.

    Args:
        merged: a whole model with the adapter in the base's weights, instead of PEFT's files.

    Raises:
        StorageError: something is in the folder already, or it cannot be written.
        RegistryError: the version's files are no longer those that were registered.
        AdapterError: they do not recount.
        BaseModelError: the base, which a whole model needs, is not where it was.
    """
    package = Package.verified(registry, version)
    recount(package.adapter)
    record = read_record(package.adapter)
    target = to.absolute()
    beside = target.with_name(f"{target.name}.partial")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise StorageError(f"Cannot export to {target}: it is not empty. Name a new or an empty folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        _copy(package.tokenizer, beside)
        # What calls the tokenizer with `truncation=True` alone cuts where training did, and gives no token types to
        # models that take none.
        config = json.loads((beside / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        config |= {"model_max_length": record.max_length, "model_input_names": list(_INPUTS)}
        written = json.dumps(config, indent=2, ensure_ascii=False)
        (beside / TOKENIZER_CONFIG).write_text(f"{written}\n", encoding="utf-8")
        if merged:
            merged_model(package.adapter, _base_of(version, record)).save_pretrained(str(beside))
        else:
            _copy(package.adapter, beside)
        card = _model_card(version, record, registry.run_params(version), merged)
        (beside / CARD).write_text(card, encoding="utf-8")
        beside.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"Cannot export to {target}: {reason}. Free or name another folder.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _copy(folder: Path, to: Path) -> None:
    """Copy a folder's files, not their modes: a project may be read-only."""
    for path in filter(Path.is_file, folder.rglob("*")):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def pipeline(package: Package) -> "TextClassificationPipeline":
    """A version as a text classification pipeline of transformers, which cleans and cuts texts as training did.

    Raises:
        AdapterError, BaseModelError: adapter or base are not what was registered.
    """
    from transformers import TextClassificationPipeline

    record = read_record(package.adapter)

    class Pipeline(TextClassificationPipeline):
        def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:  # type: ignore[override]
            try:
                text = usable_text(inputs, record.clean)
            except TextFault as fault:
                raise DataError(f"Cannot label {inputs!r}: it {fault}. Leave it out, or cut it.") from fault
            return super().preprocess(text, **{"truncation": True, **tokenizer_kwargs})

    tokenizer = load_tokenizer(package.tokenizer)
    tokenizer.model_max_length, tokenizer.model_input_names = record.max_length, list(_INPUTS)
    model = merged_model(package.adapter, _base_of(package.version, record))
    return Pipeline(model=model.eval(), tokenizer=tokenizer, device=training_device())


def _base_of(version: Version, record: AdapterRecord) -> BaseModel:
    return resolve(version.tags["base"], num_labels=len(record.labels))


def merged_model(adapter: Path, base: BaseModel) -> "PreTrainedModel":
    """Build the base with the adapter merged into it, configured as transformers is to load it."""
    from transformers import AutoConfig

    model: PreTrainedModel = load_with_peft(adapter, base).merge_and_unload()
    names = dict(enumerate(read_record(adapter).labels))
    # The base's own configuration: the loaded one has no dropout, and the base's path.
    model.config = AutoConfig.from_pretrained(
        str(base.folder),
        local_files_only=True,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        problem_type="single_label_classification",
    )
    return model


def _model_card(version: Version, record: AdapterRecord, params: Mapping[str, str], merged: bool) -> str:
    """Markdown with the front matter that the hub reads. params: of the run that trained the version."""
    tags, base = version.tags, code(record.hub_id)
    data: dict[str, str] = json.loads(tags["data"])
    settings = {key: params[key] for key in _SETTINGS if key in params}
    training = {**record.spec.as_dict(), **settings, "max_length": record.max_length}
    newswire = data["source"] == "newswire"
    ag_news = not newswire and (record.clean == "ag_news" or data.get("dataset") == _AG_NEWS)
    if _is_published(record):
        base_model, found_at = f"base_model: {json.dumps(record.hub_id)}\n", f" at revision {code(record.revision)}"
    else:
        weights = f"weights have the SHA-256 {code(record.weights_sha256)}"
        base_model, found_at = "", f", a local model whose {weights}"
    validation = f"accuracy {float(tags['validation_accuracy']):.2%}{_macro_f1(tags, 'validation_macro_f1')}"
    validation += f" on {int(tags['validation_rows']):,} rows"
    language = "language: en\n" if newswire or ag_news else ""
    datasets = f"datasets: [{json.dumps(data['dataset'])}]\n" if "dataset" in data else ""
    named = ", ".join(record.labels[:_MOST_LABELS])
    more = f" and {len(record.labels) - _MOST_LABELS:,} more" if len(record.labels) > _MOST_LABELS else ""
    known = {_NEWSWIRE_LICENCE: newswire, _AG_NEWS_LICENCE: ag_news, _CLEANED: record.clean == "ag_news"}
    about = "\n\n".join(sentence for sentence, holds in known.items() if holds)
    return (
        f"""---
library_name: {"transformers" if merged else "peft"}
pipeline_tag: text-classification
{language}{datasets}tags: [lora{", ag-news" if ag_news else ""}]
{base_model}---

# {text(version.model)}, version {version.number}

A LoRA adapter{", merged into its base," if merged else ""} that labels texts as one of {text(named)}{more}.

- Base: {base}{found_at}
- Trainable parameters: {record.trainable_parameters:,}, of a budget of {int(tags["budget"]):,}
- Found by: trial {code(tags["trial"])} of study {code(tags["study"])}

## Results

- Test split, scored once: {recorded_score(version) or "not scored: this version has not been promoted."}
- Validation split: {validation}. It chose this adapter among others, so it is optimistic.
{_confirmed_mean(tags)}
## Load it

{_MERGED_CODE if merged else _adapter_code(record)}

## Training

{_table(training)}

## Data

{_table(data | {"clean": record.clean or "nothing", "labels": str(len(record.labels))})}

{about}""".rstrip()
        + "\n"
    )


def _is_published(record: AdapterRecord) -> bool:
    """Whether the base is named by its id on the hub; a base of one's own is known by the hash of its weights."""
    return not record.revision.startswith("sha256:")


def _macro_f1(tags: Mapping[str, str], name: str) -> str:
    """Behind an accuracy; empty where an older version has none."""
    return f", macro-F1 {float(tags[name]):.2%}" if name in tags else ""


def _confirmed_mean(tags: Mapping[str, str]) -> str:
    """Mean over the seeds that the winner was confirmed with, as a line; empty where it was not."""
    if "confirmation_mean_accuracy" not in tags:
        return ""
    low, high = (tags.get(f"confirmation_{end}_accuracy") for end in ("low", "high"))
    interval = f" (95% interval {float(low):.2%} to {float(high):.2%})" if low and high else ""
    mean, seeds = float(tags["confirmation_mean_accuracy"]), int(tags["confirmation_seeds"])
    return (
        "- Validation split, the same configuration trained from several seeds: "
        f"mean accuracy {mean:.2%} over {seeds} seeds{interval}{_macro_f1(tags, 'confirmation_mean_macro_f1')}.\n"
    )


_MERGED_CODE: Final = """In this folder:

```python
from transformers import pipeline

FOLDER = "."
classify = pipeline("text-classification", model=FOLDER, truncation=True)
print(classify("Oil prices rose to a record as the central bank left its interest rate unchanged."))
```

`truncation=True` cuts a text where training did; without it, a text longer than the base's positions is an error."""


def _adapter_code(record: AdapterRecord) -> str:
    """Code that runs in the folder itself, with plain PEFT."""
    base = ""
    if not _is_published(record):
        base = f" The base is looked for in the folder {code(record.hub_id)} of the working directory: put it there."
    return f"""In this folder.{base} `agnews-lora export --merged` writes a model for `transformers.pipeline` instead.

```python
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

FOLDER = "."
LABELS = {json.dumps(list(record.labels), ensure_ascii=False)}

model = AutoPeftModelForSequenceClassification.from_pretrained(
    FOLDER,
    num_labels=len(LABELS),
    id2label=dict(enumerate(LABELS)),
    label2id={{label: index for index, label in enumerate(LABELS)}},
    ignore_mismatched_sizes=True,  # a head that the base has of its own
).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)

text = "Oil prices rose to a record as the central bank left its interest rate unchanged."
tokens = tokenizer(text, truncation=True, max_length={record.max_length}, return_tensors="pt")
with torch.inference_mode():
    probabilities = model(**tokens).logits.softmax(dim=-1)[0]
best = int(probabilities.argmax())
print(model.config.id2label[best], float(probabilities[best]))
```"""


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {text(key)} | {text(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])
