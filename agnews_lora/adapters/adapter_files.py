"""An adapter's files: PEFT's own format, with a record of its training beside it.

`adapter_config.json` and `adapter_model.safetensors` are what plain PEFT reads. `adapter_record.json` adds what those
files cannot tell: the trial's specification (a frozen part of the head is in the file too), the base model's hash and
the labels. The base is named by hub id and revision, never by a path.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from agnews_lora.adapters.base_models import BaseModel, weight_files
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import (
    ModelShape,
    TrialSpec,
    head_shapes,
    module_shape,
    target_modules,
    target_pattern,
)
from agnews_lora.errors import AdapterError, BaseModelError, StorageError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = "adapter_record.json"

# Tensors of an encoder that its classification model leaves out: a pooler that its head does not read, and buffers.
_HARMLESS = re.compile(r"\.pooler\.dense\.(weight|bias)$|position_ids$|token_type_ids$|inv_freq$")


@dataclass(frozen=True)
class AdapterRecord:
    """Specification, base, labels and cleaning (see `rows.CLEANING`) of a trained adapter.

    base: name in the experiment, without a directory's path.
    """

    trial: str
    spec: TrialSpec
    shape: ModelShape
    base: str
    hub_id: str
    revision: str
    weights_sha256: str
    labels: tuple[str, ...]
    max_length: int
    trainable_parameters: int
    clean: str | None = "ag_news"  # as adapters whose record has no such field were trained


def record_of(
    trial: str, spec: TrialSpec, base: BaseModel, labels: Sequence[str], max_length: int, clean: str | None = None
) -> AdapterRecord:
    """The record of a trial's adapter. A base that is a directory is named by the directory's name alone."""
    return AdapterRecord(
        trial=trial,
        spec=spec,
        shape=base.shape,
        base=Path(base.name).name if os.sep in base.name else base.name,
        hub_id=base.hub_id,
        revision=base.revision,
        weights_sha256=base.weights_sha256,
        labels=tuple(labels),
        max_length=max_length,
        trainable_parameters=trainable_parameters(spec, base.shape),
        clean=clean,
    )


def lora_config(spec: TrialSpec, base: BaseModel) -> "LoraConfig":
    """PEFT's configuration of a trial; the head trains beside the adapters (`modules_to_save`)."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        target_modules=target_pattern(spec.targets, base.shape.family),
        # PEFT adds `classifier`, in place.
        modules_to_save=list(base.shape.layout.saved) or None,
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=spec.dropout,
        bias="none",
        revision=base.revision,
    )


def save_adapter(model: "PeftModel", record: AdapterRecord, folder: Path) -> None:
    """Write the adapter's files to `folder`, whole or not at all, then read them back.

    Raises:
        AdapterError: what was read back is not bit for bit what the model holds, or does not recount.
        StorageError: the folder cannot be written.
    """
    from peft import get_peft_model_state_dict

    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(str(beside), save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the export writes a real one
        # PEFT writes down the folder that the base was loaded from, which another machine does not have.
        fields = json.loads((beside / CONFIG).read_text(encoding="utf-8"))
        _write_json(beside / CONFIG, fields | {"base_model_name_or_path": record.hub_id, "revision": record.revision})
        names = dict(enumerate(record.labels))
        ids = {name: index for index, name in names.items()}
        # Under the names that transformers has for them, for those who load the adapter elsewhere.
        _write_json(beside / RECORD, asdict(record) | {"id2label": names, "label2id": ids})
        verify(beside, get_peft_model_state_dict(model, save_embedding_layers=False))
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"Cannot write the adapter of {record.trial} to {folder}: {getattr(error, 'strerror', None) or error}. "
            "Free or unlock that folder and start again: the trial resumes from its last checkpoint."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Compare an adapter's file with the tensors it was written from, and count it again.

    Raises:
        AdapterError: a tensor is missing, too many, or differs in any bit; or `recount` refuses the files.
    """
    import torch

    def bits(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.shape, tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()

    written = read_tensors(folder)
    for name in sorted(written.keys() | tensors.keys()):
        if name not in written or name not in tensors or bits(written[name]) != bits(tensors[name]):
            raise AdapterError(
                f"Cannot keep the adapter {folder.name}: {name} was not read back as it was written. Check the disk."
            )
    recount(folder)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise AdapterError(f"Cannot read {path}: no such file. Name a folder that a trial wrote.") from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"Cannot read {path}: it is damaged ({error}). Export the adapter again.") from error


def read_tensors(folder: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of an adapter's file.

    Raises:
        AdapterError: there is no such file, or it is not whole.
    """
    from safetensors.torch import load_file

    with _reading(folder / WEIGHTS):
        return load_file(folder / WEIGHTS)


def read_record(folder: Path) -> AdapterRecord:
    """The record beside an adapter.

    Raises:
        AdapterError: there is none, or it is not one.
    """
    with _reading(folder / RECORD):
        fields: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        spec, shape = TrialSpec(**fields["spec"]), ModelShape(**fields["shape"])
        trainable_parameters(spec, shape)  # an unknown family or preset, or a size that is no number cannot be counted
        if fields.get("clean") not in (None, "ag_news"):
            raise ValueError(f"clean is {fields['clean']!r}")
        for name in ("id2label", "label2id"):  # what `labels` says, for others
            fields.pop(name, None)
        return AdapterRecord(**{**fields, "spec": spec, "shape": shape, "labels": tuple(fields["labels"])})


def tensor_shapes(spec: TrialSpec, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor in an adapter's file; a frozen part of the head is among them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_layers):
        for module in target_modules(spec.targets, shape.family):
            out_features, in_features = module_shape(module, shape)
            path = f"base_model.model.{shape.layout.module_path(layer, module)}"
            shapes[f"{path}.lora_A.weight"] = (spec.rank, in_features)
            shapes[f"{path}.lora_B.weight"] = (out_features, spec.rank)
    return shapes | {f"base_model.model.{name}": sizes for name, sizes in head_shapes(shape).items()}


def recount(folder: Path) -> int:
    """Trainable parameters, counted from the tensors in the exported file.

    Raises:
        AdapterError: tensors, configuration or count are not those of the recorded specification.
    """
    record = read_record(folder)
    spec = record.spec

    def refusal(what: str, found: object, expected: object) -> AdapterError:
        return AdapterError(
            f"Cannot use the adapter {folder.name}: its {what} is {found}, but {expected} by specification ({spec})."
        )

    tensors = read_tensors(folder)
    present, expected_shapes = {name: tuple(t.shape) for name, t in tensors.items()}, tensor_shapes(spec, record.shape)
    for name in sorted(present.keys() | expected_shapes.keys()):
        if present.get(name) != expected_shapes.get(name):
            raise refusal(f"tensor {name}", present.get(name, "absent"), expected_shapes.get(name, "absent"))
    # Another alpha would load with plain PEFT, and answer otherwise.
    pattern = target_pattern(spec.targets, record.shape.family)
    meant = {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": pattern}
    with _reading(folder / CONFIG):
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        said = {key: fields[key] for key in meant}
    if said != meant:
        raise refusal(CONFIG, said, meant)
    layout = record.shape.layout
    counted = sum(t.numel() for name, t in tensors.items() if not layout.is_frozen(name, spec.head))
    expected = trainable_parameters(spec, record.shape)
    if not counted == expected == record.trainable_parameters:
        found = f"{counted:,} in {WEIGHTS} and {record.trainable_parameters:,} in {RECORD}"
        raise refusal("count of trainable parameters", found, f"{expected:,}")
    return counted


def load_with_peft(folder: Path, base: BaseModel) -> "PeftModel":
    """The adapter on a freshly loaded base, by PEFT's own reader: fp32, on the CPU, in evaluation mode.

    Raises:
        AdapterError: the base is not the one that the adapter was trained on, or `recount` refuses the files.
    """
    from peft import PeftModel

    record = read_record(folder)
    if base.weights_sha256 != record.weights_sha256:
        raise AdapterError(
            f"Cannot load the adapter on {base.name}, whose weights are {base.weights_sha256[:12]}…: it was trained on "
            f"{record.hub_id} with weights {record.weights_sha256[:12]}…. Give the base it was trained on."
        )
    recount(folder)
    return PeftModel.from_pretrained(load_base(base, num_labels=len(record.labels)), str(folder)).eval()


def load_base(base: BaseModel, num_labels: int, dropout: float = 0.0) -> "torch.nn.Module":
    """The base's encoder under a fresh, random head (from torch's global generator), fp32, on the CPU.

    Nothing else is taken from the folder: not its own head, no adapter beside it, no other loss than cross entropy.

    dropout: inside the base while training (hidden states, attention, classifier).

    Raises:
        BaseModelError: the weights lack tensors of the encoder, which transformers would draw at random and no
            adapter's file would carry, or have some that transformers does not compute.
    """
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of its own for reading some MB would tear the live table
    model: PreTrainedModel
    try:
        config = AutoConfig.from_pretrained(
            str(base.folder),
            local_files_only=True,
            num_labels=num_labels,
            problem_type="single_label_classification",
            **dict.fromkeys(base.shape.layout.dropouts, dropout),
        )
        family: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        model, info = family.from_pretrained(
            None,  # a path would apply an adapter that lies in the folder
            config=config,
            state_dict=_encoder_tensors(base),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except Exception as error:  # a configuration that makes no sense raises anything
        raise BaseModelError(
            f"Cannot load base model {base.name}: transformers does not build a model of {base.folder} ({error}). "
            "Copy or download it again."
        ) from error
    # PEFT looks for the configuration there as it saves, and would ask the hub where it has no path.
    model.name_or_path = model.config._name_or_path = str(base.folder)
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])} - base.shape.layout.head.keys()
    unknown = {name for name in info["unexpected_keys"] if not _HARMLESS.search(name)}
    for tensors, verb, remedy in (
        (absent, "lack", " in the shape of its configuration. Take the weights that belong to it"),
        (unknown, "hold", ", which transformers does not compute. Take another base model"),
    ):
        if tensors:
            raise BaseModelError(
                f"Cannot load base model {base.name}: the weights in {base.folder} {verb} {min(tensors)} "
                f"({len(tensors)} tensors in all){remedy}."
            )
    return model


def _encoder_tensors(base: BaseModel) -> dict[str, "torch.Tensor"]:
    """{name in the classification model: tensor} of the encoder alone, whatever model it was saved from."""
    from safetensors.torch import load_file

    prefix, head = f"{base.shape.layout.encoder}.", base.shape.layout.head
    files = weight_files(base.name, base.folder)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not any(name.startswith(prefix) for name in tensors):  # saved from the encoder itself
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) and name not in head}
