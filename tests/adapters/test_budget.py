"""The count of trainable parameters is PEFT's own, and no rank that the budget allows is lost or invented."""

import copy
import functools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import (
    feasible_ranks,
    head_parameters,
    max_rank,
    parameters_per_rank,
    require_within_budget,
    trainable_parameters,
)
from agnews_lora.adapters.spec import HEADS, PRESETS, ModelShape, TrialSpec, target_pattern
from agnews_lora.errors import BudgetError

ROBERTA_BASE = shape_of("roberta-base")
MINILM = shape_of("embedded:minilm")

presets = st.sampled_from(sorted(PRESETS))
heads = st.sampled_from(HEADS)
shapes = st.builds(
    ModelShape,
    family=st.sampled_from(["roberta", "bert"]),
    hidden_size=st.integers(1, 2048),
    num_layers=st.integers(1, 48),
    intermediate_size=st.integers(1, 8192),
    num_labels=st.integers(1, 100),
)


def trial_spec(targets: str, rank: int, head: str = "full") -> TrialSpec:
    return TrialSpec(targets, rank, alpha=2.0 * rank, dropout=0.0, learning_rate=1e-3, head=head)


@functools.cache
def meta_model(shape: ModelShape) -> Any:
    """A classifier of this shape without storage: counted and adapted, never run."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    common: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": 12,
        "num_labels": shape.num_labels,
    }
    with torch.device("meta"):
        if shape.family == "roberta":
            config = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **common)
            return RobertaForSequenceClassification(config)
        return BertForSequenceClassification(BertConfig(**common))


def peft_count(spec: TrialSpec, shape: ModelShape) -> int:
    """What PEFT counts on a model that it adapted itself."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=spec.rank, lora_alpha=spec.alpha, target_modules=target_pattern(spec.targets)
    )
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(meta_model(shape)), config)
    if spec.head == "out_proj" and shape.family == "roberta":
        model.base_model.model.classifier.modules_to_save["default"].dense.requires_grad_(False)
    count: int = model.get_nb_trainable_parameters()[0]
    return count


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("shape", "budget"), [(ROBERTA_BASE, 1_000_000), (MINILM, 100_000)], ids=["roberta-base", "minilm"]
)
def test_the_count_is_pefts_own(shape: ModelShape, budget: int, preset: str, head: str) -> None:
    largest = max_rank(preset, head, shape, budget)
    for rank in sorted({1, largest, largest + 1}):
        spec = trial_spec(preset, rank, head)
        assert trainable_parameters(spec, shape) == peft_count(spec, shape)


@settings(max_examples=15, deadline=None)
@given(presets, heads, st.integers(1, 256), st.sampled_from(["roberta", "bert"]), st.data())
def test_the_count_is_pefts_own_for_any_shape_and_rank(
    preset: str, head: str, rank: int, family: str, data: st.DataObject
) -> None:
    shape = ModelShape(
        family,  # type: ignore[arg-type]
        hidden_size=12 * data.draw(st.integers(1, 8)),
        num_layers=data.draw(st.integers(1, 3)),
        intermediate_size=data.draw(st.integers(1, 99)),
        num_labels=data.draw(st.integers(2, 9)),
    )
    spec = trial_spec(preset, rank, head)
    assert trainable_parameters(spec, shape) == peft_count(spec, shape)


@pytest.mark.parametrize("shape", [ROBERTA_BASE, MINILM], ids=["roberta-base", "minilm"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_exactly_its_modules(shape: ModelShape, preset: str) -> None:
    import torch

    pattern = target_pattern(preset)
    names = [name for name, module in meta_model(shape).named_modules() if isinstance(module, torch.nn.Linear)]
    expected = {
        f"{shape.family}.encoder.layer.{layer}.{module}"
        for layer in range(shape.num_layers)
        for module in PRESETS[preset]
    }
    assert {name for name in names if re.fullmatch(pattern, name)} == expected


@pytest.mark.parametrize(
    ("preset", "full", "out_proj"),
    [("qk", 11, 27), ("qv", 11, 27), ("qkv", 7, 18), ("qkvo", 5, 13), ("ffn", 4, 10), ("all-linear", 2, 6)],
)
def test_the_largest_ranks_under_a_million_on_roberta_base(preset: str, full: int, out_proj: int) -> None:
    assert max_rank(preset, "full", ROBERTA_BASE, 1_000_000) == full
    assert max_rank(preset, "out_proj", ROBERTA_BASE, 1_000_000) == out_proj


def test_the_counts_that_were_measured() -> None:
    assert head_parameters("full", ROBERTA_BASE) == 593_668
    assert head_parameters("out_proj", ROBERTA_BASE) == 3_076
    assert head_parameters("full", MINILM) == head_parameters("out_proj", MINILM) == 1_540
    assert trainable_parameters(trial_spec("qk", 4), ROBERTA_BASE) == 741_124
    assert trainable_parameters(trial_spec("qk", 2), ROBERTA_BASE) == 667_396
    assert trainable_parameters(trial_spec("all-linear", 2), MINILM) == 84_484
    assert parameters_per_rank("ffn", ROBERTA_BASE) == 92_160


@given(presets, heads, shapes, st.integers(0, 10**8))
def test_the_largest_rank_fits_and_the_next_does_not(preset: str, head: str, shape: ModelShape, budget: int) -> None:
    rank = max_rank(preset, head, shape, budget)
    assert rank >= 0
    assert rank == 0 or trainable_parameters(trial_spec(preset, rank, head), shape) <= budget
    assert trainable_parameters(trial_spec(preset, rank + 1, head), shape) > budget


@given(presets, heads, shapes, st.integers(1, 10**8), st.integers(1, 512))
def test_a_breach_is_an_error_with_the_numbers_in_it(
    preset: str, head: str, shape: ModelShape, budget: int, rank: int
) -> None:
    spec = trial_spec(preset, rank, head)
    count = trainable_parameters(spec, shape)
    if count <= budget:
        assert require_within_budget(spec, shape, budget) == count
        return
    with pytest.raises(BudgetError) as caught:
        require_within_budget(spec, shape, budget)
    fits = max_rank(preset, head, shape, budget)
    assert f"{count:,} trainable parameters > budget {budget:,}" in str(caught.value)
    assert ("no rank of it fits" if fits == 0 else f"the largest rank that fits is {fits}") in str(caught.value)


@given(
    st.lists(presets, min_size=1, unique=True), st.lists(heads, min_size=1, unique=True), shapes, st.integers(1, 10**8)
)
def test_feasible_ranks_are_all_that_fit_in_the_order_given(
    names: list[str], searched: list[str], shape: ModelShape, budget: int
) -> None:
    expected = {
        (preset, head): rank
        for preset in names
        for head in searched
        if (rank := max_rank(preset, head, shape, budget)) > 0
    }
    if expected:
        feasible = feasible_ranks(names, searched, shape, budget)
        assert feasible == expected
        assert list(feasible) == list(expected)
    else:
        with pytest.raises(BudgetError, match=f"budget {budget:,} fits no adapter"):
            feasible_ranks(names, searched, shape, budget)


def test_a_budget_that_fits_nothing_names_the_smallest_that_would() -> None:
    cheapest = 593_668 + 36_864
    with pytest.raises(BudgetError, match=f"needs {cheapest:,} trainable parameters at rank 1"):
        feasible_ranks(list(PRESETS), ["full"], ROBERTA_BASE, cheapest - 1)
    assert feasible_ranks(list(PRESETS), ["full"], ROBERTA_BASE, cheapest) == {("qk", "full"): 1, ("qv", "full"): 1}
