"""The engine against a training loop written out here: torch and PEFT, nothing of Trainer's and nothing of this package
but the order of the data."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, set_seed

from agnews_lora.adapters.spec import Family
from agnews_lora.training.data_order import batches
from agnews_lora.training.interface import TrainPoint
from tests.training.conftest import SETTINGS, STEPS, Lab, losses, plan, train

ALPHA, RANK, LEARNING_RATE, SEED = 4, 2, 1e-2, 7


def fresh_base(lab: Lab) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        lab.base.folder,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )


def forward(model: torch.nn.Module, lab: Lab, split: str, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of some rows, padded by hand."""
    table = getattr(lab.corpus, split)
    tokens = [torch.from_numpy(table.row(row).astype(np.int64)) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(tokens, batch_first=True, padding_value=table.pad_id)
    attention_mask = pad([torch.ones_like(row) for row in tokens], batch_first=True, padding_value=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits, torch.from_numpy(table.labels[rows])


def reference(lab: Lab, targets: list[str], head: str) -> tuple[list[float], list[float], peft.PeftModel]:
    """(losses, learning rates, model) of a plain loop over AdamW, linear warm-up and decay, and clipping."""
    set_seed(SEED)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
    model = peft.get_peft_model(fresh_base(lab), config)
    if head == "out_proj" and lab.base.shape.family == "roberta":
        model.base_model.model.classifier.modules_to_save.default.dense.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.items() if not name.endswith("bias")], "weight_decay": 0.01},
            {"params": [p for name, p in trained.items() if name.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    warmup = 2
    step_losses, learning_rates = [], []
    order = [rows for epoch in (0, 1) for rows in batches(lab.corpus.train.lengths.tolist(), 8, SEED, epoch)]
    for step, rows in enumerate(order):
        rate = step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * LEARNING_RATE
        logits, labels = forward(model.train(), lab, "train", rows)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
        learning_rates.append(rate * LEARNING_RATE)
    return step_losses, learning_rates, model.eval()


def all_logits(model: torch.nn.Module, lab: Lab) -> np.ndarray:
    with torch.inference_mode():
        return forward(model, lab, "validation", list(range(len(lab.corpus.validation))))[0].numpy()


TARGETS = {"qv": ["query", "value"], "ffn": [r"intermediate.dense", *(f"layer.{n}.output.dense" for n in range(2))]}


@pytest.mark.parametrize(
    ("family", "head", "targets"),
    [("roberta", "full", "qv"), ("roberta", "out_proj", "ffn"), ("bert", "full", "ffn"), ("bert", "out_proj", "qv")],
)
def test_trains_as_a_plain_loop_does(
    labs: dict[Family, Lab], tmp_path: Path, family: Family, head: str, targets: str
) -> None:
    from agnews_lora.adapters.spec import TrialSpec

    lab = labs[family]
    spec = TrialSpec(targets, RANK, ALPHA, dropout=0.0, learning_rate=LEARNING_RATE, head=head)
    recorder = train(lab, [plan(tmp_path, spec=spec, seed=SEED)], SETTINGS)
    [result] = recorder.results
    expected_losses, expected_rates, model = reference(lab, TARGETS[targets], head)
    points: list[TrainPoint] = losses(recorder.train_points)
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([point.loss for point in points], expected_losses, rtol=1e-4)
    np.testing.assert_allclose([point.learning_rate for point in points], expected_rates, rtol=1e-9)
    assert result.adapter is not None
    torch.manual_seed(SEED + 1)  # a head that is not the one trained from
    loaded = peft.PeftModel.from_pretrained(fresh_base(lab), result.adapter).eval()
    np.testing.assert_allclose(all_logits(loaded, lab), all_logits(model, lab), atol=2e-4)
    assert np.abs(all_logits(loaded, lab)).max() > 0.1
