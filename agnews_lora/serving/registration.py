"""A sweep's winner becomes a registered version that waits at the gate."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.adapter_files import AdapterRecord, read_record, recount
from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.adapters.budget import breach
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable, load_tokenizer
from agnews_lora.errors import BudgetError
from agnews_lora.serving import reload
from agnews_lora.serving.checks import compare_reload, require_all
from agnews_lora.serving.package import ADAPTER, GATE, TOKENIZER, Package, locator, write_package
from agnews_lora.serving.record import GateRecord, record_of, write_fixed_rows, write_record
from agnews_lora.tracking.registry import CANDIDATE, Registry, Version
from agnews_lora.training.metrics import accuracy

if TYPE_CHECKING:
    from mlflow.models import Model


@dataclass(frozen=True)
class Winner:
    """What a sweep found.

    run_id: of the trial's run. adapter: folder with PEFT's files and the record. budget: trainable parameters.
    """

    run_id: str
    adapter: Path
    sweep: str
    study: str
    budget: int


def register(
    registry: Registry,
    winner: Winner,
    base: BaseModel,
    corpus: Corpus,
    data: Mapping[str, str],
    logits: Callable[[], npt.NDArray[np.float32]] | None = None,
) -> Version:
    """The winner as a new version under the alias `candidate`; the version that its run already has, where it has one.

    data: where the rows come from, in words, for the model card. logits: gives `reload.logits` of the adapter on the
    validation split, where the caller has a use for them too; else they are computed here.

    Raises:
        BudgetError: its file holds more trainable parameters than the budget.
        AdapterError: its files are not what its record says.
        GateError: loaded in a new process, it does not answer as in this one. Nothing is registered then.
    """
    known = registry.of_run(winner.run_id)
    if known is not None:
        return _waiting(registry, known)
    record = read_record(winner.adapter)
    count = recount(winner.adapter)
    if count > winner.budget:
        raise BudgetError(breach(record.spec, record.shape, winner.budget, count))
    found = logits() if logits else reload.logits(winner.adapter, base, corpus.validation)
    answers = record_of(found, corpus.validation)
    reloaded = reload.reload(winner.adapter, locator(base), corpus.validation)
    require_all(compare_reload(answers, reloaded), f"{record.trial} of {winner.study} cannot be registered")
    with tempfile.TemporaryDirectory() as folder:
        artifacts = _artifacts(Path(folder), winner.adapter, base, answers, corpus.validation)
        tags = _tags(winner, record, base, corpus, answers) | {"data": json.dumps(data)}

        def write(path: Path, identity: "Model") -> Mapping[str, str]:
            write_package(path, identity, artifacts, locator(base), record.labels)
            return tags | Package(path).hash_tags()

        version = registry.register(winner.run_id, write)
    registry.set_alias(CANDIDATE, version)
    return registry.version(version.number)


def _waiting(registry: Registry, version: Version) -> Version:
    """A version that was registered before; one whose process was killed before it got its alias gets it now."""
    if version.aliases or "gate" in version.tags or registry.aliased(CANDIDATE) is not None:
        return version
    registry.set_alias(CANDIDATE, version)
    return registry.version(version.number)


def _artifacts(
    folder: Path, adapter: Path, base: BaseModel, answers: GateRecord, validation: TokenTable
) -> dict[str, Path]:
    """The folders that a registered model holds, by name; MLflow keeps a folder's own name, so it must be the same."""
    adapter, tokenizer, gate = shutil.copytree(adapter, folder / ADAPTER), folder / TOKENIZER, folder / GATE
    # Saved again rather than copied: the base's own files may need its configuration beside them.
    load_tokenizer(base.folder).save_pretrained(str(tokenizer))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    write_record(answers, gate, versions)
    write_fixed_rows(validation, gate)
    return {ADAPTER: adapter, TOKENIZER: tokenizer, GATE: gate}


def _tags(
    winner: Winner, record: AdapterRecord, base: BaseModel, corpus: Corpus, answers: GateRecord
) -> dict[str, str]:
    return {
        "trial": record.trial,
        "sweep": winner.sweep,
        "study": winner.study,
        "base": locator(base),
        "base_hub_id": base.hub_id,
        "base_revision": base.revision,
        "budget": str(winner.budget),
        "trainable_parameters": str(record.trainable_parameters),
        "data_digest": corpus.digest,
        "validation_accuracy": str(accuracy(answers.predicted, corpus.validation.labels)),
        "validation_rows": str(len(corpus.validation)),
    }
