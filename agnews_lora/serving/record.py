"""The gate's yardstick: what an adapter's exported weights answered on the validation split when it was registered.

Kept as `gate_record.json` (where the numbers come from) and `gate_record.safetensors` (the numbers). The tokens of the
fixed rows lie beside them in `gate_rows.safetensors`, for those who have the version but not the sweep's data.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agnews_lora.data.tokens import TokenTable, read_table, write_table
from agnews_lora.errors import RegistryError

NUM_ROWS: Final = 64
RECORD: Final = "gate_record.json"
TENSORS: Final = "gate_record.safetensors"
FIXED_ROWS: Final = "gate_rows.safetensors"


@dataclass(frozen=True)
class GateRecord:
    """Answers of the exported weights in fp32, through plain PEFT.

    tokens: `token_digest` of the validation split. rows: [64] ids of the fixed rows. logits: [64, classes], of the
    fixed rows. predicted: [validation rows], labels of the whole split.
    """

    tokens: str
    rows: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]


def fixed_rows(num_rows: int) -> list[int]:
    """Ids of the rows whose logits are recorded: 64 evenly spaced ones from row 0 on, or all where there are fewer."""
    taken = min(NUM_ROWS, num_rows)
    return [index * num_rows // taken for index in range(taken)]


def record_of(logits: npt.NDArray[np.float32], table: TokenTable) -> GateRecord:
    """The record of logits [rows, classes] over a whole token table."""
    rows = np.asarray(fixed_rows(len(logits)))
    return GateRecord(token_digest(table), rows, logits[rows], logits.argmax(axis=-1))


def token_digest(table: TokenTable) -> str:
    """SHA-256 (hex) of the token ids of all rows, in order: what an answer depends on besides the weights."""
    sha = hashlib.sha256()
    for array in (table.ids, table.offsets):
        sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return sha.hexdigest()


def largest_difference(record: GateRecord, logits: npt.NDArray[np.float32]) -> float:
    """Largest absolute difference between the recorded logits and those of the same rows in logits [rows, classes]."""
    return float(np.abs(logits[record.rows].astype(np.float64) - record.logits).max())


def agreement(record: GateRecord, logits: npt.NDArray[np.float32]) -> float:
    """Share of the whole split on which logits [rows, classes] give the recorded label."""
    return float((logits.argmax(axis=-1) == record.predicted).mean())


def write_record(record: GateRecord, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the record to a folder. provenance: what else its JSON file says (device, versions)."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, npt.NDArray[Any]] = {"rows": record.rows, "logits": record.logits, "predicted": record.predicted}
    save_file(arrays, folder / TENSORS)
    facts = {
        "precision": "fp32",
        "fixed_rows": len(record.rows),
        "validation_rows": len(record.predicted),
        "tokens": record.tokens,
        **provenance,
    }
    (folder / RECORD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_gate_record(folder: Path) -> GateRecord:
    """The record in a folder.

    Raises:
        RegistryError: it is not there, or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        facts = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return GateRecord(facts["tokens"], **load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RegistryError(
            f"a registered version must hold {RECORD} and {TENSORS}, but {folder} does not ({error}); register another"
        ) from error


def write_fixed_rows(table: TokenTable, folder: Path) -> None:
    """Write the tokens of the fixed rows of a whole token table to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table.take(fixed_rows(len(table))), folder / FIXED_ROWS)


def read_fixed_rows(folder: Path) -> TokenTable:
    """The fixed rows in a folder, in the order of `GateRecord.logits`.

    Raises:
        RegistryError: they are not there, or not whole.
    """
    from safetensors import SafetensorError

    try:
        return read_table(folder / FIXED_ROWS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RegistryError(
            "a version must hold the rows that it is asked again before it is served, but "
            f"{folder / FIXED_ROWS} is not there or not whole; register another with `agnews-lora sweep --new`"
        ) from error
