"""The exceptions a user can meet, under one root.

Messages read `Cannot X: cause. Do Y.` The command line prints the message alone and exits with code 2; every other
exception is a bug of the program and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AgnewsLoraError(Exception):
    """Root of all errors that a user can cause and fix."""


class ConfigError(AgnewsLoraError):
    """An experiment or sweep file that is not valid. The message has every fault of the file."""


class BudgetError(AgnewsLoraError):
    """More trainable parameters than the budget allows, or a budget that no adapter fits."""


class BaseModelError(AgnewsLoraError):
    """A base model that is not there, is corrupt, or is of a family that the engines do not know."""


class DataError(AgnewsLoraError):
    """Rows that are missing or malformed, named by file and line."""


class NetworkError(AgnewsLoraError):
    """The hub is needed and cannot be reached."""


class StorageError(AgnewsLoraError):
    """A store (study, runs, artifacts, cache) that cannot be opened or written."""


class StoreAway(StorageError):
    """A store that does not answer now, and may do so again."""


class RunDeleted(StorageError):
    """A run, its artifacts, or the MLflow experiment around it, that somebody deleted in the run store."""


class StudyError(AgnewsLoraError):
    """A study that cannot be opened or resumed as asked."""


class AdapterError(AgnewsLoraError):
    """Adapter files that do not hold what their specification says."""


class PromotionError(AgnewsLoraError):
    """A version that fails its promotion checks, or answers otherwise than when it was registered."""


class RegistryError(AgnewsLoraError):
    """A registered model, version or alias that is not there."""


class TrainingError(AgnewsLoraError):
    """A trial that cannot go on: its loss is no longer finite, or it does not fit the device."""


def nearest(given: object, known: Iterable[str], form: str = ". Did you mean {}?") -> str:
    """Suggest the known word that is nearest to an unknown one, in a form of words; empty where none is near."""
    close = get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return form.format(close[0]) if close else ""
