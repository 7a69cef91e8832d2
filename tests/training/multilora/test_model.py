"""A slot's logits and gradients against PEFT on the Hugging Face model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.base_models import CONFIG
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import TokenTable, encode, load_tokenizer
from agnews_lora.training.model import build_model
from agnews_lora.training.multilora import packing
from agnews_lora.training.multilora.dropout import DropoutKey
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.kernels.reference import Kernels
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.packing import (
    TILE,
    DeviceTokens,
    Segments,
    bucket_of,
    in_one_copy,
    on_device,
    positions,
    tables_of,
)
from agnews_lora.training.multilora.slots import Slots, SlotState
from agnews_lora.training.multilora.threads import Threads
from tests.training.conftest import MAX_LENGTH, TinySetup

CPU = torch.device("cpu")
NEIGHBOUR = TrialSpec("all-linear", rank=3, alpha=6, dropout=0.0, learning_rate=1e-2)
ROWS = [3, 11, 40, 7, 29, 60]


def model_of(setup: TinySetup, num_slots: int) -> MultiLoraModel:
    encoder = Encoder(load_base(setup.base, 4), setup.base.shape.family, CPU, torch.float32)
    return MultiLoraModel(encoder, setup.base.shape, num_slots)


def trained_model(setup: TinySetup, spec: TrialSpec, seed: int = 7) -> torch.nn.Module:
    """A trial's PEFT model whose B is not zero, as after some steps."""
    model = build_model(setup.base, spec, 4, seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def state_of(model: torch.nn.Module) -> SlotState:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return SlotState.fresh({name: tensor.detach().clone() for name, tensor in tensors.items()})


def expected(
    model: torch.nn.Module, setup: TinySetup, rows: list[int]
) -> tuple[np.ndarray, float, dict[str, torch.Tensor]]:
    """(logits, loss, {PEFT's name: gradient}) by Hugging Face's own forward pass."""
    ids, mask, labels = setup.corpus.train.padded(rows)
    out = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), labels=torch.from_numpy(labels))
    out.loss.backward()
    gradients = {
        name.replace(".default.", ".").replace(".modules_to_save", "").replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return out.logits.detach().numpy(), out.loss.item(), gradients


def own_gradients(slots: Slots, gradients: torch.Tensor, slot: int) -> dict[str, torch.Tensor]:
    spec = slots.specs[slot]
    assert spec is not None
    return {name: part.clone() for name, part in slots.tensors(gradients[slot], spec)}


OTHERS: list[Family] = ["bert-no-pooler", "xlm-roberta", "camembert", "electra", "distilbert"]
# Each preset and head with each family.
CASES = [
    ("roberta", "full", "all-linear"),
    ("roberta", "out_proj", "all-linear"),
    ("roberta", "full", "qk"),
    ("roberta", "out_proj", "qv"),
    ("roberta", "full", "ffn"),
    ("bert", "full", "all-linear"),
    ("bert", "out_proj", "qkv"),
    ("bert", "full", "qkvo"),
    ("bert", "out_proj", "ffn"),
    *((family, head, "all-linear") for family in OTHERS for head in ("full", "out_proj")),
]


@pytest.mark.parametrize(("family", "head", "targets"), CASES)
def test_logits_and_gradients_are_those_of_peft(
    setups: dict[Family, TinySetup], family: Family, head: str, targets: str
) -> None:
    setup = setups[family]
    spec = TrialSpec(targets, rank=2, alpha=4, dropout=0.0, learning_rate=1e-2, head=head)
    model = trained_model(setup, spec)
    logits, loss, gradients = expected(model, setup, ROWS)
    tested = model_of(setup, num_slots=2)
    tested.slots.place(0, NEIGHBOUR, state_of(trained_model(setup, NEIGHBOUR, seed=9)))
    tested.slots.place(1, spec, state_of(model))
    tokens = DeviceTokens(setup.corpus.train, CPU, tested.encoder.padding_id)
    packed = tokens.pack([(1, ROWS), (0, [1, 2, 5])])
    assert not (packed.ids[: packed.rows.total] == tokens.pad_id).any()
    losses, own = tested.gradients(packed, {})
    tested.slots.zero_frozen(own)
    assert losses[1].item() == pytest.approx(loss, rel=1e-5)
    found = own_gradients(tested.slots, own, 1)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, tensor in found.items():
        if name in gradients:
            assert gradients[name].any()
            difference = (tensor - gradients[name]).norm()
            assert difference <= 1e-5 * gradients[name].norm() + 1e-6 * largest  # rounded where the largest are summed
        else:
            assert setup.base.shape.layout.is_frozen(name, head) and not tensor.any()
    assert gradients.keys() <= found.keys()
    scored = np.empty((2, len(ROWS), 4), dtype=np.float32)
    for order, batch in tested.logits(tokens, ROWS, [0, 1], batch_size=4):
        scored[:, order] = batch
    np.testing.assert_allclose(scored[1], logits, rtol=1e-5, atol=1e-5)
    assert np.abs(scored[0] - scored[1]).max() > 1e-2


@pytest.mark.parametrize("padding", ["inside rows", "other in the configuration"])
def test_tokens_of_the_padding_id_get_the_positions_of_transformers(
    roberta: TinySetup, tmp_path: Path, padding: str
) -> None:
    """Rows with a literal `<pad>`, and a tokenizer that pads with another id than config.json names."""
    base, texts = roberta.base, ["<pad> The striker", "A <pad><pad> record<pad>", "Oil prices rose", "<pad>"]
    if padding == "other in the configuration":
        folder = shutil.copytree(base.folder, tmp_path / "base")
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"pad_token_id": 0}))
        base = replace(base, folder=folder)
    table = encode(Rows(tuple(texts), (0, 1, 2, 3)), load_tokenizer(base.folder), MAX_LENGTH)
    setup = TinySetup(base, replace(roberta.corpus, train=table))
    model, rows = trained_model(setup, NEIGHBOUR).eval(), list(range(len(texts)))
    tested = model_of(setup, num_slots=1)
    tested.slots.place(0, NEIGHBOUR, state_of(model))
    tokens = DeviceTokens(table, CPU, tested.encoder.padding_id)
    [(order, [found])] = tested.logits(tokens, rows, [0], batch_size=4)
    np.testing.assert_allclose(found, expected(model, setup, order)[0], rtol=1e-5, atol=1e-5)


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    padding_id=st.integers(0, 4),
)
def test_positions_are_those_of_transformers(rows: list[list[int]], padding_id: int) -> None:
    ids, ends = np.concatenate(rows).astype(np.int32), np.cumsum([len(row) for row in rows])
    table = TokenTable(ids, np.concatenate([[0], ends]), np.zeros(len(rows), np.int64), pad_id=0)
    found = np.split(positions(table, padding_id), ends[:-1])
    for row, own in zip(rows, found, strict=True):
        [wanted] = RobertaEmbeddings.create_position_ids_from_input_ids(torch.tensor([row]), padding_id)
        assert own.tolist() == wanted.tolist()
    assert [own.tolist() for own in np.split(positions(table, None), ends[:-1])] == [list(range(len(r))) for r in rows]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_with_dropout_a_step_does_not_depend_on_neighbours(setups: dict[Family, TinySetup], family: Family) -> None:
    """The same loss and gradient norm in slot 0 of one and in slot 2 of three; others at another step or seed."""
    setup = setups[family]
    spec = replace(NEIGHBOUR, dropout=0.4)
    tokens = DeviceTokens(setup.corpus.train, CPU, model_of(setup, 1).encoder.padding_id)
    state = state_of(trained_model(setup, spec))

    def step(num_slots: int, number: int, seed: int) -> tuple[float, float]:
        tested = model_of(setup, num_slots)
        batches = []
        for slot in range(num_slots):
            own = slot == num_slots - 1
            tested.slots.place(slot, spec if own else replace(spec, dropout=0.1 * slot), state)
            rows = ROWS if own else [1, 2, 5 + slot]
            batches.append(SlotBatch(slot, rows, 0.0, number if own else 17, seed if own else 3))
        losses, norms = tested.step(tokens, batches, 0.0, 0.0).tolist()
        return losses[-1], norms[-1]

    alone = step(1, 5, 7)
    assert step(3, 5, 7) == pytest.approx(alone, rel=1e-6)
    for other in (step(1, 6, 7), step(1, 5, 8)):
        assert abs(other[0] / alone[0] - 1) > 1e-4


def test_a_step_is_the_same_however_many_threads_share_it(roberta: TinySetup) -> None:
    tokens = DeviceTokens(roberta.corpus.train, CPU, padding_id=1)
    rows = list(range(0, 80, 5))
    spec = replace(NEIGHBOUR, dropout=0.2)
    found = []
    for number in (1, 2, 5):
        tested = model_of(roberta, 2)
        assert tested.threads is not None
        tested.threads = Threads(number)
        tested.slots.place(1, spec, state_of(trained_model(roberta, spec)))
        losses, norms = tested.step(tokens, [SlotBatch(1, rows, 1e-3, 3, 11)], 0.01, 1.0).tolist()
        found.append((losses[1], norms[1], tested.slots.weights.clone()))
        scored = dict(enumerate(tested.logits(tokens, rows, [1], batch_size=3)))
        assert sorted(position for positions, _ in scored.values() for position in positions) == list(range(16))
    for losses_norms in found[1:]:
        torch.testing.assert_close(losses_norms, found[0], rtol=1e-5, atol=1e-6)


def test_threads_get_whole_batches_while_there_are_enough() -> None:
    rows = list(range(40))

    def sizes(threads: int, batches: int) -> list[list[int]]:
        return [[len(share) for share in shares] for shares in Threads(threads).shares([rows] * batches)]

    assert sizes(2, 2) == [[40], [40]]
    assert sizes(2, 3) == [[40], [40], [20, 20]]
    assert sizes(4, 2) == [[20, 20], [20, 20]]
    assert sizes(4, 3) == [[40], [40], [40]]
    assert sizes(32, 1) == [[8, 8, 8, 8, 8]]  # a pass over fewer takes hardly less time
    assert Threads(4).shares([[1, 2, 3]]) == [[[1, 2, 3]]]


def test_bf16_is_near_to_fp32(roberta: TinySetup) -> None:
    model = load_base(roberta.base, 4)
    state = state_of(trained_model(roberta, NEIGHBOUR))
    tokens = DeviceTokens(roberta.corpus.train, CPU, padding_id=1)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        tested = MultiLoraModel(Encoder(model, "roberta", CPU, dtype), roberta.base.shape, 1)
        tested.slots.place(0, NEIGHBOUR, state)
        [(_, found)] = tested.logits(tokens, ROWS, [0], batch_size=8)
        logits.append(found.numpy())
        assert tested.slots.weights.dtype == torch.float32
    np.testing.assert_allclose(logits[1], logits[0], atol=0.1 * np.abs(logits[0]).max())
    assert not np.array_equal(logits[1], logits[0])


@pytest.mark.parametrize("kernels", ["fastest", "torch"])
@pytest.mark.parametrize("family", ["bert", "roberta", *OTHERS])
def test_gradients_in_bf16_are_near_to_those_in_fp32(
    setups: dict[Family, TinySetup], family: Family, kernels: str
) -> None:
    """Of unlike trials in one pass, with dropout; and each is as alone."""
    setup = setups[family]
    specs = [
        replace(NEIGHBOUR, dropout=0.3),
        replace(NEIGHBOUR, targets="ffn", rank=9, dropout=0.1),
        replace(NEIGHBOUR, targets="qv"),
        replace(NEIGHBOUR, targets="qkvo", rank=1, dropout=0.5),
    ]
    batches = [SlotBatch(slot, [row + slot for row in ROWS[slot:]], 1e-3, 3, slot) for slot in range(len(specs))]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder = Encoder(load_base(setup.base, 4), family, CPU, dtype)
        # One head of twice the size, which there are kernels for: another encoder, but the same in both precisions.
        encoder.layers = [replace(layer, num_heads=1) for layer in encoder.layers]
        tested = MultiLoraModel(encoder, setup.base.shape, len(specs))
        if kernels == "torch":
            tested.choice.kernels = Kernels(encoder.layers)
        tokens = DeviceTokens(setup.corpus.train, CPU, encoder.padding_id)
        for slot, spec in enumerate(specs):
            tested.slots.place(slot, spec, state_of(trained_model(setup, spec)))
        keys = tested._dropout_keys(batches)
        losses, own = tested.gradients(tokens.pack([(batch.slot, batch.rows) for batch in batches]), keys)
        for batch in batches:
            loss, [alone] = tested.gradients(tokens.pack([(batch.slot, batch.rows)]), keys)
            bound = 1e-5 if dtype == torch.float32 else 0.02
            assert loss.item() == pytest.approx(losses[batch.slot].item(), rel=bound)
            assert (alone - own[batch.slot]).norm() <= bound * alone.norm()
        found.append((losses, own))
    (exact_losses, exact), (rounded_losses, rounded) = found
    torch.testing.assert_close(rounded_losses, exact_losses, rtol=0.05, atol=0.02)
    # Of most trials: with ReLU in its head, a trial's gradients may differ by a unit that rounding switches.
    assert ((rounded - exact).norm(dim=1) / exact.norm(dim=1)).median() < 0.2  # other masks: above 0.5


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 200))
def test_tiles_cover_each_segment_once_and_what_belongs_to_none(sizes: list[int], rest: int) -> None:
    parts = Segments(tuple(sizes)).parts
    total = sum(sizes) + rest
    rows = [(segment, row) for segment, part in enumerate(parts) for row in range(part.start, part.stop)]
    tiles, ends = tables_of(sizes, total)
    found = [(segment, row) for segment, start, end in tiles.T.tolist() for row in range(start, end)]
    assert found == [*rows, *((-1, row) for row in range(sum(sizes), total))]
    assert (tiles[2] - tiles[1]).min() >= 0 and (tiles[2] - tiles[1]).max() <= TILE
    assert ends.tolist() == [0, *(part.stop for part in parts)]
    assert tiles.shape == tables_of([total - len(sizes) + 1, *[1] * (len(sizes) - 1)], total)[0].shape


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    segments=st.dictionaries(st.integers(0, 2), st.lists(st.integers(0, 75), min_size=1, max_size=4), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    step=st.sampled_from([16, 200]),
)
def test_tokens_that_fill_a_bucket_change_nothing(
    roberta: TinySetup, segments: dict[int, list[int]], dtype: torch.dtype, step: int
) -> None:
    """By plain torch, and by C kernels where there are some."""
    encoder = Encoder(load_base(roberta.base, 4), "roberta", CPU, dtype)
    encoder.layers = [replace(layer, num_heads=1) for layer in encoder.layers]  # of a size that there are kernels for
    model = MultiLoraModel(encoder, roberta.base.shape, 3)
    for slot, (targets, dropout) in enumerate((("all-linear", 0.3), ("ffn", 0.0), ("qv", 0.1))):
        spec = replace(NEIGHBOUR, targets=targets, dropout=dropout)
        model.slots.place(slot, spec, state_of(trained_model(roberta, spec)))
    keys = {slot: DropoutKey(spec.dropout, 5, slot) for slot, spec in enumerate(model.slots.specs) if spec}
    tokens = DeviceTokens(roberta.corpus.train, CPU, encoder.padding_id)
    found = []
    with patch.object(packing, "SMALLEST_STEP", step):
        for most in (0, 10_000):
            layout = tokens.layout(list(segments.items()), most)
            packed = tokens.packed(layout, on_device(layout.arrays, CPU))
            found.append(model.gradients(packed, keys))
    assert layout.num_tokens % step == 0 and len(packed.ids) == layout.num_tokens
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for own, filled in zip(*found, strict=True):
        assert (own - filled).norm() <= tolerance * own.norm()


@given(st.integers(1, 10**6))
def test_a_bucket_holds_few_tokens_more(number: int) -> None:
    bucket = bucket_of(number)
    assert number <= bucket <= number + max(1023, number // 8) and bucket % 1024 == 0
    assert bucket_of(bucket) == bucket


def test_arrays_of_all_kinds_travel_in_one_copy() -> None:
    arrays = [
        np.arange(10).reshape(2, 5).T,  # not contiguous
        np.array([True, False, True]),
        np.zeros((0, 4), dtype=np.float32),
        np.array([[1.5, -2.5]], dtype=np.float32),
        np.array([-7], dtype=np.int32),
    ]
    moved = in_one_copy(arrays, CPU)
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
