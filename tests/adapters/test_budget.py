"""The count of trainable parameters is PEFT's own, and no rank that the budget allows is lost or invented."""

import copy
import functools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.adapters.adapter_files import tensor_shapes
from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import (
    feasible_ranks,
    head_parameters,
    max_rank,
    parameters_per_rank,
    require_within_budget,
    trainable_parameters,
)
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.adapters.spec import (
    HEADS,
    PRESETS,
    ModelShape,
    TrialSpec,
    is_adaptable,
    target_modules,
    target_pattern,
)
from agnews_lora.errors import BudgetError, ConfigError
from tests.tiny import tiny_config

ROBERTA_BASE = shape_of("roberta-base")
MINILM = shape_of("embedded:minilm")

FAMILIES: list[Family] = list(LAYOUTS)  # type: ignore[arg-type]
presets = st.sampled_from(sorted(PRESETS))
heads = st.sampled_from(HEADS)
shapes = st.builds(
    ModelShape,
    family=st.sampled_from([family for family in FAMILIES if family != "modernbert"]),
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
    from transformers import AutoModelForSequenceClassification

    sizes = (shape.hidden_size, shape.num_layers, shape.intermediate_size)
    config = tiny_config(
        shape.family,
        **dict(zip(shape.layout.sizes, sizes, strict=True)),
        num_attention_heads=12,
        num_labels=shape.num_labels,
    )
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def adapted(spec: TrialSpec, shape: ModelShape) -> Any:
    """What PEFT makes of the classifier. Of a head `out_proj`, all but its last layer is frozen."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=target_pattern(spec.targets, shape.family),
        modules_to_save=list(shape.layout.saved),
    )
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(meta_model(shape)), config)
    if spec.head == "out_proj":
        last = re.compile(r"classifier\.modules_to_save\.default\.(out_proj\.)?(weight|bias)$")
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name and (not last.search(name) or "pre_classifier" in name):
                parameter.requires_grad_(False)
    return model


def peft_count(spec: TrialSpec, shape: ModelShape) -> int:
    """What PEFT counts on a model that it adapted itself."""
    count: int = adapted(spec, shape).get_nb_trainable_parameters()[0]
    return count


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_and_the_files_tensors_are_pefts_own_for_every_family(family: Family, head: str) -> None:
    from peft import get_peft_model_state_dict

    shape = ModelShape(family, hidden_size=24, num_layers=2, intermediate_size=36, num_labels=3)
    for preset in PRESETS:
        if not is_adaptable(preset, family):
            continue
        spec = trial_spec(preset, 2, head)
        model = adapted(spec, shape)
        assert trainable_parameters(spec, shape) == model.get_nb_trainable_parameters()[0]
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == tensor_shapes(spec, shape)


@pytest.mark.parametrize("preset", ["qk", "qv"])
def test_a_part_of_a_fused_matrix_is_refused_by_name(preset: str) -> None:
    shape = ModelShape("modernbert", hidden_size=24, num_layers=2, intermediate_size=36, num_labels=3)
    with pytest.raises(
        ConfigError, match=rf"adapt {preset} alone on modernbert.*attn\.Wqkv.*qkv, qkvo, ffn or all-linear"
    ):
        trainable_parameters(trial_spec(preset, 1), shape)
    assert max_rank(preset, "full", shape, 10**9) == 0


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


@settings(max_examples=15)
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

    pattern = target_pattern(preset, shape.family)
    names = [name for name, module in meta_model(shape).named_modules() if isinstance(module, torch.nn.Linear)]
    expected = {
        shape.layout.module_path(layer, module)
        for layer in range(shape.num_layers)
        for module in target_modules(preset, shape.family)
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
