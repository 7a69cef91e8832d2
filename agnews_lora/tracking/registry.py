"""The registered versions of one model: their files, tags and aliases in MLflow's registry.

The alias `candidate` marks a version that waits for its promotion checks, `champion` the one in use, `previous` the
champion before it.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from agnews_lora.errors import RegistryError, StorageError
from agnews_lora.tracking.descriptions import beside_notes
from agnews_lora.tracking.runs import MAX_DIGEST_LENGTH, find_run, page_of
from agnews_lora.tracking.versions import CANDIDATE, CHAMPION, Version

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

LOGGED_MODEL: Final = "classifier"  # the name under which a run lists the model that was logged to it


class Registry:
    """The versions of the registered model `model`, which exists from its first version on."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self._client = client
        self.model = model

    def aliased(self, alias: str) -> Version | None:
        """The version that an alias points to, or None."""
        number = self.aliases().get(alias)
        return self.version(int(number)) if number is not None else None

    def waiting(self) -> Version | None:
        """The version that a promotion without a number checks: the candidate, or where there is none the champion."""
        return self.aliased(CANDIDATE) or self.aliased(CHAMPION)

    def champion(self) -> Version:
        """The version in use.

        Raises:
            RegistryError: there is none.
        """
        version = self.aliased(CHAMPION)
        if version is None:
            raise RegistryError(
                f"Cannot use {self.model}: it has no champion. Register a candidate with `agnews-lora sweep SWEEP`, "
                "and promote it with `agnews-lora promote SWEEP`."
            )
        return version

    def version(self, number: int) -> Version:
        """A version by its number.

        Raises:
            RegistryError: there is no such version; the message lists those there are.
        """
        try:
            return self._version(self._client.get_model_version(self.model, str(number)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = self._client.search_model_versions(f"name = '{self.model}'")
            known = ", ".join(str(each) for each in sorted(int(version.version) for version in found))
            remedy = f"Name one of {known}." if known else "Register one with `agnews-lora sweep`."
            raise RegistryError(
                f"Cannot use version {number} of {self.model}: it is not registered. {remedy}"
            ) from error

    def of_run(self, run_id: str) -> Version | None:
        """The version that was registered from a run, or None."""
        found = self._client.search_model_versions(f"name = '{self.model}' and run_id = '{run_id}'", max_results=1)
        return self._version(found[0]) if found else None

    def register(self, run_id: str, write: Callable[[Path, Model], Mapping[str, str]]) -> Version:
        """Log a model to a run, and register it as the next version.

        write: saves the model in MLflow's format to a folder that does not exist yet, under the identity it is given;
        gives the version's tags.
        """
        model, tags = self._log_model(run_id, write)
        try:
            self._client.create_registered_model(self.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # By location: MLflow looks up a `models:/` source through its global tracking URI, not through this client.
        created = self._client.create_model_version(
            self.model,
            model.artifact_location,
            run_id,
            tags=dict(tags),
            model_id=model.model_id,
            await_creation_for=0,
        )
        link = json.dumps([{"name": self.model, "version": int(created.version)}])
        self._client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
        return self._version(created)

    def folder(self, version: Version) -> Path:
        """Folder with the files of a version's model: in the store itself where it is local, else downloaded.

        Raises:
            RegistryError: the files are gone.
            StorageError: there is no room for them.
        """
        uri = self._client.get_model_version_download_uri(version.model, str(version.number))
        try:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=self._client.tracking_uri))
        except (MlflowException, OSError) as error:
            if (full := os.strerror(errno.ENOSPC)) in str(error):  # MLflow has it in the text of its own error
                raise StorageError(
                    f"Cannot download {version} to {tempfile.gettempdir()}: {full}. Free its disk."
                ) from error
            raise RegistryError(
                f"Cannot load {version}: its files at {uri} are gone. Put them back, or register another with "
                "`agnews-lora sweep --new`."
            ) from error

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version, in the order given."""
        for key, value in tags.items():
            self._client.set_model_version_tag(version.model, str(version.number), key, value)

    def set_alias(self, alias: str, version: Version) -> None:
        """Point an alias to a version, and away from any other."""
        self._client.set_registered_model_alias(version.model, alias, str(version.number))

    def remove_alias(self, alias: str) -> None:
        """Let an alias point to no version."""
        self._client.delete_registered_model_alias(self.model, alias)

    def log_report(self, version: Version, folder: Path) -> None:
        """Keep the files of a folder with the version's run, under `promotion/v<number>/`."""
        self._client.log_artifacts(version.run_id, str(folder), f"promotion/v{version.number}")

    def report(self, version: Version, name: str) -> str | None:
        """A file of `log_report`; None where the version was never checked, or the file or its run is gone."""
        if find_run(self._client, version.run_id) is None:
            return None
        return page_of(self._client, version.run_id).read_text(f"promotion/v{version.number}/{name}")

    def introduce(self, markdown: str) -> None:
        """Replace our part of the description of the model, which has a version."""
        present = self._client.get_registered_model(self.model).description
        self._client.update_registered_model(self.model, beside_notes(markdown, present))

    def describe(self, version: Version, markdown: str) -> None:
        """Replace our part of the description of a version."""
        present = self._client.get_model_version(version.model, str(version.number)).description
        self._client.update_model_version(version.model, str(version.number), beside_notes(markdown, present))

    def link(
        self, version: Version, parent: str, params: Sequence[str], metrics: Sequence[str], data: tuple[str, str]
    ) -> None:
        """Show, of a version's logged model, what its run has: params, and the last point of metrics, by name.

        parent: id of the run that the model is an output of as well. data: name and digest of the data set that the
        metrics were measured on. The version's own run is not changed.
        """
        run = self._client.get_run(version.run_id)
        # The registry of a database does not keep the model's id.
        source = self._client.get_model_version(version.model, str(version.number)).source
        models = self._client.search_logged_models([run.info.experiment_id], f"source_run_id = '{version.run_id}'")
        model = next((each for each in models if each.artifact_location == source), None)
        if model is None:  # somebody deleted it
            return
        model_id, known = model.model_id, model.params or {}
        new = {key: run.data.params[key] for key in params if key in run.data.params and key not in known}
        if new:
            self._client.log_model_params(model_id, new)
        name, digest = data
        measured = {"model_id": model_id, "dataset_name": name, "dataset_digest": digest[:MAX_DIGEST_LENGTH]}
        histories = [self._client.get_metric_history(version.run_id, key) for key in metrics if key in run.data.metrics]
        last = [max(points, key=lambda point: (point.step, point.timestamp)) for points in histories]
        # The run's own points, logged again with their model: same value, step and time, which MLflow keeps once.
        logged = [Metric(point.key, point.value, point.timestamp, point.step, **measured) for point in last]
        self._client.log_batch(version.run_id, metrics=logged, synchronous=True)
        outputs = self._client.get_run(parent).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._client.log_outputs(parent, [LoggedModelOutput(model_id, step=0)])

    def run_params(self, version: Version) -> dict[str, str]:
        """Params of the run that trained a version; none where somebody deleted it."""
        run = find_run(self._client, version.run_id)
        return dict(run.data.params) if run else {}

    def _log_model(
        self, run_id: str, write: Callable[[Path, Model], Mapping[str, str]]
    ) -> tuple[LoggedModel, Mapping[str, str]]:
        """The model that `write` saves, as an output of the run, and the tags that it gives."""
        run = self._client.get_run(run_id)
        logged = self._client.create_logged_model(run.info.experiment_id, LOGGED_MODEL, source_run_id=run_id)
        status = LoggedModelStatus.FAILED
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model")
                location, model_id = logged.artifact_location, logged.model_id
                tags = write(path, Model(artifact_path=location, run_id=run_id, model_id=model_id))
                self._client.log_model_artifacts(logged.model_id, str(path))
            self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            status = LoggedModelStatus.READY
        finally:
            self._client.finalize_logged_model(logged.model_id, status)
        return logged, tags

    def aliases(self) -> dict[str, str]:
        """Numbers of versions by alias."""
        try:
            return dict(self._client.get_registered_model(self.model).aliases)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    def _version(self, found: "ModelVersion") -> Version:
        aliases = tuple(alias for alias, number in self.aliases().items() if int(number) == int(found.version))
        return Version(self.model, int(found.version), str(found.run_id), dict(found.tags), aliases)
