"""Masks depend on trial seed, step, layer, module, row, place and feature alone, and drop as many as asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.adapters.families import Family
from agnews_lora.training.multilora.dropout import Dropout, DropoutKey, HashDropout, hash_dropout
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
    flat: bool,
    layer: int = 0,
    module: int = 0,
) -> dict[tuple[int, int], torch.Tensor]:
    """{(row, place): mask of a token's features} of a slot's tokens."""
    segments = [(slot, ROWS), *((other, [1, 2, 5 + other]) for other in neighbours)]
    packed = DeviceTokens(setup.corpus.train, CPU, flat, None).pack(segments)
    dropout = Dropout(packed, {slot: own, **neighbours}, num_slots=4)
    of_tokens = HashDropout.apply(
        torch.ones(len(packed.ids), FEATURES), *dropout.layer(layer).keys(module, of_rows=False)
    )
    of_rows = HashDropout.apply(
        torch.ones(len(packed.first), FEATURES), *dropout.layer(layer).keys(module, of_rows=True)
    )
    assert torch.equal(of_rows, of_tokens[packed.first])
    described = zip(
        packed.token_slots.tolist(), packed.token_rows.tolist(), packed.positions.tolist(), of_tokens, strict=True
    )
    lengths = setup.corpus.train.lengths
    found: dict[tuple[int, int], torch.Tensor] = {}
    for token_slot, row, place, mask in described:
        if token_slot == slot:
            found.setdefault((row, place), mask)  # padding comes behind the row's first token, whose place it repeats
    assert len(found) == sum(lengths[row] for row in ROWS)
    return found


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
def test_neighbours_and_layout_change_nothing(roberta: TinySetup, flat: bool) -> None:
    alone = masks(roberta, 0, OWN, {}, flat=False)
    among = masks(
        roberta, 2, OWN, {0: DropoutKey(0.1, 3, 17), 1: DropoutKey(0.9, 7, 5), 3: DropoutKey(0.0, 7, 5)}, flat
    )
    for token, mask in alone.items():
        assert torch.equal(mask, among[token])


@pytest.mark.parametrize(
    ("key", "layer", "module"),
    [(DropoutKey(0.4, 8, 5), 0, 0), (DropoutKey(0.4, 7, 6), 0, 0), (OWN, 1, 0), (OWN, 0, 1)],
    ids=["seed", "step", "layer", "module"],
)
def test_seed_step_layer_and_module_each_change_it(
    roberta: TinySetup, key: DropoutKey, layer: int, module: int
) -> None:
    one = torch.stack(list(masks(roberta, 0, OWN, {}, flat=True).values()))
    other = torch.stack(list(masks(roberta, 0, key, {}, flat=True, layer=layer, module=module).values()))
    both = (one * other).mean().item()
    assert both == pytest.approx(0.6 * 0.6, abs=0.05)  # as unrelated draws overlap


@given(probability=st.floats(0.0, 0.95), seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_as_many_are_dropped_as_asked_for(
    setups: dict[Family, TinySetup], probability: float, seed: int, step: int
) -> None:
    packed = DeviceTokens(setups["roberta"].corpus.train, CPU, True, None).pack([(1, list(range(60)))])
    dropout = Dropout(packed, {1: DropoutKey(probability, seed, step)}, num_slots=2)
    mask = HashDropout.apply(torch.ones(len(packed.ids), 96), *dropout.layer(2).keys(3, of_rows=False))
    deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs((mask == 0).double().mean().item() - probability) < 5 * deviation + 2**-15
    assert dropout.factors.tolist() == pytest.approx([1.0, 1 / (1 - probability)], rel=1e-3)


def test_tokens_and_features_are_dropped_independently() -> None:
    keys = torch.arange(4_000, dtype=torch.int32) * 65_537
    mask = HashDropout.apply(torch.ones(4_000, 256), keys, torch.full((4_000, 1), 2**14 - 1, dtype=torch.int16)) - 0.5
    for pairs in (mask.T @ mask / len(mask), mask @ mask.T / mask.shape[1]):
        count = mask.numel() / len(pairs)
        correlations = 4 * pairs.fill_diagonal_(0) * count**0.5  # of standard deviation 1 where nothing is related
        assert correlations.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
        assert correlations.abs().max() < 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_feature_does(dtype: torch.dtype) -> None:
    x = torch.empty(50, 31, dtype=dtype).uniform_(0.5, 1.0).requires_grad_()  # none is 0 by itself
    bounds = torch.full((50, 1), round(0.3 * 2**15) - 1, dtype=torch.int16)
    kept = HashDropout.apply(x, torch.arange(50, dtype=torch.int32), bounds)
    gradient = torch.randn_like(kept)
    kept.backward(gradient)
    where = kept != 0
    assert 0.5 < where.float().mean() < 0.9
    assert torch.equal(kept[where], x.detach()[where])
    assert x.grad is not None and torch.equal(x.grad, gradient * where)


@pytest.mark.parametrize("features", [1, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_keeps_the_same_features(dtype: torch.dtype, features: int) -> None:
    x = torch.randn(200, features, dtype=dtype, requires_grad=True)
    keys = torch.randint(-(2**31), 2**31, (200,), dtype=torch.int32)
    bounds = torch.tensor([-1, 0, 2**13, 2**14, 2**15 - 2], dtype=torch.int16).repeat(40)[:, None]
    found = [call(x, keys, bounds) for call in (HashDropout.apply, hash_dropout)]
    assert torch.equal(*found)
    gradient = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(each, x, gradient)[0] for each in found))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_what_a_cpu_keeps() -> None:
    x = torch.randn(300, 3072, dtype=torch.bfloat16)
    keys = torch.arange(300, dtype=torch.int32) * 65_537
    bounds = torch.full((300, 1), 2**13, dtype=torch.int16)
    expected = HashDropout.apply(x, keys, bounds)
    for call in (HashDropout.apply, hash_dropout, torch.compile(hash_dropout)):
        assert torch.equal(call(*(each.cuda() for each in (x, keys, bounds))).cpu(), expected)
