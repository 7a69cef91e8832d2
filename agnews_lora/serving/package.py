"""The folder of a registered model: what lies where, and the proof that nothing in it has changed.

MLflow's own format, with the adapter (PEFT's files and record), the tokenizer and the gate's record as its artifacts.
The base is not in it: it is named, and found again where the model is loaded.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agnews_lora.adapters.base_models import KNOWN, BaseModel

if TYPE_CHECKING:
    from mlflow.models import Model

ARTIFACTS: Final = "artifacts"
ADAPTER: Final = "adapter"
TOKENIZER: Final = "tokenizer"
GATE: Final = "gate"

# What `mlflow_model.py` imports, beside this package itself, which no index has: serve in the project's own environment
# (`mlflow models serve --env-manager local`).
REQUIREMENTS: Final = ("mlflow", "torch", "transformers", "peft", "safetensors", "numpy", "pandas")
EXAMPLE: Final = "Oil prices rose to a record as the central bank left its interest rate unchanged."
HASH_TAG: Final = "sha256/"
_NO_FILE: Final = "no file"


@dataclass(frozen=True)
class Package:
    """A registered model's files. folder: where MLflow keeps them."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / ARTIFACTS / ADAPTER

    @property
    def tokenizer(self) -> Path:
        return self.folder / ARTIFACTS / TOKENIZER

    @property
    def gate(self) -> Path:
        return self.folder / ARTIFACTS / GATE

    def hash_tags(self) -> dict[str, str]:
        """The tags that `changed` compares with."""
        found = hashes({name: self.folder / ARTIFACTS / name for name in (ADAPTER, TOKENIZER, GATE)})
        return {f"{HASH_TAG}{name}": digest for name, digest in (found | self._own_files()).items()}

    def _own_files(self) -> dict[str, str]:
        """Hashes of MLflow's own files beside the artifacts, the code that it runs among them; it may add others."""
        return {path.name: _hash(path) for path in sorted(self.folder.iterdir()) if path.is_symlink() or path.is_file()}

    def changed(self, tags: Mapping[str, str]) -> list[str]:
        """What is not as a version's tags say it was at registration: files changed, missing or added, and links."""
        expected = {key.removeprefix(HASH_TAG): value for key, value in tags.items() if key.startswith(HASH_TAG)}
        present = hashes({name: self.folder / ARTIFACTS / name for name in (ADAPTER, TOKENIZER, GATE)})
        present |= {name: digest for name, digest in self._own_files().items() if name in expected}
        return sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))


def hashes(folders: Mapping[str, Path]) -> dict[str, str]:
    """{`<folder's name>/<file>`: SHA-256 (hex)} of all files in the folders given by name.

    What is neither a file nor a folder has no hash, and so is never what was registered: a link would be followed out
    of the folder, and what it leads to can change at any time.
    """
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": _hash(path)
        for name, folder in folders.items()
        for path in (folder, *sorted(folder.rglob("*")))
        if path.is_symlink() or not path.is_dir()
    }


def _hash(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return _NO_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locator(base: BaseModel) -> str:
    """What finds the base again on this machine, from any working directory: its name, or its folder."""
    return base.name if base.name in KNOWN else str(base.folder)


def write_package(
    folder: Path, identity: "Model", artifacts: Mapping[str, Path], base: str, labels: tuple[str, ...]
) -> None:
    """Save a pyfunc model from code: nothing is pickled.

    identity: whom MLflow logs it for. artifacts: folders of `ADAPTER`, `TOKENIZER` and `GATE`. base: its locator.

    MLflow would load the model and score the example before it logs it; what is written here is complete without
    that, and the fresh-process reload has proved the adapter.
    """
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # MLflow's bars would run across the live table
    probabilities = [ColSpec(DataType.double, label) for label in labels]
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=identity,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        # `merged` is there to be overridden: MLflow takes no key at loading that was not saved.
        model_config={"base": base, "sha256": hashes(artifacts), "merged": False},
        artifacts={name: str(path) for name, path in artifacts.items()},
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "text")]),
            outputs=Schema([ColSpec(DataType.string, "label"), *probabilities]),
        ),
        input_example=pd.DataFrame({"text": [EXAMPLE]}),
        pip_requirements=requirements(),
    )


def requirements() -> list[str]:
    """The installed versions of what a served model imports; a local label (`+cpu`) is in no index, and left out."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]
