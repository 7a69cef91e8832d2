"""Random weights of a known shape, and what a machine is: `python -m benchmarks.throughput.models FOLDER [MODEL]`."""

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, PretrainedConfig, RobertaConfig

from agnews_lora.adapters.base_models import BaseModel, shape_of
from agnews_lora.adapters.spec import PRESETS, ModelShape, module_shape
from agnews_lora.data.rows import LABELS
from agnews_lora.training.device import device_name, has_bf16, training_device
from benchmarks.throughput.lengths import COLUMN
from benchmarks.throughput.measurement import MINILM, ROBERTA_BASE, Setup

SETUP = "setup.json"


def configuration(model: str) -> PretrainedConfig:
    """Of a known model, or of the `config.json` in a folder."""
    if model == ROBERTA_BASE:
        return RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    if model == MINILM:
        return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return AutoConfig.from_pretrained(model, local_files_only=True)


def matrix_parameters(shape: ModelShape) -> int:
    """Of the encoder layers' matrices, biases left out: what a token is multiplied with."""
    return shape.num_layers * sum(prod(module_shape(module, shape)) for module in PRESETS["all-linear"])


def write_random(model: str | None, folder: Path) -> Setup:
    """Write a classifier with random weights to `folder`, with the set-up beside it.

    model: a name, a folder with a `config.json`, or None for the one that suits the device.
    """
    device = training_device()
    model = model or (ROBERTA_BASE if device.type == "cuda" else MINILM)
    config = configuration(model)
    config.num_labels = len(LABELS)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(str(folder))
    shape = shape_of(str(folder), len(LABELS))
    setup = Setup(
        model=Path(model).name,
        matrix_parameters=matrix_parameters(shape),
        lengths=COLUMN[shape.family],
        device_type=device.type,
        device=device_name(device),
        bf16=has_bf16(device),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        peft=version("peft"),
    )
    (folder / SETUP).write_text(json.dumps(asdict(setup)), encoding="utf-8")
    return setup


def read_base(setup: Setup, folder: Path) -> BaseModel:
    """The base that `write_random` wrote; random weights have no hash to verify."""
    return BaseModel(setup.model, folder, setup.model, "random", "random", shape_of(str(folder), len(LABELS)))


def main(folder: str, model: str | None = None) -> None:
    """Write what `write_random` says to a folder."""
    write_random(model, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
