"""Texts as token ids: tokenised once and kept as safetensors files."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from agnews_lora.data.rows import Rows
from agnews_lora.errors import BaseModelError, StorageError

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_CHUNK_ROWS: Final = 10_000  # tokenised at once: bounds the memory that Python's lists of ids take


@dataclass(frozen=True)
class TokenTable:
    """Token ids and labels of rows, in order.

    Args:
        ids: (total_tokens,) int32, the rows concatenated.
        offsets: (rows + 1,) int64, row i is `ids[offsets[i]:offsets[i + 1]]`.
        labels: (rows,) int64.
        pad_id: the tokenizer's.
        uncut: (rows,) int32, tokens of each row before it was cut; None where that is not known.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    pad_id: int
    uncut: npt.NDArray[np.int32] | None = None

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
        self, rows: Sequence[int], multiple_of: int = 1, at_most: int | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(input_ids (b, width), attention_mask (b, width), labels (b,)) of some rows, padded on the right.

        width: tokens of the longest row, rounded up to a multiple of `multiple_of`, or to `at_most`.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        width = -(-int(lengths.max()) // multiple_of) * multiple_of
        if at_most is not None:  # a base has no positions beyond, not for padding either
            width = min(width, at_most)
        mask = np.arange(width) < lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.row(row) for row in chosen])
        return input_ids, mask.astype(np.int64), self.labels[chosen]

    def take(self, rows: Sequence[int]) -> "TokenTable":
        """The table of some rows, in the order given, in memory."""
        chosen = np.asarray(rows, dtype=np.int64)
        return _table([self.row(row) for row in chosen], self.labels[chosen], self.pad_id)


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 (hex) over a tokenizer's files."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return _sha256(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer (`transformers.PreTrainedTokenizerFast`), read without the hub.

    Raises:
        BaseModelError: files that no tokenizer can be read from, or one without a padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare `Exception`
        raise BaseModelError(f"Cannot read the tokenizer in {folder}: {error}. Fetch its files again.") from error
    if tokenizer.pad_token_id is None:
        raise BaseModelError(f"Cannot use the tokenizer in {folder}: it has no padding token. Add it to its files.")
    return tokenizer


def tokenise(rows: Rows, tokenizer_folder: Path, max_length: int, cache: Path) -> TokenTable:
    """The token table of some rows: read from `cache/<digest>.safetensors`, or made and stored there.

    The digest is over rows, tokenizer and `max_length`. A damaged file is made anew. Processes may store the same
    table at the same time.

    Raises:
        BaseModelError: a tokenizer that cannot be read.
        StorageError: a cache that cannot be written.
    """
    digest = _sha256(rows.digest().encode(), tokenizer_digest(tokenizer_folder).encode(), str(max_length).encode())
    path = cache / f"{digest}.safetensors"
    with suppress(OSError, ValueError):
        table = read_table(path)
        if table.uncut is not None:  # else another release wrote it
            return table
    table = encode(rows, load_tokenizer(tokenizer_folder), max_length)
    beside = cache / f"{digest}.{uuid4().hex}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_table(table, beside)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise StorageError(
            f"Cannot write the token cache {cache}: {error.strerror}. Free it or make it writable."
        ) from error
    return table


def write_table(table: TokenTable, path: Path) -> None:
    """Write a table to a safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    columns = {name: column for name, column in vars(table).items() if column is not None}
    columns |= {"pad_id": np.array([table.pad_id])}
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    path.write_bytes(save(arrays, metadata={"sha256": _checksum(arrays)}))


def read_table(path: Path) -> TokenTable:
    """The table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no table, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if file.metadata() != {"sha256": _checksum(arrays)}:
                raise ValueError(f"{path} is damaged")
        return TokenTable(pad_id=int(arrays.pop("pad_id")[0]), **arrays)
    except (SafetensorError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a token table ({error})") from error


def encode(rows: Rows, tokenizer: Any, max_length: int) -> TokenTable:
    """The token table of some rows, those longer than `max_length` cut with their special tokens kept."""
    ids: list[npt.NDArray[np.int32]] = []
    uncut: list[int] = []
    special = tokenizer.num_special_tokens_to_add()
    for start in range(0, len(rows), _CHUNK_ROWS):
        encoded = tokenizer(
            list(rows.texts[start : start + _CHUNK_ROWS]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids.extend(np.asarray(row, dtype=np.int32) for row in encoded["input_ids"])
        # The rest of a row that is cut comes in pieces, each with special tokens of its own.
        uncut.extend(
            len(row.ids) + sum(len(piece.ids) - special for piece in row.overflowing) for row in encoded.encodings
        )
    table = _table(ids, np.asarray(rows.labels, dtype=np.int64), int(tokenizer.pad_token_id))
    return replace(table, uncut=np.asarray(uncut, dtype=np.int32))


def _table(rows: Sequence[npt.NDArray[np.int32]], labels: npt.NDArray[np.int64], pad_id: int) -> TokenTable:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return TokenTable(np.concatenate([np.empty(0, dtype=np.int32), *rows]), offsets, labels, pad_id)


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    return _sha256(*(part for name in sorted(arrays) for part in (name.encode(), arrays[name].tobytes())))


def _sha256(*parts: bytes) -> str:
    """Over all parts, each behind its length, so that no two lists of parts collide."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{len(part)}\n".encode())
        sha.update(part)
    return sha.hexdigest()
