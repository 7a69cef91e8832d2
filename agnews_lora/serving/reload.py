"""Load an adapter as a stranger would: its files, plain PEFT and a newly found base, in a new process.

`reload` starts that process, which runs this module's `main`. It asks no hub.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

import agnews_lora
from agnews_lora.adapters.adapter_files import load_with_peft, read_record
from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.data.tokens import TokenTable, read_table, write_table
from agnews_lora.errors import AgnewsLoraError, PromotionError
from agnews_lora.training.metrics import Watch, predict_logits

BATCH_SIZE: Final = 64
# Without the working folder, where a user's script may have the name of a library. This package is found where it is.
_PYTHON: Final = (sys.executable, "-P", "-W", "ignore", "-c")
_PACKAGES: Final = Path(agnews_lora.__file__).parents[1]
_PROGRAM: Final = f"""
import sys
sys.path.insert(0, sys.argv.pop(1))
import agnews_lora
del sys.path[0]
from {__name__} import main
sys.exit(main())
"""


def logits(adapter: Path, base: BaseModel, table: TokenTable, watch: Watch = iter) -> npt.NDArray[np.float32]:
    """Logits [rows, classes] of an adapter on all rows of a table: plain PEFT on a new base, in fp32.

    watch: as of `predict_logits`.

    Raises:
        AdapterError: the files are not an adapter, or not one of this base.
    """
    from agnews_lora.training.device import training_device

    device = training_device()
    model = load_with_peft(adapter, base).to(device)
    with full_precision():
        return predict_logits(model, table, range(len(table)), BATCH_SIZE, device, watch)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in full, even where training in this process has allowed TF32 (10 bits of mantissa)."""
    import torch

    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def reload(adapter: Path, base: str, table: TokenTable) -> npt.NDArray[np.float32]:
    """`logits`, computed in a new process that resolves the base by its name.

    Raises:
        PromotionError: the new process could not load the adapter or compute; the message is its own.
    """
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        rows, answers = Path(folder, "rows.safetensors"), Path(folder, "logits.safetensors")
        write_table(table, rows)
        command = [*_PYTHON, _PROGRAM, str(_PACKAGES), str(adapter), base, str(rows), str(answers)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            last_line = (process.stderr.strip().splitlines() or [f"it ended with code {process.returncode}"])[-1]
            # A message of this module's own has its remedy.
            remedy = "" if process.returncode == 2 else ". Mend that, and start again: all trials are kept."
            raise PromotionError(f"Cannot load the adapter in a new process: {last_line}{remedy}")
        return load_file(answers)["logits"]


def main() -> int:
    """Read rows, load, compute, write logits; the exit code is 2 after a message of one line."""
    from safetensors.numpy import save_file

    adapter, base, rows, answers = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    try:
        found = resolve(base, num_labels=len(read_record(adapter).labels))
        save_file({"logits": logits(adapter, found, read_table(rows))}, answers)
    except AgnewsLoraError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
