"""An adapter's files: whole or not there, what was trained to the last bit, read by plain PEFT, and hard to fool."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, set_seed

from agnews_lora.adapters.adapter_files import (
    CONFIG,
    RECORD,
    WEIGHTS,
    AdapterRecord,
    load_base,
    load_with_peft,
    lora_config,
    read_record,
    read_tensors,
    record_of,
    recount,
    save_adapter,
    tensor_shapes,
    verify,
)
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.adapters.budget import trainable_parameters
from agnews_lora.adapters.families import LAYOUTS, Family
from agnews_lora.adapters.spec import HEADS, TrialSpec
from agnews_lora.data.newswire import LABELS
from agnews_lora.errors import AdapterError, BaseModelError
from tests.tiny import HIDDEN_SIZE, tiny_base

FAMILIES: list[Family] = list(LAYOUTS)  # type: ignore[arg-type]
SPEC = TrialSpec(targets="qkvo", rank=3, alpha=6, dropout=0.1, learning_rate=1e-3)
DENSE = "base_model.model.classifier.dense.weight"
LORA_A = "base_model.model.roberta.encoder.layer.1.attention.self.query.lora_A.weight"
LORA_B = "base_model.model.roberta.encoder.layer.1.attention.self.query.lora_B.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, BaseModel]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: resolve(str(tiny_base(folder / f"tiny-{family}", family))) for family in FAMILIES}


def drawn_model(base: BaseModel, spec: TrialSpec = SPEC, seed: int = 3) -> peft.PeftModel:
    """A model whose adapters and head are no longer what PEFT initialises them with."""
    set_seed(seed)
    model = peft.get_peft_model(load_base(base, len(LABELS)), lora_config(spec, base))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.normal_(std=0.3)
    return model.eval()


def record(base: BaseModel, spec: TrialSpec = SPEC) -> AdapterRecord:
    return record_of("t0007", spec, base, LABELS, 48)


def logits(model: torch.nn.Module) -> np.ndarray:
    tokens = torch.arange(5, 35).reshape(3, 10)
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()


@pytest.fixture
def adapter(bases: dict[Family, BaseModel], tmp_path: Path) -> Path:
    """A whole adapter on the tiny RoBERTa."""
    base = bases["roberta"]
    save_adapter(drawn_model(base), record(base), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# Written -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), [("bert", "full"), ("roberta", "full"), ("roberta", "out_proj")])
@pytest.mark.parametrize("targets", ["qk", "all-linear"])
def test_what_is_read_back_is_what_was_held(
    bases: dict[Family, BaseModel], tmp_path: Path, family: Family, head: str, targets: str
) -> None:
    base, spec, folder = bases[family], replace(SPEC, targets=targets, head=head), tmp_path / "adapter"
    model = drawn_model(base, spec)
    save_adapter(model, record(base, spec), folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, RECORD}
    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = read_tensors(folder)
    assert tensors.keys() == held.keys() == tensor_shapes(spec, base.shape).keys()
    assert all(tensors[name].numpy().tobytes() == held[name].numpy().tobytes() for name in held)
    assert recount(folder) == trainable_parameters(spec, base.shape)
    assert read_record(folder) == record(base, spec)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_on_a_fresh_head_answers_alike(
    bases: dict[Family, BaseModel], tmp_path: Path, family: Family, head: str
) -> None:
    base, spec, folder = bases[family], replace(SPEC, head=head), tmp_path / "adapter"
    model = drawn_model(base, spec)
    save_adapter(model, record(base, spec), folder)
    expected = logits(model)
    for seed in (11, 12):  # whatever the new head is drawn as
        torch.manual_seed(seed)
        plain = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=len(LABELS))
        fresh = logits(plain.eval())
        loaded = peft.PeftModel.from_pretrained(plain, folder).eval()
        np.testing.assert_allclose(logits(loaded), expected, atol=1e-5)
        assert np.abs(fresh - expected).max() > 0.1
    np.testing.assert_allclose(logits(load_with_peft(folder, base)), expected, atol=1e-5)


def test_no_file_holds_a_path_of_this_machine(adapter: Path, bases: dict[Family, BaseModel]) -> None:
    base = bases["roberta"]
    assert base.folder.is_absolute()
    config = json.loads((adapter / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny-roberta", base.revision)
    assert read_record(adapter).base == "tiny-roberta"
    for path in adapter.iterdir():
        for folder in (str(base.folder), str(base.folder.parent), str(adapter.parent), str(Path.home())):
            assert folder.encode() not in path.read_bytes()


def test_a_known_base_is_named_by_hub_id_and_revision(bases: dict[Family, BaseModel], tmp_path: Path) -> None:
    base = replace(
        bases["bert"], name="embedded:minilm", hub_id="sentence-transformers/all-MiniLM-L6-v2", revision="c9"
    )
    save_adapter(drawn_model(base), record(base), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert config["revision"] == "c9"
    assert read_record(tmp_path / "adapter").base == "embedded:minilm"


def test_saving_again_replaces_the_files(adapter: Path, bases: dict[Family, BaseModel]) -> None:
    base, spec = bases["roberta"], replace(SPEC, rank=1)
    (adapter / "stranger.txt").write_text("not an adapter's file")
    shutil.copytree(adapter, adapter.with_name("adapter.partial"))  # as an interrupted process leaves it
    save_adapter(drawn_model(base, spec), record(base, spec), adapter)
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    assert {path.name for path in adapter.iterdir()} == {CONFIG, WEIGHTS, RECORD}
    assert read_record(adapter).spec.rank == 1


def test_what_does_not_recount_is_not_written(adapter: Path, bases: dict[Family, BaseModel]) -> None:
    """And what was there before stays."""
    base = bases["roberta"]
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(AdapterError, match="Cannot use the adapter"):
        save_adapter(drawn_model(base, replace(SPEC, rank=2)), record(base), adapter)
    with pytest.raises(AdapterError, match="Cannot use the adapter"):
        save_adapter(drawn_model(base, replace(SPEC, rank=2)), record(base), adapter.with_name("new"))
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", [LORA_A, DENSE])
def test_one_bit_is_enough_to_be_found(adapter: Path, name: str) -> None:
    held = load_file(adapter / WEIGHTS)
    verify(adapter, held)
    changed = held[name].clone()
    changed.view(torch.int32).flatten()[5] ^= 1
    with pytest.raises(AdapterError, match=f"{name} was not read back as it was written"):
        verify(adapter, {**held, name: changed})
    with pytest.raises(AdapterError, match="extra was not read back as it was written"):
        verify(adapter, {**held, "extra": torch.zeros(1)})


# Read ----------------------------------------------------------------------------------------------------------------


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[LORA_B]


def turn(tensors: dict[str, torch.Tensor]) -> None:
    """The same number of parameters in another shape."""
    tensors[LORA_A] = tensors[LORA_A].T.contiguous()


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LORA_A] = torch.zeros(4, HIDDEN_SIZE)


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.classifier.extra"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, rf"{LORA_B} is absent, but \(32, 3\)"),
        (turn, rf"{LORA_A} is \(32, 3\), but \(3, 32\)"),
        (grow, rf"{LORA_A} is \(4, 32\), but \(3, 32\)"),
        (add, r"classifier.extra is \(2,\), but absent"),
    ],
)
def test_other_tensors_than_the_specifications_are_refused(
    adapter: Path, bases: dict[Family, BaseModel], change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    change_tensors(adapter, change)
    for use in (recount, lambda folder: load_with_peft(folder, bases["roberta"])):
        with pytest.raises(AdapterError, match=rf"{said} by specification \(qkvo r=3 .*\)"):
            use(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields: fields["spec"].update(rank=2), r"\(3, 32\), but \(2, 32\) by specification \(qkvo r=2 .*\)"),
        (lambda fields: fields.update(trainable_parameters=17), f"2,724 in {WEIGHTS} and 17 in {RECORD}, but 2,724 by"),
        # The file cannot tell whether `dense` was frozen; the record's own count can.
        (lambda fields: fields["spec"].update(head="out_proj"), f"1,668 in {WEIGHTS} and 2,724 in {RECORD}, but 1,668"),
    ],
)
def test_a_record_of_another_adapter_is_refused(adapter: Path, change: Callable[[dict], object], said: str) -> None:
    change_json(adapter / RECORD, change)
    with pytest.raises(AdapterError, match=said):
        recount(adapter)


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 12), ("r", 2), ("target_modules", ["query"])])
def test_a_configuration_that_means_something_else_is_refused(
    adapter: Path, bases: dict[Family, BaseModel], key: str, value: object
) -> None:
    change_json(adapter / CONFIG, lambda fields: fields.update({key: value}))
    with pytest.raises(AdapterError, match=rf"its {CONFIG} is .*, but .* by specification"):
        load_with_peft(adapter, bases["roberta"])


def test_another_base_is_refused(adapter: Path, bases: dict[Family, BaseModel], tmp_path: Path) -> None:
    other = resolve(str(tiny_base(tmp_path / "other", "roberta", seed=1)))
    message = "on .*other, whose weights are .{12}…: it was trained on tiny-roberta with weights .{12}…"
    with pytest.raises(AdapterError, match=message):
        load_with_peft(adapter, other)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(adapter: Path, bases: dict[Family, BaseModel], kept: int) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:kept])
    for use in (recount, lambda folder: load_with_peft(folder, bases["roberta"])):
        with pytest.raises(AdapterError, match="it is damaged"):
            use(adapter)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, RECORD])
def test_a_missing_file_is_named(adapter: Path, bases: dict[Family, BaseModel], name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterError, match=f"Cannot read .*{name}: no such file"):
        load_with_peft(adapter, bases["roberta"])


@pytest.mark.parametrize("name", [CONFIG, RECORD])
@pytest.mark.parametrize("text", ["", "[]", "{}", "17", '{"spec": {}}', "\ufeff{"])
def test_a_file_that_is_something_else_is_refused(adapter: Path, name: str, text: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(AdapterError, match=f"Cannot read .*{name}: it is damaged"):
        recount(adapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["spec"].update(targets="conv"),
        lambda fields: fields["spec"].update(rank="3"),
        lambda fields: fields["spec"].update(colour="red"),
        lambda fields: fields["shape"].pop("family"),
        lambda fields: fields.pop("labels"),
        lambda fields: fields.update(labels=4),
    ],
)
def test_a_record_that_means_nothing_is_refused(adapter: Path, change: Callable[[dict], object]) -> None:
    change_json(adapter / RECORD, change)
    with pytest.raises(AdapterError, match=f"Cannot read .*{RECORD}: it is damaged"):
        read_record(adapter)


# The base ------------------------------------------------------------------------------------------------------------


def changed(base: BaseModel, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> BaseModel:
    """A copy of a base whose tensors were changed."""
    shutil.copytree(base.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(folder))


def parameters(base: BaseModel, seed: int = 0) -> dict[str, torch.Tensor]:
    set_seed(seed)
    return load_base(base, len(LABELS)).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if torch.equal(first[name], second[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_alone_is_taken_from_a_folder(
    bases: dict[Family, BaseModel], tmp_path: Path, family: Family
) -> None:
    """Not the head of a classifier, whatever its labels, nor its loss, nor the adapter beside it."""
    base = bases[family]
    clean, head = parameters(base), base.shape.layout.head
    assert same(clean, parameters(base, seed=1)) == {
        n for n in clean if n not in head or n.endswith(("bias", "norm.weight"))
    }
    for num_labels, problem in ((4, "multi_label_classification"), (6, "regression")):
        folder = tmp_path / f"tuned-{num_labels}"
        shutil.copytree(base.folder, folder)
        tuned = AutoModelForSequenceClassification.from_pretrained(
            base.folder, num_labels=num_labels, problem_type=problem
        )
        tuned.save_pretrained(folder)
        model = peft.get_peft_model(tuned, lora_config(SPEC, base))
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(tensor)
        model.save_pretrained(folder)
        found = resolve(str(folder))
        taken = same(clean, parameters(found))
        if found.shape.family == family:
            assert taken == clean.keys()
        else:  # the classifier that was tuned on a BERT without a pooler has one
            assert family == "bert-no-pooler" and taken >= clean.keys() - head.keys()
        labels = torch.tensor([0, 1, 3])
        loaded = load_base(found, 4).eval()
        out = loaded(input_ids=torch.arange(5, 35).reshape(3, 10), labels=labels)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    ],
)
def test_a_base_is_read_as_others_store_it(
    bases: dict[Family, BaseModel], tmp_path: Path, stored: dict[str, str]
) -> None:
    """In half precision, with the names of old versions, buffers, a pooler and a language model's head."""
    base = bases["roberta"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensor, new = tensors.pop(name), name
            for ours, theirs in stored.items():
                new = new.replace(ours, theirs)
            tensors[new] = tensor if stored else tensor.half()
        tensors["roberta.embeddings.position_ids"] = torch.arange(130)[None]
        tensors["roberta.pooler.dense.weight"] = torch.ones(HIDDEN_SIZE, HIDDEN_SIZE)
        tensors["cls.seq_relationship.weight"] = torch.ones(2, HIDDEN_SIZE)

    clean, found = parameters(base), parameters(changed(base, tmp_path / "stored", change))
    for name, tensor in found.items():
        assert tensor.dtype == clean[name].dtype
        torch.testing.assert_close(tensor, clean[name], atol=0 if stored else 1e-3, rtol=0)


def test_tensors_of_the_encoder_that_are_not_computed_are_refused(
    bases: dict[Family, BaseModel], tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.0.attention.self.distance_embedding.weight"] = torch.ones(9, 16)

    base = changed(bases["bert"], tmp_path / "relative", change)
    with pytest.raises(BaseModelError, match=r"hold bert.*distance_embedding.weight \(1 tensors in all\), which"):
        load_base(base, len(LABELS))


def test_a_base_that_lacks_weights_is_refused(bases: dict[Family, BaseModel], tmp_path: Path) -> None:
    base = changed(bases["bert"], tmp_path / "less", lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(BaseModelError, match=r"lack bert.encoder.layer.1.output.dense.bias \(1 tensors in all\)"):
        load_base(base, len(LABELS))


def test_a_base_whose_configuration_is_anothers_is_refused(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "tiny", "roberta")
    change_json(folder / "config.json", lambda fields: fields.update(intermediate_size=48))
    with pytest.raises(BaseModelError, match=r"lack .*\(6 tensors in all\) in the shape of its configuration"):
        load_base(resolve(str(folder)), len(LABELS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_of_a_base_is_the_one_asked_for(bases: dict[Family, BaseModel], family: Family) -> None:
    for dropout in (0.0, 0.3):
        modules = load_base(bases[family], len(LABELS), dropout).modules()
        found = {module.p for module in modules if isinstance(module, torch.nn.Dropout)}
        assert found <= {dropout} and (found or dropout == 0)
