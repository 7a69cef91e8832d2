"""How a trial's adapter answers on the validation split, kept with its run."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.artifacts import download_artifacts

from agnews_lora.commands import board
from agnews_lora.commands.stage import Stage
from agnews_lora.data.rows import LABELS
from agnews_lora.data.sources import Corpus
from agnews_lora.reporting import winner
from agnews_lora.serving import reload
from agnews_lora.tracking.runs import SweepRuns

PREDICTIONS: Final = "predictions.csv"
# Figures of a trial's answers, by file name, with what they show.
ANSWERS: Final = {
    "confusion_matrix.png": "Confusion matrix of the winner",
    "calibration.png": "Calibration of the winner",
}


@dataclass
class Answers:
    """Answers of completed trials of one sweep, computed once each."""

    runs: SweepRuns
    stage: Stage
    _logits: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict, init=False)

    def logits(self, run_id: str) -> npt.NDArray[np.float32]:
        """Logits [validation rows, classes] of the adapter that a run has, in fp32.

        Raises:
            AdapterError: the adapter is damaged, or not one of the stage's base.
        """
        if run_id not in self._logits:
            uri = self.runs.client.tracking_uri
            with TemporaryDirectory() as folder:
                adapter = download_artifacts(run_id=run_id, artifact_path="adapter", tracking_uri=uri, dst_path=folder)
                self._logits[run_id] = reload.logits(Path(adapter), self.stage.base, self.stage.corpus.validation)
        return self._logits[run_id]

    def of_run(self, run_id: str) -> pd.DataFrame:
        """Predictions in the columns that `reporting.winner` reads, also as the artifact `predictions.csv` of the run:
        read from there where they are, else computed and saved.

        Raises:
            AdapterError: as `logits` does.
        """
        page = self.runs.page(run_id)
        known = page.read_text(PREDICTIONS)
        if known is not None:
            return pd.read_csv(io.StringIO(known))
        predictions = frame(self.logits(run_id), self.stage.corpus)
        with TemporaryDirectory() as folder:
            written = Path(folder, PREDICTIONS)
            predictions.to_csv(written, index=False, float_format="%.6f")
            page.log_files({PREDICTIONS: written})
        return predictions

    def show(self, trial: str, run_id: str, folder: Path) -> dict[str, Path]:
        """Figures of how a trial answers, made in `folder` and saved with its run, by artifact name.

        Beside them goes the table of its most confident mistakes.
        """
        predictions, page = self.of_run(run_id), self.runs.page(run_id)
        drawn = {name: folder / name for name in ANSWERS}
        title = f"{trial} on {len(predictions):,} validation rows"
        winner.confusion_matrix(predictions, title, drawn["confusion_matrix.png"])
        winner.calibration(predictions, trial, drawn["calibration.png"])
        page.log_files({**drawn, **board.thumbnails(drawn, folder)})
        page.log_table("mistakes", winner.mistakes(predictions, self.stage.corpus.validation_rows.texts))
        return drawn


def frame(logits: npt.NDArray[np.floating], corpus: Corpus) -> pd.DataFrame:
    """Logits [validation rows, classes] as predictions: `row`, `label`, `predicted`, and a probability a class."""
    exact = logits.astype(np.float64)
    probabilities = np.exp(exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True))
    names = np.asarray(LABELS)
    return pd.DataFrame(
        {
            "row": np.arange(len(logits)),
            "label": names[corpus.validation.labels],
            "predicted": names[logits.argmax(axis=-1)],
            **{name: probabilities[:, index] for index, name in enumerate(LABELS)},
        }
    )
