"""Token tables as files: rows handed to a new process, or kept with a version to ask it again."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agnews_lora.data.tokens import TokenTable


def write_table(table: TokenTable, path: Path) -> None:
    """Write a table to a safetensors file, all but its digest."""
    from safetensors.numpy import save_file

    arrays = {"ids": table.ids, "offsets": table.offsets, "labels": table.labels, "pad_id": np.asarray([table.pad_id])}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def read_table(path: Path) -> TokenTable:
    """The table in a file, without a digest.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: there is none, or it is not whole.
    """
    from safetensors.numpy import load_file

    arrays: dict[str, npt.NDArray[Any]] = load_file(path)
    pad_id = int(arrays.pop("pad_id")[0])
    return TokenTable(**arrays, pad_id=pad_id, digest="")
