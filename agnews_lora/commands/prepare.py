"""An experiment made ready to train: its base model, its token tables, and the engine over them."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agnews_lora.adapters.base_models import CONFIG, BaseModel, resolve
from agnews_lora.adapters.families import unknown_to_multilora
from agnews_lora.config.experiment import Experiment
from agnews_lora.data import sources
from agnews_lora.data.sources import Corpus
from agnews_lora.data.sources import prepare as prepare_corpus
from agnews_lora.data.tokens import load_tokenizer
from agnews_lora.errors import BaseModelError
from agnews_lora.paths import TOKENS
from agnews_lora.training.interface import TrainSettings

if TYPE_CHECKING:
    from agnews_lora.tracking.runs import SweepRuns
    from agnews_lora.training.interface import Engine

SMALLEST_VOCABULARY: Final = 16  # tokens beside the special ones


@dataclass(frozen=True)
class EngineFactory:
    """Builds an engine, in this process or in a worker's.

    Args:
        name: `multilora` or `trainer`.
        slots: trials at once, with multilora; None: as many as fit a GPU, or as a CPU has threads (4 at most).
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
    engine_name: str
    engine_reason: str

    def engine(self, slots: int | None = None) -> EngineFactory:
        """What builds the engine over this."""
        return EngineFactory(self.engine_name, slots, self.base, self.corpus, self.experiment.settings)

    @property
    def notes(self) -> list[str]:
        """What a person should know of base and data before they are trained on."""
        note, profile = self.base.shape.layout.note, self.corpus.profile
        return [*([f"{self.experiment.base}: {note}"] if note else []), *profile["warnings"]]

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


def prepare(experiment: Experiment, engine: str = "auto", slots: int | None = None) -> Prepared:
    """Find the base, check it, read the data, tokenise it once.

    engine, slots: as a sweep asks for them.

    Raises:
        BaseModelError, DataError, NetworkError, StorageError: as the message says; nothing was written but the cache.
    """
    sources.check(experiment.data_settings)
    base = resolve(experiment.base, num_labels=len(sources.label_names(experiment.data_settings)), record=True)
    name, reason = check(experiment, base, engine, slots)
    settings = experiment.settings
    corpus = prepare_corpus(
        experiment.data_settings, experiment.seed, base.folder, settings.max_length, settings.eval_rows, TOKENS
    )
    return Prepared(experiment, base, corpus, name, reason)


def check(experiment: Experiment, base: BaseModel, engine: str, slots: int | None) -> tuple[str, str]:
    """Check base, tokenizer and settings against one another, and choose the engine: its name, and why it is that one.

    engine: `auto` takes multilora where that computes the base and the settings, else trainer.

    Raises:
        BaseModelError: they do not go together; the message has every fault.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(base.folder), local_files_only=True)
    except Exception as error:  # transformers raises errors of many kinds for values that it does not take
        raise BaseModelError(
            f"Cannot use base model {base.name}: transformers cannot read {base.folder / CONFIG} ({error}). Copy or "
            "download it again."
        ) from error
    settings = experiment.settings
    faults = [*_config_faults(base, config, settings.max_length), *_tokenizer_faults(base.folder, config.vocab_size)]
    cause = unknown_to_multilora(base.shape.family, config.to_dict(), settings.base_dropout)
    name, reason = engine, "asked for by name"
    if engine == "auto":
        name, reason = ("trainer", cause) if cause else ("multilora", "many trials at once through one base")
    if name == "multilora" and cause:
        faults.append(f"{cause}. Take `engine: trainer`, or `engine: auto`")
    if name == "trainer" and slots is not None:
        faults.append(f"slots is {slots}, but engine trainer ({reason}) trains one trial after another. Remove `slots`")
    if faults:
        lines = "\n  ".join(f"{fault}." for fault in faults)
        raise BaseModelError(f"Cannot train experiment {experiment.name} on base model {base.name}:\n  {lines}")
    return name, reason


def _config_faults(base: BaseModel, config: Any, max_length: int) -> Iterator[str]:
    padding_id, counts = config.pad_token_id, base.shape.layout.counts_from_padding
    if counts if padding_id is None else not 0 <= padding_id < config.vocab_size:
        yield f"its {CONFIG} has pad_token_id {padding_id}, which is no token's. Put the id of its padding token there"
    elif max_length > (positions := config.max_position_embeddings - (padding_id + 1 if counts else 0)):
        yield f"max_length is {max_length}, above its positions. Take max_length at most {positions} on this base"


def _tokenizer_faults(folder: Path, vocabulary_size: int) -> Iterator[str]:
    """Check that a tokenizer is whole and fits the rows of the embedding matrix."""
    try:
        tokenizer = load_tokenizer(folder)
    except BaseModelError as error:
        yield str(error).removesuffix(".")
        return
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary_size:
        yield (
            f"its tokenizer gives ids up to {highest}, but its embedding matrix has {vocabulary_size} rows. Take away "
            "tokens that were added to the tokenizer, or enlarge the matrix for them and save the base again"
        )
    # For files of another kind than its own, transformers makes a tokenizer of special tokens alone.
    if len(tokenizer) - len(tokenizer.all_special_ids) < SMALLEST_VOCABULARY:
        yield f"its tokenizer knows {len(tokenizer)} special tokens and no words. Copy all of the tokenizer's files"
    vocabulary, described = folder / "vocab.txt", folder / "tokenizer_config.json"
    reads_it = vocabulary.name in tokenizer.vocab_files_names.values() and not (folder / "tokenizer.json").is_file()
    says = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    if reads_it and vocabulary.is_file() and "do_lower_case" not in says:
        yield (
            f"its {vocabulary.name} alone does not say whether texts are lower-cased. Put {described.name} beside it, "
            'with {"do_lower_case": true} for an uncased vocabulary, false for a cased one'
        )
