"""Texts as token ids: tokenised once, kept on disk, memory-mapped by every trial and process."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agnews_lora.data.rows import Rows
from agnews_lora.errors import BaseModelError, StorageError

_VOCABULARIES: Final = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_CHUNK_ROWS: Final = 10_000  # tokenised at once: bounds the memory that Python's lists of ids take
_ENTRY: Final = "table.json"
_IDS: Final = "ids.npy"
_OFFSETS: Final = "offsets.npy"


@dataclass(frozen=True)
class TokenTable:
    """Token ids and labels of rows, in order.

    ids: (total_tokens,) int32, all rows one behind the other. offsets: (rows + 1,) int64, row i is
    `ids[offsets[i]:offsets[i + 1]]`. labels: (rows,) int64. pad_id: the tokenizer's. digest: SHA-256 (hex) of what the
    table follows from: rows, tokenizer and maximal length.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    pad_id: int
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(rows,) tokens of each row, special ones included."""
        return np.diff(self.offsets)

    def row(self, index: int) -> npt.NDArray[np.int32]:
        """(tokens,) ids of one row."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def padded(
        self, rows: Sequence[int], multiple_of: int = 1
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(input_ids (b, width), attention_mask (b, width), labels (b,)) of some rows, padded on the right.

        width: tokens of the longest row, rounded up to a multiple of `multiple_of`.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        width = -(-int(lengths.max()) // multiple_of) * multiple_of
        mask = np.arange(width) < lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.row(row) for row in chosen])
        return input_ids, mask.astype(np.int64), self.labels[chosen]

    def take(self, rows: Sequence[int]) -> "TokenTable":
        """The table of some rows, in the order given, in memory."""
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[chosen]
        return TokenTable(
            ids=np.concatenate([self.row(row) for row in chosen]) if len(chosen) else np.empty(0, dtype=np.int32),
            offsets=_offsets(lengths),
            labels=self.labels[chosen],
            pad_id=self.pad_id,
            digest=_sha256(self.digest.encode(), chosen.astype("<i8").tobytes()),
        )


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 (hex) over the files that a tokenizer is read from.

    Raises:
        BaseModelError: no tokenizer there.
    """
    for vocabulary in _VOCABULARIES:
        if all((folder / name).is_file() for name in vocabulary):
            names = [*vocabulary, "tokenizer_config.json"]
            files = [folder / name for name in names if (folder / name).is_file()]
            return _sha256(*(part for file in files for part in (file.name.encode(), file.read_bytes())))
    choices = " or ".join(" + ".join(names) for names in _VOCABULARIES)
    raise BaseModelError(f"{folder} needs a tokenizer ({choices}), but holds none; copy it there")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (`transformers.PreTrainedTokenizerFast`), read without the hub.

    Raises:
        BaseModelError: files that no tokenizer can be read from, or one without a padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare `Exception`
        raise BaseModelError(f"the tokenizer in {folder} cannot be read ({error}); fetch its files again") from error
    if tokenizer.pad_token_id is None:
        raise BaseModelError(f"the tokenizer in {folder} needs a padding token, but has none; add it to its files")
    return tokenizer


def tokenise(rows: Rows, tokenizer_folder: Path, max_length: int, cache: Path) -> TokenTable:
    """The token table of some rows: from `cache/<digest>/` where it lies, else made and stored there.

    Rows longer than `max_length` are cut, special tokens kept. A damaged entry is made anew. Processes that make the
    same entry at the same time do not disturb each other.

    Raises:
        BaseModelError: a tokenizer that cannot be read.
        StorageError: a cache that cannot be written.
        ValueError: no rows.
    """
    if not len(rows):
        raise ValueError("at least one row is needed, but got none")
    digest = _sha256(rows.digest().encode(), tokenizer_digest(tokenizer_folder).encode(), str(max_length).encode())
    labels = np.asarray(rows.labels, dtype=np.int64)
    entry = cache / digest
    stored = _open(entry)
    if stored is None:
        ids, offsets, pad_id = _encode(rows.texts, load_tokenizer(tokenizer_folder), max_length)
        try:
            stored = _store(entry, ids, offsets, pad_id)
        except OSError as error:
            raise StorageError(
                f"the token cache {cache} must be writable, but is not ({error.strerror}); free it or make it writable"
            ) from error
    return TokenTable(stored.ids, stored.offsets, labels, stored.pad_id, digest)


@dataclass(frozen=True)
class _Stored:
    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    pad_id: int


def _encode(
    texts: Sequence[str], tokenizer: Any, max_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], int]:
    ids: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(texts), _CHUNK_ROWS):
        encoded = tokenizer(
            list(texts[start : start + _CHUNK_ROWS]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        ids.extend(np.asarray(row, dtype=np.int32) for row in encoded)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return np.concatenate(ids), _offsets(lengths), int(tokenizer.pad_token_id)


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _store(entry: Path, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], pad_id: int) -> _Stored:
    """Write an entry beside its place, open it, and move it there whole.

    It is opened before it is moved: should another process have put the same entry there first, this one is dropped,
    and its open maps stay readable.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        np.save(draft / _IDS, ids)
        np.save(draft / _OFFSETS, offsets)
        files = {name: _sha256((draft / name).read_bytes()) for name in (_IDS, _OFFSETS)}
        (draft / _ENTRY).write_text(json.dumps({"pad_id": pad_id, "files": files}), encoding="utf-8")
        stored = _Stored(np.load(draft / _IDS, mmap_mode="r"), np.load(draft / _OFFSETS, mmap_mode="r"), pad_id)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        try:
            draft.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
        return stored
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _open(entry: Path) -> _Stored | None:
    """What lies in the cache, or None where nothing does or where it is not what was written."""
    try:
        written = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if any(_sha256((entry / name).read_bytes()) != written["files"][name] for name in (_IDS, _OFFSETS)):
            return None
        ids, offsets = (np.load(entry / name, mmap_mode="r") for name in (_IDS, _OFFSETS))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _Stored(ids, offsets, written["pad_id"])


def _sha256(*parts: bytes) -> str:
    """Over all parts, each behind its length, so that no two lists of parts collide."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{len(part)}\n".encode())
        sha.update(part)
    return sha.hexdigest()
