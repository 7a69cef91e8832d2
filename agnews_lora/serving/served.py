"""A registered version as MLflow's scoring server runs it, asked first what it was asked when it was registered."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agnews_lora.errors import GateError
from agnews_lora.serving.checks import LARGEST_DIFFERENCE
from agnews_lora.serving.front import Front
from agnews_lora.serving.package import Package
from agnews_lora.serving.record import GateRecord, read_fixed_rows, read_gate_record

_REMEDY: Final = {False: "serve another one with --version", True: "serve it without --merged"}


@dataclass(frozen=True)
class Served:
    """A version that answers as it did when it was registered.

    application: MLflow's scoring server (ASGI), with ours in front. num_rows: asked again. difference: the largest
    between their logits then and now.
    """

    application: Front
    num_rows: int
    difference: float


def serve(package: Package, name: str, merged: bool) -> Served:
    """Load a version into MLflow's scoring server.

    package: verified files. name: the version's, for messages. merged: with the adapter merged into the base's weights.

    Raises:
        RegistryError: the version does not hold what it was asked when it was registered.
        GateError: it answers otherwise now.
        AgnewsLoraError: it cannot be loaded; see `Classifier`.
    """
    import mlflow.pyfunc
    from mlflow.pyfunc import scoring_server

    record, rows = read_gate_record(package.gate), read_fixed_rows(package.gate)
    model = mlflow.pyfunc.load_model(str(package.folder), model_config={"merged": merged})
    logits = model.unwrap_python_model().classifier.logits(rows)
    difference = require_same(record, logits, name, merged)
    return Served(Front(scoring_server.init(model)), len(rows), difference)


def require_same(record: GateRecord, logits: npt.NDArray[np.float32], name: str, merged: bool) -> float:
    """Largest difference between the recorded logits and `logits`, both [fixed rows, classes].

    Merging moves every weight by its rounding in fp32, which moves the logits by far less than the gate allows: the
    same limit holds for both.

    Raises:
        GateError: a label is another, or a logit differs by more than `LARGEST_DIFFERENCE`, or is no number.
    """
    difference = float(np.abs(logits.astype(np.float64) - record.logits).max())
    others = int(np.sum(logits.argmax(axis=-1) != record.logits.argmax(axis=-1)))
    if others or not difference <= LARGEST_DIFFERENCE:
        raise GateError(
            f"{name} must answer as when it was registered, with the same labels and logits within "
            f"{LARGEST_DIFFERENCE:g}, but {others} of {len(logits)} fixed rows get another label and the largest "
            f"difference is {difference:.2g}; {_REMEDY[merged]}"
        )
    return difference
