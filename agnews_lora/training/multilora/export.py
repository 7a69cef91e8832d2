"""A trial's tensors in and out of PEFT: drawn as PEFT draws them, written as PEFT writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from agnews_lora.adapters.adapter_files import record_of, save_adapter, verify
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.training.interface import TrialPlan
from agnews_lora.training.model import build_model


def fresh_weights(base: BaseModel, plan: TrialPlan, num_labels: int) -> dict[str, Tensor]:
    """{PEFT's name: tensor} of a trial before its first step, drawn from its seed by the reference engine's own code.

    Raises:
        BudgetError: the built trainable tensors do not count what the budget was checked with.
    """
    model = build_model(base, plan.spec, num_labels, plan.seed)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def export_adapter(
    base: BaseModel, plan: TrialPlan, labels: Sequence[str], max_length: int, weights: Mapping[str, Tensor]
) -> Path:
    """Write a trial's adapter in PEFT's format, read it back and recount it; its folder.

    Raises:
        AdapterError: what was read back is not bit for bit what the slot held, or does not recount.
    """
    model = build_model(base, plan.spec, len(labels), plan.seed)
    set_peft_model_state_dict(model, dict(weights))
    record = record_of(plan.trial, plan.spec, base, labels, max_length)
    folder = plan.folder / "adapter"
    save_adapter(model, record, folder)
    verify(folder, weights)
    return folder
