"""An experiment made ready to train: its base model, its token tables, and the engine over them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agnews_lora.adapters.base_models import BaseModel, resolve
from agnews_lora.config.experiment import Experiment
from agnews_lora.data import sources
from agnews_lora.data.rows import LABELS
from agnews_lora.data.sources import Corpus
from agnews_lora.data.sources import prepare as prepare_corpus
from agnews_lora.paths import TOKENS

if TYPE_CHECKING:
    from agnews_lora.training.interface import Engine


@dataclass(frozen=True)
class Stage:
    """What training needs. The test split is not part of it."""

    experiment: Experiment
    base: BaseModel
    corpus: Corpus

    def engine(self, name: Literal["trainer", "multilora"], slots: int | None = None) -> "Engine":
        """An engine over this (slots: trials at once, with multilora); importing one takes seconds, so only who trains
        does."""
        if name == "multilora":
            from agnews_lora.training.multilora.engine import MultiLoraEngine

            return MultiLoraEngine(self.base, self.corpus, self.experiment.settings, LABELS, slots)
        from agnews_lora.training.hf_trainer import TrainerEngine

        return TrainerEngine(self.base, self.corpus, self.experiment.settings, LABELS)

    @property
    def total_steps(self) -> int:
        """Training steps of one whole trial."""
        settings = self.experiment.settings
        return settings.epochs * -(-len(self.corpus.train) // settings.batch_size)


def prepare(experiment: Experiment) -> Stage:
    """Find the base, read the data, tokenise it once.

    Raises:
        BaseModelError, DataError, NetworkError, StorageError: as the message says; nothing was written but the cache.
    """
    sources.check(experiment.data_settings)
    base = resolve(experiment.base, num_labels=len(LABELS))
    settings = experiment.settings
    corpus = prepare_corpus(
        experiment.data_settings, experiment.seed, base.folder, settings.max_length, settings.eval_rows, TOKENS
    )
    return Stage(experiment, base, corpus)
