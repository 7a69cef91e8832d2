"""A trial's model: the base with its adapters and head, initialised from a seed and counted."""

from peft import PeftModel, get_peft_model
from transformers import set_seed

from agnews_lora.adapters.adapter_files import load_base, lora_config
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import BudgetError


def build_model(base: BaseModel, spec: TrialSpec, num_labels: int, seed: int, base_dropout: float = 0.0) -> PeftModel:
    """Build the base with the trial's adapters and a fresh head, all initialised from `seed`: fp32, on the CPU.

    Raises:
        BudgetError: the built trainable tensors do not count as many as the budget was checked with.
        BaseModelError: the base's weights do not fit its configuration.
    """
    set_seed(seed)
    model = get_peft_model(load_base(base, num_labels, base_dropout), lora_config(spec, base))
    for name, parameter in model.named_parameters():
        if base.shape.layout.is_frozen(name, spec.head):
            parameter.requires_grad_(False)
    recount(model, spec, base)
    return model


def recount(model: PeftModel, spec: TrialSpec, base: BaseModel) -> int:
    """Count the trainable parameters on the built tensors.

    Raises:
        BudgetError: it is not the number that the budget was checked with.
    """
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    expected = trainable_parameters(spec, base.shape)
    if counted != expected:
        raise BudgetError(
            f"Cannot train {spec}: the built model has {counted:,} trainable parameters, but the budget was checked "
            f"with {expected:,}. The base {base.name} must be of the shape {base.shape}."
        )
    return counted
