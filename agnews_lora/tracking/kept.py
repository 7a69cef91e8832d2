"""Checkpoints kept among a run's artifacts, for whoever goes on with the trial on another machine.

Only where the store is a server: on one machine the work folder is enough.
"""

import re
import tempfile
import time
from pathlib import Path
from typing import Final

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from agnews_lora.tracking.store import is_server

CHECKPOINTS: Final = "checkpoints"  # artifact folder of a trial that has not ended
KEPT_CHECKPOINTS: Final = 2
SECONDS_BETWEEN_CHECKPOINTS: Final = 60.0
_CHECKPOINT: Final = re.compile(rf"{CHECKPOINTS}/checkpoint-\d+")


class KeptCheckpoints:
    """The kept checkpoints of all runs that this process writes."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._kept_at: dict[str, float] = {}  # by run, in seconds of a monotonic clock

    def keep(self, run_id: str, checkpoint: Path) -> None:
        """Keep a checkpoint folder, at most one a minute; the newest two stay."""
        last = self._kept_at.get(run_id, float("-inf"))
        if not is_server(self._client) or time.monotonic() - last < SECONDS_BETWEEN_CHECKPOINTS:
            return
        self._client.log_artifacts(run_id, str(checkpoint), f"{CHECKPOINTS}/{checkpoint.name}")
        self._kept_at[run_id] = time.monotonic()
        for old in self._kept(run_id)[:-KEPT_CHECKPOINTS]:
            self._artifacts(run_id).delete_artifacts(old)

    def fetch(self, run_id: str, folder: Path) -> None:
        """Download what was kept into a folder, beside what is there."""
        if not is_server(self._client):
            return
        for kept in self._kept(run_id):
            there = folder / Path(kept).name
            if not there.exists():
                with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as beside:
                    Path(self._client.download_artifacts(run_id, kept, beside)).replace(there)

    def drop(self, run_id: str) -> None:
        """Remove what was kept with a run that needs it no more."""
        if is_server(self._client) and self._kept(run_id):
            self._artifacts(run_id).delete_artifacts(CHECKPOINTS)

    def _kept(self, run_id: str) -> list[str]:
        """Artifact paths of the kept checkpoints, the oldest first."""
        found = [item.path for item in self._client.list_artifacts(run_id, CHECKPOINTS) if item.is_dir]
        return sorted(
            (path for path in found if _CHECKPOINT.fullmatch(path)), key=lambda path: int(path.split("-")[-1])
        )

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        """The client has no call that removes an artifact; its repository has."""
        uri = self._client.get_run(run_id).info.artifact_uri
        return get_artifact_repository(uri, tracking_uri=self._client.tracking_uri)
