"""An experiment made ready to train: its base model, its token tables, and the engine over them."""

import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.config.experiment import Experiment
from agnews_lora.data import sources
from agnews_lora.data.sources import Corpus
from agnews_lora.data.sources import prepare as prepare_corpus
from agnews_lora.errors import BaseModelError
from agnews_lora.paths import TOKENS
from agnews_lora.training.interface import TrainSettings

if TYPE_CHECKING:
    from agnews_lora.tracking.runs import SweepRuns
    from agnews_lora.training.interface import Engine


@dataclass(frozen=True)
class EngineFactory:
    """Builds an engine, in this process or in a worker's.

    Args:
        name: `multilora` or `trainer`.
        slots: trials at once, with multilora; None: as many as fit the device.
    """

    name: str
    slots: int | None
    base: BaseModel
    corpus: Corpus
    settings: TrainSettings

    def __call__(self) -> "Engine":
        """Build it. The imports take seconds: they are here, since only a process that trains needs them.

        Raises:
            BaseModelError: another machine than the driver's, and it has no such base, or another one of that name.
        """
        base = self.base
        if not base.folder.is_dir():  # on another machine it lies elsewhere, or has to be downloaded
            base = resolve(base.name, num_labels=base.shape.num_labels)
            if base.weights_sha256 != self.base.weights_sha256:
                raise BaseModelError(
                    f"Cannot train on {socket.gethostname()}: its {base.name} has other weights than the driver's "
                    f"({base.weights_sha256} instead of {self.base.weights_sha256}). Copy the driver's there."
                )
        if self.name == "multilora":
            from agnews_lora.training.multilora.engine import MultiLoraEngine

            return MultiLoraEngine(base, self.corpus, self.settings, self.slots)
        from agnews_lora.training.hf_trainer import TrainerEngine

        return TrainerEngine(base, self.corpus, self.settings)


@dataclass(frozen=True)
class Prepared:
    """What training needs. The test split is not part of it."""

    experiment: Experiment
    base: BaseModel
    corpus: Corpus

    def engine(self, name: str, slots: int | None = None) -> EngineFactory:
        """What builds an engine over this."""
        return EngineFactory(name, slots, self.base, self.corpus, self.experiment.settings)

    @property
    def total_steps(self) -> int:
        """Training steps of one whole trial."""
        settings = self.experiment.settings
        return settings.epochs * -(-len(self.corpus.train) // settings.batch_size)

    def log_data(self, runs: "SweepRuns") -> None:
        """Make the data sets inputs of all runs that start from now on."""
        data = sources.describe(self.experiment.data_settings)
        log = partial(runs.log_dataset, source=", ".join(f"{key} {value}" for key, value in data.items()))
        for context, rows in (("training", self.corpus.train_rows), ("validation", self.corpus.validation_rows)):
            profile = {"num_classes": len(set(rows.labels))}
            name = f"{data['source']}-{context}"
            log(name, rows.digest(), num_rows=len(rows), profile=profile, context=context)


def prepare(experiment: Experiment) -> Prepared:
    """Find the base, read the data, tokenise it once.

    Raises:
        BaseModelError, DataError, NetworkError, StorageError: as the message says; nothing was written but the cache.
    """
    sources.check(experiment.data_settings)
    base = resolve(experiment.base, num_labels=len(sources.label_names(experiment.data_settings)))
    settings = experiment.settings
    corpus = prepare_corpus(
        experiment.data_settings, experiment.seed, base.folder, settings.max_length, settings.eval_rows, TOKENS
    )
    return Prepared(experiment, base, corpus)
