from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import HEADS, PRESETS, TrialSpec
from agnews_lora.errors import BudgetError
from agnews_lora.training.model import build_model, recount
from tests.training.conftest import SPEC, TinySetup

specs = st.builds(
    TrialSpec,
    targets=st.sampled_from(sorted(PRESETS)),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 8.0]),
    dropout=st.just(0.0),
    learning_rate=st.just(1e-3),
    head=st.sampled_from(HEADS),
)


@given(specs, st.sampled_from(["bert", "roberta"]))
@settings(max_examples=15)
def test_what_trains_is_what_the_budget_counts(
    setups: dict[Family, TinySetup], spec: TrialSpec, family: Family
) -> None:
    base = setups[family].base
    model = build_model(base, spec, num_labels=4, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == model.get_nb_trainable_parameters()[0] == trainable_parameters(spec, base.shape)
    assert recount(model, spec, base) == trained


def test_the_seed_draws_adapters_and_head(setups: dict[Family, TinySetup]) -> None:
    def drawn(family: Family, seed: int) -> dict[str, torch.Tensor]:
        model = build_model(setups[family].base, SPEC, num_labels=4, seed=seed)
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    for family in setups:
        first, again, other = drawn(family, 1), drawn(family, 1), drawn(family, 2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        changed = {name for name in first if not torch.equal(first[name], other[name])}
        assert changed == {name for name in first if not name.endswith(("lora_B.default.weight", "bias"))}


def test_only_the_last_layer_of_the_head_trains(setups: dict[Family, TinySetup]) -> None:
    model = build_model(setups["roberta"].base, replace(SPEC, head="out_proj"), num_labels=4, seed=0)
    head = {name for name, tensor in model.named_parameters() if tensor.requires_grad and "lora" not in name}
    prefix = "base_model.model.classifier.modules_to_save.default.out_proj"
    assert head == {f"{prefix}.weight", f"{prefix}.bias"}


def test_dropout_of_the_base_is_the_settings_and_of_the_adapters_the_trials(setups: dict[Family, TinySetup]) -> None:
    spec = replace(SPEC, dropout=0.2)
    for setup in setups.values():
        model = build_model(setup.base, spec, num_labels=4, seed=0, base_dropout=0.3)
        dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
        assert {p for name, p in dropouts.items() if "lora_" in name} == {0.2}
        assert {p for name, p in dropouts.items() if "lora_" not in name} == {0.3}


def test_a_model_that_counts_otherwise_is_refused(setups: dict[Family, TinySetup]) -> None:
    base = setups["roberta"].base
    wider = replace(base, shape=replace(base.shape, hidden_size=64))
    message = r"qv r=2 .*: the built model has 1,700 trainable parameters, .* with 5,444"
    with pytest.raises(BudgetError, match=message):
        build_model(wider, SPEC, num_labels=4, seed=0)
    thawed = build_model(base, SPEC, num_labels=4, seed=0)
    thawed.base_model.model.roberta.embeddings.word_embeddings.requires_grad_(True)
    with pytest.raises(BudgetError):
        recount(thawed, SPEC, base)


def test_a_larger_rate_for_b_is_a_larger_alpha(setups: dict[Family, TinySetup]) -> None:
    """LoRA+ (Hayou et al. 2024) trains B at a multiple of A's rate. AdamW's steps do not depend on a gradient's scale,
    so that alpha times the multiple, which is searched, is the same training."""
    tokens, labels = torch.arange(5, 37).view(8, 4), torch.arange(8) % 4

    def trained(alpha: float, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        model = build_model(setups["bert"].base, replace(SPEC, dropout=0.0, alpha=alpha), num_labels=4, seed=0).eval()
        of_b = [tensor for name, tensor in model.named_parameters() if "lora_B" in name]
        rest = [tensor for name, tensor in model.named_parameters() if tensor.requires_grad and "lora_B" not in name]
        groups = [{"params": of_b, "lr": 1e-3 * ratio}, {"params": rest, "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups, eps=1e-12, weight_decay=0.0)
        before = model(input_ids=tokens).logits.detach()
        for _ in range(10):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
        return before, model(input_ids=tokens).logits.detach()

    (before, plus), (_, larger), (_, plain) = trained(4.0, 8.0), trained(32.0, 1.0), trained(4.0, 1.0)
    torch.testing.assert_close(plus, larger, rtol=1e-4, atol=1e-5)
    assert (plus - before).abs().max() > 0.1 and (plus - plain).abs().max() > 0.01
