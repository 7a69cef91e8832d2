"""Masks depend on trial seed, step, layer, module, row, place and feature alone, and drop as many as asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.adapters.families import Family
from agnews_lora.training.multilora.dropout import Dropout, DropoutKey, Mask
from agnews_lora.training.multilora.packing import DeviceTokens
from tests.training.conftest import TinySetup

CPU = torch.device("cpu")
ROWS = [3, 11, 40, 7, 29, 60]
FEATURES = 33
OWN = DropoutKey(0.4, seed=7, step=5)


def masks(
    setup: TinySetup,
    slot: int,
    own: DropoutKey,
    neighbours: dict[int, DropoutKey],
    layer: int = 0,
    module: int = 0,
) -> dict[tuple[int, int], torch.Tensor]:
    """{(row, place): mask of a token's features} of a slot's tokens."""
    segments = [(slot, ROWS), *((other, [1, 2, 5 + other]) for other in neighbours)]
    packed = DeviceTokens(setup.corpus.train, CPU, None).pack(segments)
    mask = Dropout(packed, {slot: own, **neighbours}).layer(layer)
    of_tokens = ones(mask, module)
    assert torch.equal(ones(mask.of(packed.rows.first), module), of_tokens[packed.rows.first])
    segment = packed.slots.index(slot)
    described = zip(
        packed.token_segments.tolist(), packed.token_rows.tolist(), packed.positions.tolist(), of_tokens, strict=True
    )
    real = list(described)[: packed.rows.total]
    found = {(row, place): kept for number, row, place, kept in real if number == segment}
    assert len(found) == sum(setup.corpus.train.lengths[row] for row in ROWS)
    return found


def ones(mask: Mask, module: int, features: int = FEATURES) -> torch.Tensor:
    """What a module's mask leaves of ones."""
    return mask.apply(torch.ones(len(mask.tokens), features), slice(0, len(mask.tokens)), module)


def test_neighbours_change_nothing(roberta: TinySetup) -> None:
    alone = masks(roberta, 0, OWN, {})
    among = masks(roberta, 2, OWN, {0: DropoutKey(0.1, 3, 17), 1: DropoutKey(0.9, 7, 5), 3: DropoutKey(0.0, 7, 5)})
    for token, mask in alone.items():
        assert torch.equal(mask, among[token])


def test_a_part_of_the_tokens_has_its_own_mask() -> None:
    x = torch.ones(40, FEATURES)
    mask, parts = mask_of(40, 0.4), [slice(0, 11), slice(11, 40)]
    whole = mask.apply(x, slice(0, 40), 2)
    assert torch.equal(torch.cat([mask_of(40, 0.4).apply(x[part], part, 2) for part in parts]), whole)
    assert torch.equal(mask.apply(2 * x, slice(0, 40), 2), 2 * whole)  # once more as before


def mask_of(num_tokens: int, probability: float) -> Mask:
    bounds = torch.full((num_tokens,), round(probability * 2**15) - 1, dtype=torch.int16)
    return Mask(torch.arange(num_tokens, dtype=torch.int32) * 65_537, bounds, salt=1, drops=(True,))


@pytest.mark.parametrize(
    ("key", "layer", "module"),
    [(DropoutKey(0.4, 8, 5), 0, 0), (DropoutKey(0.4, 7, 6), 0, 0), (OWN, 1, 0), (OWN, 0, 1)],
    ids=["seed", "step", "layer", "module"],
)
def test_seed_step_layer_and_module_each_change_it(
    roberta: TinySetup, key: DropoutKey, layer: int, module: int
) -> None:
    one = torch.stack(list(masks(roberta, 0, OWN, {}).values()))
    other = torch.stack(list(masks(roberta, 0, key, {}, layer=layer, module=module).values()))
    both = (one * other).mean().item()
    assert both == pytest.approx(0.6 * 0.6, abs=0.05)  # as unrelated draws overlap


@given(probability=st.floats(0.0, 0.95), seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6))
@settings(max_examples=25)
def test_as_many_are_dropped_as_asked_for(
    setups: dict[Family, TinySetup], probability: float, seed: int, step: int
) -> None:
    packed = DeviceTokens(setups["roberta"].corpus.train, CPU, None).pack([(0, [1]), (1, list(range(60)))])
    dropout = Dropout(packed, {1: DropoutKey(probability, seed, step)})
    own = packed.tokens.parts[1]
    mask = dropout.layer(2).apply(torch.ones(packed.tokens.sizes[1], 96), own, 3)
    deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs((mask == 0).double().mean().item() - probability) < 5 * deviation + 2**-15
    assert dropout.factors.tolist() == pytest.approx([1.0, 1 / (1 - probability)], rel=1e-3)


def test_tokens_and_features_are_dropped_independently() -> None:
    mask = ones(mask_of(4_000, 0.5), 2, features=256) - 0.5
    for pairs in (mask.T @ mask / len(mask), mask @ mask.T / mask.shape[1]):
        count = mask.numel() / len(pairs)
        correlations = 4 * pairs.fill_diagonal_(0) * count**0.5  # of standard deviation 1 where nothing is related
        assert correlations.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
        assert correlations.abs().max() < 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 31, 32])
def test_what_is_kept_stays_as_it_is(dtype: torch.dtype, features: int) -> None:
    x = torch.empty(50, features, dtype=dtype).uniform_(0.5, 1.0)  # none is 0 by itself
    kept = mask_of(50, 0.3).apply(x, slice(0, 50), 1)
    where = kept != 0
    assert 0.4 < where.float().mean() < 0.95
    assert torch.equal(kept[where], x[where])
    assert torch.equal(where, ones(mask_of(50, 0.3), 1, features) != 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_what_a_cpu_keeps() -> None:
    x, mask = torch.randn(300, 3072, dtype=torch.bfloat16), mask_of(300, 0.25)
    there = Mask(mask.tokens.cuda(), mask.bounds.cuda(), mask.salt, mask.drops)
    assert torch.equal(there.apply(x.cuda(), slice(0, 300), 3).cpu(), mask.apply(x, slice(0, 300), 3))
